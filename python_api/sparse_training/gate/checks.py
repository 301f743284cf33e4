"""Checks of a gate's settings."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from sparse_training.errors import UserError


def _number(name: str, value: Any, wanted: str, fits: Callable[[float], bool]) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not fits(float(value)):  # NaN fits nothing
        raise UserError(f"{name}={value!r}; wanted {wanted}")
    return float(value)


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(f"{name}={value!r}; wanted an integer")
    return int(value)


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise UserError(f"{name}={value!r}; wanted one of {', '.join(known)}")
    return str(value)
