"""Budget of a training run."""

from __future__ import annotations

import click

from sparse_training.cli.values import COUNT, POSITIVE

BUDGETS = ("epochs", "steps", "rows", "seconds")
ONE_BUDGET = f"Give exactly one of {', '.join(f'--{name}' for name in BUDGETS)}"
BUDGET = (
    click.option("--epochs", type=POSITIVE, help=f"Budget in passes over the data. {ONE_BUDGET}."),
    click.option("--steps", type=COUNT, help="Budget in batches."),
    click.option("--rows", type=COUNT, help="Budget in rows of the data, trained on or not."),
    click.option("--seconds", type=POSITIVE, help="Budget in seconds of the calibrated clock."),
)
