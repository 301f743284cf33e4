"""Checks of a gate's settings, and of row numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_training.arguments import check_integer, check_number
from sparse_training.errors import UserError


def check_capacity(value: Any) -> int | None:
    """Return a capacity, if it is None or an integer of at least 1.

    Raises:
        UserError: it is not.
    """
    return None if value is None else check_integer("capacity", value, 1)


def check_progress(value: Any) -> float:
    """Return a progress, if it is a fraction of the run.

    Raises:
        UserError: it is not, as a number of steps.
    """
    return check_number("progress", value, "the fraction of the run that is done, 0 to 1", lambda x: 0 <= x <= 1)


def check_set_point(name: str, set_point: float, floor: float, p_min: float) -> None:
    """Check that a gate's set-point can be met.

    Args:
        name: "rate" or "grad_norm_fraction", for the message.
        set_point: its value.
        floor: least fraction of the rows that the gate keeps.
        p_min: least probability of keeping a row.

    Raises:
        UserError: the set-point is below the floor, or not above ``p_min``.
    """
    if floor > set_point:
        raise UserError(f"`floor` must be at most `{name}`={set_point}, got {floor}; the {name} could never be met")
    if p_min >= set_point:
        raise UserError(f"`p_min` must be below `{name}`={set_point}, got {p_min}; the {name} could never be met")


def check_combination(
    *, temperature: float, p_min: float, floor: float, decision: str, ties: str, by_grad_norm: bool
) -> None:
    """Check that a gate's settings, each in range, fit one another; the names are those of ``Gate``.

    Raises:
        UserError: they do not.
    """
    if p_min and not temperature:
        raise UserError(f"`p_min`={p_min} needs a temperature; set `temperature` above 0, or `p_min` to 0")
    if floor and temperature:
        raise UserError(
            f"`floor`={floor} cannot be used with `temperature`={temperature}: rows added by a floor have no "
            "probability to be weighted by; use `p_min`, the floor of a drawn selection"
        )
    if temperature and (decision == "topk" or ties == "random"):
        raise UserError(
            f"`temperature`={temperature} cannot be used with decision={decision!r}, ties={ties!r}: drawn rows are not "
            "ranked; use temperature=0"
        )
    if by_grad_norm and (decision == "topk" or floor):
        raise UserError(
            f"`grad_norm_fraction` cannot be used with decision={decision!r}, floor={floor}, which count rows; "
            "use `rate`"
        )


def check_row_numbers(index: Tensor) -> Tensor:
    """Return row numbers as int64, if they are integers.

    Args:
        index: int64 or int32, of any shape; of any dtype if it is empty.

    Raises:
        UserError: they are of another dtype.
    """
    if index.dtype not in (torch.int64, torch.int32) and index.numel():
        raise UserError(
            f"`index` must be row numbers, int64 or int32, got {index.dtype}; Indexed(dataset) makes a loader give them"
        )
    return index.long()
