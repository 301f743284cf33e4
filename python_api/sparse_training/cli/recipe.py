"""Options of how a model is trained, the same of every command that trains one."""

from __future__ import annotations

from typing import Any

import click

from sparse_training.cli.values import FRACTION, NOT_NEGATIVE, checked_by
from sparse_training.models.augment import read_augmentation
from sparse_training.precision import PRECISIONS
from sparse_training.training.optimizers import DEFAULT_OPTIMIZER, OPTIMIZERS
from sparse_training.training.schedule import LR_WARMUP, SHAPES

RECIPE: tuple[Any, ...] = (
    click.option("--optimizer", type=click.Choice(list(OPTIMIZERS)), default=DEFAULT_OPTIMIZER, help="Optimizer."),
    click.option("--weight-decay", type=NOT_NEGATIVE, help="Weight decay.  [default: the optimizer's, 0.01 of adamw]"),
    click.option("--momentum", type=NOT_NEGATIVE, help="Momentum, of sgd and rmsprop.  [default: 0.9 of sgd, else 0]"),
    click.option("--schedule", type=click.Choice(SHAPES), default="cosine", help="Shape of the learning rate."),
    click.option(
        "--lr-warmup", type=FRACTION, default=LR_WARMUP, help="Fraction of the run over which the learning rate rises."
    ),
    click.option(
        "--augment",
        callback=checked_by(read_augmentation),
        help="flip, shift or shift:PIXELS of training images, or two with a comma.",
    ),
    click.option("--amp", type=click.Choice(list(PRECISIONS)), help="Precision of training.  [default: the model's]"),
)
