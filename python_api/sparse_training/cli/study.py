"""``sparse-train study``: methods against random, over tasks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from sparse_training.cli.display import StudyDisplay
from sparse_training.cli.folders import (
    choose_folder,
    prepare,
    print_resume,
    refuse_torchrun,
    resume_line,
    write_options,
)
from sparse_training.cli.options import (
    COUNT,
    POLICY_NAMES,
    RUN,
    RUN_SECONDS,
    SEEDS,
    fractions,
    study_methods,
    tasks,
    with_options,
)
from sparse_training.cli.signals import Invocation
from sparse_training.data.load import load_data
from sparse_training.experiments.design import AGAIN, BASELINE
from sparse_training.experiments.runner import Interrupted
from sparse_training.experiments.store import CALIBRATION
from sparse_training.experiments.study import METHODS, study_design, study_result, study_runner
from sparse_training.experiments.tasks import TASKS
from sparse_training.precision import PRECISIONS
from sparse_training.reporting.pages import write_study
from sparse_training.reporting.tables import print_calibration, print_study

_NOT_OF_THE_DESIGN = ("command", "line", "data", "root", "out", "device", "threads")


@click.command(name="study")
@with_options(*RUN)
@click.option("--tasks", default=",".join(TASKS), callback=tasks, help=f"Some of {', '.join(TASKS)}.")
@click.option(
    "--methods",
    default=",".join(METHODS),
    callback=study_methods,
    help=f"Some of {POLICY_NAMES}; and {AGAIN}, {BASELINE} with other draws. {BASELINE} is always among them.",
)
@RUN_SECONDS
@click.option(
    "--fractions", default="1", callback=fractions, help="Budgets as fractions of --seconds: 1,0.5 adds half runs."
)
@SEEDS
@click.option("--evaluations", type=COUNT, default=8, help="Evaluations in a whole run, not charged to the clock.")
@click.option(
    "--amp", type=click.Choice(["auto", *PRECISIONS]), default="auto", help="Precision of training and scoring."
)
@click.option("--calibrate-only", is_flag=True, help="Time the methods' steps, on an idle machine, and end.")
@click.option(
    "--resume", is_flag=True, help="Continue in --out, by its calibration; more tasks, methods or seeds may be given."
)
@click.pass_obj
def command(invocation: Invocation, /, out: str | None, resume: bool, calibrate_only: bool, **options: Any) -> None:
    """Compare methods with random on several tasks.

    All have equal cost, and differences are paired by seed. --batch-size counts the rows trained in a step: a method
    that keeps the fraction r is offered batch size / r rows.
    """
    folder, resume = choose_folder(out, "study", resume)
    run(invocation, folder, {"command": "study", "line": invocation.line, **options}, resume, calibrate_only)


def run(
    invocation: Invocation, folder: Path, options: dict[str, Any], resume: bool = False, calibrate_only: bool = False
) -> None:
    """Run a study, or continue what ``folder`` holds, and write the report.

    Raises:
        UserError: an option that cannot be served.
    """
    refuse_torchrun("study")
    device = prepare(options)
    data = load_data(options["data"], options["root"])
    given = {name: value for name, value in options.items() if name not in _NOT_OF_THE_DESIGN}
    design = study_design(device=device, **given)
    runner = study_runner(data, design, folder=folder, device=device, resume=resume, command=options["line"])
    write_options(folder, options)
    if calibrate_only:
        print_calibration(runner.costs())
        print(f"written: {folder / CALIBRATION}; to go on: {resume_line(folder)}")
        return
    missing = runner.missing()
    print(f"{len(missing)} of {len(design.cells)} runs to do", file=sys.stderr)
    display = StudyDisplay(missing)
    try:
        with display:
            runner.run(progress=display.step, stop=invocation.signals.stop)
    except Interrupted:
        if len(runner.missing()) < len(design.cells):
            write_study(study_result(runner), folder)
        print_resume(folder)
        return
    result = study_result(runner)
    written = write_study(result, folder)
    print_study(result)
    print(f"written: {', '.join(map(str, written))}")
