"""``sparse-train compare``: methods side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sparse_training.cli.display import Display
from sparse_training.cli.folders import choose_folder, prepare, print_resume, refuse_torchrun, write_options
from sparse_training.cli.options import (
    POLICY_NAMES,
    PRECISION,
    RUN,
    RUN_SECONDS,
    SEEDS,
    check_rate_is_used,
    methods,
    with_options,
)
from sparse_training.cli.recipe import RECIPE
from sparse_training.cli.signals import Invocation
from sparse_training.cli.values import COUNT
from sparse_training.data.load import load_data
from sparse_training.experiments.compare import METHODS, comparison_design, comparison_result, comparison_runner
from sparse_training.experiments.runner import Interrupted
from sparse_training.reporting.pages import write_comparison
from sparse_training.reporting.tables import print_comparison

# Options that are fields of the design.
DESIGN = (
    *("methods", "seeds", "model", "rate", "batch_size", "seconds", "lr", "amp"),
    *("dense_start", "dense_end", "precision", "evaluations"),
    *("optimizer", "weight_decay", "momentum", "schedule", "lr_warmup", "augment"),
)


@click.command(name="compare")
@with_options(*RUN)
@PRECISION
@click.option("--methods", default=",".join(METHODS), callback=methods, help=f"Some of {POLICY_NAMES}.")
@RUN_SECONDS
@SEEDS
@with_options(*RECIPE)
@click.option("--evaluations", type=COUNT, default=20, help="Evaluations in a run, not charged to the clock.")
@click.option("--resume", is_flag=True, help="Continue an interrupted comparison in --out.")
@click.pass_obj
def command(invocation: Invocation, /, out: str | None, resume: bool, **options: Any) -> None:
    """Train methods side by side at equal wall-clock."""
    options["rate"] = check_rate_is_used(options["methods"], options["rate"])
    folder, resume = choose_folder(out, "compare", resume)
    run(invocation, folder, {"command": "compare", "line": invocation.line, **options}, resume)


def run(invocation: Invocation, folder: Path, options: dict[str, Any], resume: bool = False) -> None:
    """Compare, or continue what ``folder`` holds, and write the report.

    Raises:
        UserError: an option that cannot be served.
    """
    refuse_torchrun("compare")
    device = prepare(options)
    data = load_data(options["data"], options["root"], size=options.get("image_size"))
    design = comparison_design(**{name: options[name] for name in DESIGN if name in options})
    runner = comparison_runner(
        data, design, folder=folder, device=device, resume=resume, command=options["line"]
    )  # what can be refused is refused here, before the folder is made
    if not resume:
        write_options(folder, options)
    try:
        with Display(total=len(runner.missing())) as display, invocation.signals.at_next_step():
            runner.run(
                progress=lambda cell, status: display.update(cell.method, cell.seed, status),
                stop=invocation.signals.stop,
                calibrating=display.calibrating,
            )
    except Interrupted:
        print_resume(folder)
        return
    result = comparison_result(runner)
    written = write_comparison(result, folder)
    print_comparison(result)
    print(f"written: {', '.join(map(str, written))}")
