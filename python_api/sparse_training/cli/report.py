"""``sparse-train report``: draw a recorded result again."""

from __future__ import annotations

from pathlib import Path

import click

from sparse_training.experiments.formats import COMPARISON, STUDY
from sparse_training.reporting.pages import write_comparison, write_study
from sparse_training.reporting.result import find_result
from sparse_training.reporting.run import RESULT, print_run, read_run
from sparse_training.reporting.run_page import write_run
from sparse_training.reporting.tables import print_comparison, print_study


@click.command(name="report")
@click.argument("folder", type=click.Path())
def command(folder: str) -> None:
    """Draw the comparison, study or run in FOLDER again."""
    if not any(Path(folder, kind.file).exists() for kind in (STUDY, COMPARISON)) and Path(folder, RESULT).exists():
        run = read_run(folder)
        print_run(run)
        print(f"written: {write_run(run, folder)}")
        return
    kind, result = find_result(folder)
    if kind == STUDY:
        print_study(result)
        write_study(result, folder)
    else:
        print_comparison(result)
        write_comparison(result, folder)
