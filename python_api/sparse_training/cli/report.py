"""``sparse-train report``: draw a recorded result again."""

from __future__ import annotations

import click

from sparse_training.experiments.formats import STUDY
from sparse_training.reporting.pages import write_comparison, write_study
from sparse_training.reporting.result import find_result
from sparse_training.reporting.tables import print_comparison, print_study


@click.command(name="report")
@click.argument("folder", type=click.Path())
def command(folder: str) -> None:
    """Draw the comparison or study in FOLDER again."""
    kind, result = find_result(folder)
    if kind == STUDY:
        print_study(result)
        write_study(result, folder)
    else:
        print_comparison(result)
        write_comparison(result, folder)
