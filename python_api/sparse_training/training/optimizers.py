"""Optimizers by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from sparse_training.arguments import check_choice, check_number
from sparse_training.errors import UserError
from sparse_training.training.checks import check_optimizer
from sparse_training.user_code import explained

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
}
DEFAULT_OPTIMIZER = "adamw"
LEARNING_RATE = 1e-3
MOMENTUM = {"sgd": 0.9, "rmsprop": 0.0}  # defaults of those that have one
FUSED = ("adamw", "adam", "sgd")


def learning_rate(lr: Any, optimizer: Any) -> float:
    """Return the learning rate of an optimizer made here.

    Args:
        lr: as given; None for a partial's own, or the default.
        optimizer: as given: an optimizer, a factory or None.

    Raises:
        UserError: it is out of range, or beside an optimizer or a partial that has its own.
    """
    own = optimizer.keywords.get("lr") if isinstance(optimizer, partial) else None
    if own is not None and lr is not None:
        raise UserError(f"`lr` is of an optimizer made here, got {lr} beside a partial with lr={own}; give one")
    if lr is None and isinstance(own, torch.Tensor):
        return float(own)
    lr = own if lr is None else lr
    if lr is None:
        return LEARNING_RATE
    if isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"`lr` is of an optimizer made here, got {lr} beside one that has its own; give one")
    return check_number("lr", lr, "above 0", lambda x: 0.0 < x < math.inf)


def resolve_optimizer(
    optimizer: Callable[..., torch.optim.Optimizer] | torch.optim.Optimizer | None,
    model: nn.Module,
    lr: float,
    device: torch.device,
) -> torch.optim.Optimizer:
    """Return the optimizer that was given, or make it.

    Args:
        optimizer: an optimizer that was checked, a factory called with (parameters, lr=lr), or None for AdamW.
        model: the model, on its device.
        lr: learning rate of an optimizer made here.
        device: the model's device.

    Raises:
        UserError: no optimizer of the model's, a factory that makes none, or float16 weights for AdamW.
    """
    parameters = list(model.parameters())
    if not parameters:
        raise UserError("`model` must have parameters to train, got none")
    if optimizer is None:
        if any(parameter.requires_grad and parameter.dtype == torch.float16 for parameter in parameters):
            raise UserError(
                "the default optimizer, AdamW, cannot train float16 weights, in which its epsilon is 0; give float32 "
                'weights with TrainerSettings(amp="float16"), or an optimizer'
            )
        if device.type == "xla":  # the count of steps on the device, where a skipped step is undone
            return torch.optim.AdamW(parameters, lr=lr, capturable=True)
        # Fused: one pass over the parameters, in a quarter of the unfused time on a CPU.
        return torch.optim.AdamW(parameters, lr=lr, fused=device.type in ("cpu", "cuda"))
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    with explained(lambda: f"the factory `optimizer` cannot be called with the parameters and lr={lr:g}"):
        made = optimizer(iter(parameters), lr=lr)
    check_optimizer(made, model)
    return made


def unused_rate(optimizer: torch.optim.Optimizer, lr: float) -> str | None:
    """Say that a factory has made no group with the learning rate that it was given; None where it has made one.

    The rates of other groups are the factory's own, such as a tenth of the given one for a backbone.
    """
    rates = [float(rate) for group in optimizer.param_groups if (rate := group.get("lr")) is not None]
    if not rates or any(math.isclose(rate, lr, rel_tol=1e-6) for rate in rates):  # a tensor's may be float32
        return None
    said = " and ".join(f"{rate:g}" for rate in dict.fromkeys(rates))
    return f"the factory `optimizer` was given lr={lr:g} and made an optimizer with {said}, which the run begins with"


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
    check_choice("optimizer", name, tuple(OPTIMIZERS))
    if weight_decay is not None:
        check_number("weight_decay", weight_decay, "at least 0", lambda x: x >= 0)
    if momentum is not None and name not in MOMENTUM:
        raise UserError(f"`momentum` must be of {' and '.join(MOMENTUM)}, not of {name}")
    if momentum is not None:
        check_number("momentum", momentum, "in [0, 1)", lambda x: 0 <= x < 1)
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
