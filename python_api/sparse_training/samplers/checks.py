"""Checks of what a history sampler is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_training.errors import UserError
from sparse_training.gate.checks import check_row_numbers
from sparse_training.samplers.adaptive_weights import check_switches
from sparse_training.user_code import described, explained


def row_numbers(index: Any) -> Tensor:
    """Return row numbers, as a loader or the sampler gave them, as int64 on the CPU.

    Raises:
        UserError: they are no whole numbers in one dimension.
    """
    with explained(lambda: f"`index` must be row numbers, int64 [n], got {described(index)}"):
        rows = index if isinstance(index, Tensor) else torch.as_tensor(np.asarray(index), device="cpu")
    if rows.ndim != 1:
        raise UserError(f"`index` must be row numbers, int64 [n], got {described(rows)}")
    return check_row_numbers(rows.cpu())


def check_effect(method: str, function: Callable[..., Any], given: Mapping[str, float]) -> None:
    """Refuse a setting of another method, which would have no effect.

    Args:
        method: the method.
        function: the function that has the settings, whose defaults are taken for none.
        given: the settings.

    Raises:
        UserError: one is of another method and not its default.
    """
    of_method = {
        "rate": ("importance", "adaptive"), "uniform": ("importance",), "prune": ("infobatch",),
        "delta": ("infobatch",),
    }  # fmt: skip
    defaults = inspect.signature(function).parameters
    for name, methods in of_method.items():
        if method not in methods and given[name] != defaults[name].default:
            raise UserError(f"`{name}` is of the method {' or '.join(methods)}, got {given[name]} with {method}")


def check_needs(method: str, switches: Sequence[str], **given: Any) -> None:
    """Refuse switches of another method or without what they need, and what no switch needs.

    Raises:
        UserError: something is missing or without effect.
    """
    if method != "adaptive":
        extra = [*switches, *(name for name in ("targets", "duplicate_counts") if given[name] is not None)]
        if extra:
            raise UserError(f'`{extra[0]}` needs method="adaptive", got method={method!r}')
        return
    check_switches(switches)
    needs = {"denoise": ("targets",), "deduplicate": ("duplicate_counts",), "balance": ("targets", "epochs")}
    for switch in switches:
        if missing := [name for name in needs[switch] if given[name] is None]:
            raise UserError(f"`{switch}` needs `{missing[0]}`, got none")
    needed = {name for switch in switches for name in needs[switch]}
    for name in ("targets", "duplicate_counts"):
        if given[name] is not None and name not in needed:
            users = " or ".join(switch for switch, names in needs.items() if name in names)
            raise UserError(f"`{name}` needs {users} switched on, got {', '.join(switches)}")
