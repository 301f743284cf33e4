"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import click
import torch

from sparse_training.cli.values import NOT_NEGATIVE
from sparse_training.errors import UserError

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
}
MOMENTUM = {"sgd": 0.9, "rmsprop": 0.0}  # defaults of those that have one
FUSED = ("adamw", "adam", "sgd")

OPTIMIZER = (
    click.option("--optimizer", type=click.Choice(list(OPTIMIZERS)), default="adamw", help="Optimizer."),
    click.option("--weight-decay", type=NOT_NEGATIVE, help="Weight decay.  [default: the optimizer's, 0.01 of adamw]"),
    click.option("--momentum", type=NOT_NEGATIVE, help="Momentum, of sgd and rmsprop.  [default: 0.9 of sgd, else 0]"),
)


def make_optimizer(options: Mapping[str, Any], device: torch.device) -> Callable[..., torch.optim.Optimizer] | None:
    """Return the factory that the options name; None for the trainer's own.

    Args:
        options: of the command.
        device: device of the parameters.

    Raises:
        UserError: a momentum for an optimizer without one, or of 1 and more.
    """
    name = options.get("optimizer", "adamw")
    momentum, decay = options.get("momentum"), options.get("weight_decay")
    if momentum is not None and (name not in MOMENTUM or momentum >= 1.0):
        least = f"below 1, got {momentum}" if name in MOMENTUM else f"of {' and '.join(MOMENTUM)}, not of {name}"
        raise UserError(f"--momentum must be {least}")
    given = {"weight_decay": decay, "momentum": MOMENTUM.get(name) if momentum is None else momentum}
    settings: dict[str, Any] = {option: value for option, value in given.items() if value is not None}
    if name == "adamw" and not settings:
        return None
    if name in FUSED and device.type in ("cpu", "cuda"):
        settings["fused"] = True  # one pass over the parameters
    return partial(_make, OPTIMIZERS[name], settings)


def _make(
    kind: Callable[..., torch.optim.Optimizer], settings: Mapping[str, Any], parameters: Iterable[Any], lr: float
) -> torch.optim.Optimizer:
    return kind(parameters, lr=lr, **settings)
