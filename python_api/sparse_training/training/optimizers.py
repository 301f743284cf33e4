"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch

from sparse_training.errors import UserError

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
}
DEFAULT_OPTIMIZER = "adamw"
MOMENTUM = {"sgd": 0.9, "rmsprop": 0.0}  # defaults of those that have one
FUSED = ("adamw", "adam", "sgd")


def make_optimizer(
    name: str, *, weight_decay: float | None, momentum: float | None, device: torch.device
) -> Callable[..., torch.optim.Optimizer] | None:
    """Return a factory of the optimizer; None for the trainer's own.

    Args:
        name: key in ``OPTIMIZERS``.
        weight_decay: weight decay, at least 0; None for the optimizer's default.
        momentum: momentum in [0, 1), of those that have one; None for the default in ``MOMENTUM``.
        device: device of the parameters.

    Raises:
        UserError: an unknown name, a momentum for an optimizer without one, or a value out of range.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"`optimizer` must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
    if weight_decay is not None and not weight_decay >= 0.0:
        raise UserError(f"`weight_decay` must be at least 0, got {weight_decay}")
    if momentum is not None and name not in MOMENTUM:
        raise UserError(f"`momentum` must be of {' and '.join(MOMENTUM)}, not of {name}")
    if momentum is not None and not 0.0 <= momentum < 1.0:
        raise UserError(f"`momentum` must be at least 0 and below 1, got {momentum}")
    given = {"weight_decay": weight_decay, "momentum": MOMENTUM.get(name) if momentum is None else momentum}
    settings: dict[str, Any] = {option: value for option, value in given.items() if value is not None}
    if name == DEFAULT_OPTIMIZER and not settings:
        return None
    if name in FUSED and device.type in ("cpu", "cuda"):
        settings["fused"] = True  # one pass over the parameters
    return partial(_make, OPTIMIZERS[name], settings)


def _make(
    kind: Callable[..., torch.optim.Optimizer], settings: Mapping[str, Any], parameters: Iterable[Any], lr: float
) -> torch.optim.Optimizer:
    return kind(parameters, lr=lr, **settings)
