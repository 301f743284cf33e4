"""Checks of a gate's settings, and of row numbers."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from sparse_training.errors import UserError


def check_number(name: str, value: Any, expected: str, fits: Callable[[float], bool]) -> float:
    """Return a setting as a float, if it is a number that fits.

    Args:
        name: name of the setting, for the message.
        value: its value.
        expected: what the value must be, for the message: "in (0, 1]".
        fits: tells if a number is in range; it must be False for NaN.

    Raises:
        UserError: the value is no number, or does not fit.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not fits(float(value)):
        raise UserError(f"`{name}` must be {expected}, got {value!r}")
    return float(value)


def check_fraction(name: str, value: Any) -> float:
    """Return a setting as a float, if it is a number in (0, 1].

    Raises:
        UserError: it is not.
    """
    return check_number(name, value, "in (0, 1]", lambda x: 0 < x <= 1)


def check_integer(name: str, value: Any) -> int:
    """Return a setting as an int, if it is an integer.

    Raises:
        UserError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(f"`{name}` must be an integer, got {value!r}")
    return int(value)


def check_capacity(value: Any) -> int | None:
    """Return a capacity, if it is None or an integer of at least 1.

    Raises:
        UserError: it is not.
    """
    if value is not None and check_integer("capacity", value) < 1:
        raise UserError(f"`capacity` must be None or at least 1, got {value}")
    return None if value is None else int(value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Return a setting, if it is one of the choices.

    Raises:
        UserError: it is not.
    """
    if value not in choices:
        raise UserError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}")
    return str(value)


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
        raise UserError(f"`index` must be row numbers, int64 or int32, got {index.dtype}")
    return index.long()
