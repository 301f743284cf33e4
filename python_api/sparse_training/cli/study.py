"""``sparse-train study``: methods against dense training, over tasks."""

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
    POLICY_NAMES,
    RUN,
    RUN_SECONDS,
    SEEDS,
    check_rate_is_used,
    fractions,
    study_methods,
    tasks,
    with_options,
)
from sparse_training.cli.signals import Invocation
from sparse_training.cli.values import COUNT, PART, POSITIVE
from sparse_training.data.load import load_data
from sparse_training.data.splits import VALIDATION, take_part
from sparse_training.errors import UserError
from sparse_training.experiments.design import AGAIN, BASELINE, RANDOM, policy_of
from sparse_training.experiments.presets import PRESETS, preset
from sparse_training.experiments.runner import Interrupted, Runner
from sparse_training.experiments.store import CALIBRATION
from sparse_training.experiments.study import METHODS, study_design, study_result, study_runner
from sparse_training.experiments.tasks import DEFAULT_TASKS, TASKS
from sparse_training.experiments.verdicts import MARGIN
from sparse_training.precision import PRECISIONS
from sparse_training.reporting.pages import write_study
from sparse_training.reporting.tables import print_calibration, print_study

_NOT_OF_THE_DESIGN = (
    "command",
    "line",
    "data",
    "root",
    "out",
    "device",
    "threads",
    "image_size",
    "rows",
    "preset",
    "margin",
)


def _apply_preset(context: click.Context, parameter: click.Parameter, name: str | None) -> str | None:
    """Let a preset's options stand in for the command's defaults; what the user gives goes before them."""
    if name is not None:
        context.default_map = {**preset(name).options, **(context.default_map or {})}
    return name


def _shard(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, int]:
    """Read a shard: "2/3" is the second of three."""
    if text is None:
        return 1, 1
    first, _, shards = text.partition("/")
    if not (first.isdecimal() and shards.isdecimal() and 1 <= int(first) <= int(shards)):
        raise click.BadParameter(f"{text!r} must say which part of how many, such as 1/2")
    return int(first), int(shards)


@click.command(name="study")
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    is_eager=True,
    callback=_apply_preset,
    help="Recorded design, whose options are the defaults of the others.",
)
@with_options(*RUN)
@click.option("--rows", type=COUNT, help="Training rows of the data to use, evenly of each class.  [default: all]")
@click.option("--tasks", default=",".join(DEFAULT_TASKS), callback=tasks, help=f"Some of {', '.join(TASKS)}.")
@click.option(
    "--methods",
    default=",".join(METHODS),
    callback=study_methods,
    help=f"Some of {POLICY_NAMES}; and {AGAIN}, {RANDOM} with other draws. {BASELINE} is always among them.",
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
@click.option("--validation", type=PART, default=VALIDATION, help="Share of the training rows to make choices on.")
@click.option("--margin", type=POSITIVE, default=MARGIN, help="Largest loss against dense that counts as none.")
@click.option(
    "--shard", callback=_shard, help="Part of the runs to do, such as 1/2, in a folder that other processes share."
)
@click.option("--calibrate-only", is_flag=True, help="Time the methods' steps, on an idle machine, and end.")
@click.option(
    "--resume", is_flag=True, help="Continue in --out, by its calibration; more tasks, methods or seeds may be given."
)
@click.pass_obj
def command(
    invocation: Invocation,
    /,
    out: str | None,
    resume: bool,
    calibrate_only: bool,
    shard: tuple[int, int],
    **options: Any,
) -> None:
    """Compare methods with dense training on several tasks.

    All have equal cost, and differences are paired by seed and test row. --batch-size counts the rows trained in a
    step: a method that keeps the fraction r is offered batch size / r rows. Choices are made on validation rows; the
    test rows are read once, at the end of each run.
    """
    options["rate"] = check_rate_is_used(map(policy_of, options["methods"]), options["rate"])
    folder, resume = choose_folder(out, "study", resume)
    options = {"command": "study", "line": invocation.line, **options}
    run(invocation, folder, options, resume, calibrate_only, shard)


def run(
    invocation: Invocation,
    folder: Path,
    options: dict[str, Any],
    resume: bool = False,
    calibrate_only: bool = False,
    shard: tuple[int, int] = (1, 1),
) -> None:
    """Run a study, or continue what ``folder`` holds, and write the report.

    Raises:
        UserError: an option that cannot be served.
    """
    refuse_torchrun("study")
    device = prepare(options)
    data = load_data(options["data"], options["root"], size=options.get("image_size"))
    if options.get("rows") is not None:
        data = take_part(data, options["rows"])
    given = {name: value for name, value in options.items() if name not in _NOT_OF_THE_DESIGN}
    named = options.get("preset")
    design = study_design(device=device, plans=preset(named).plans if named else None, **given)
    runner = study_runner(
        data, design, folder=folder, device=device, resume=resume, command=options["line"], shard=shard
    )
    if shard != (1, 1) and not all(map(runner.store.has_costs, runner.benches())):
        raise UserError(f"--shard needs a calibration of every task in {folder}; make it first, with --calibrate-only")
    write_options(folder, options)
    if calibrate_only:
        with StudyDisplay({}) as bar:
            costs = [runner.costs(bench, progress=bar.calibrating) for bench in runner.benches()]
        for cost in costs:
            print_calibration(cost)
        print(f"written: {folder / CALIBRATION}; to go on: {resume_line(folder)}")
        return
    missing = runner.missing()
    print(f"{len(missing)} of {len(design.cells)} runs to do", file=sys.stderr)
    margin = options.get("margin", MARGIN)
    display = StudyDisplay({cell: cell.fraction * design.plan(cell.task).seconds for cell in missing})
    try:
        with display, invocation.signals.at_next_step():
            runner.run(progress=display.step, stop=invocation.signals.stop, calibrating=display.calibrating)
    except Interrupted:
        if any(cell.method == BASELINE and cell.fraction == 1.0 for cell in runner.finished()):
            _report(runner, folder, margin)
        print_resume(folder)
        return
    result, written = _report(runner, folder, margin)
    print_study(result)
    print(f"written: {', '.join(map(str, written))}")


def _report(runner: Runner, folder: Path, margin: float) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """Write the report of what is finished."""
    result = study_result(runner, margin=margin)
    return result, write_study(result, folder)
