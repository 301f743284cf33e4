"""Checks of arguments: each returns the value that fits, or refuses it in one line."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

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


def check_positive(name: str, value: Any) -> float:
    """Return a setting as a float, if it is a number above 0 and finite.

    Raises:
        UserError: it is not.
    """
    return check_number(name, value, "above 0 and finite", lambda x: 0 < x < math.inf)


def check_integer(name: str, value: Any, least: int | None = None) -> int:
    """Return a setting as an int, if it is an integer of at least ``least``; None (the default) for any integer.

    Raises:
        UserError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or (least is not None and value < least):
        expected = "an integer" if least is None else f"an integer of at least {least}"
        raise UserError(f"`{name}` must be {expected}, got {value!r}")
    return int(value)


def check_count(name: str, value: Any) -> int:
    """Return a setting as an int, if it is a whole number of at least 1.

    Raises:
        UserError: it is not.
    """
    whole = isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or value < 1:
        raise UserError(f"`{name}` must be a whole number, at least 1, got {value!r}")
    return int(value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Return a setting, if it is one of the choices.

    Raises:
        UserError: it is not.
    """
    if value not in choices:
        raise UserError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}")
    return str(value)
