"""Schedules of a gate's set-point."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparse_training.errors import UserError


@dataclass(frozen=True)
class Ramp:
    """A gate's set-point over a run: ``start`` until ``begin`` of it, then to ``end``, reached at ``finish``.

    Args:
        start, end: rates, or shares of mass, in (0, 1].
        shape: "linear", or "cosine": level at both ends.

    Raises:
        UserError: a value out of range, begin not before finish, an unknown shape.
    """

    start: float
    end: float
    begin: float = 0.0
    finish: float = 1.0
    shape: str = "linear"

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise UserError(f"{name}={getattr(self, name)}; wanted more than 0 and at most 1")
        if not 0.0 <= self.begin < self.finish <= 1.0:
            raise UserError(f"begin={self.begin}, finish={self.finish}; wanted 0 <= begin < finish <= 1")
        if self.shape not in ("linear", "cosine"):
            raise UserError(f"shape={self.shape!r}; wanted linear or cosine")

    def __call__(self, progress: float) -> float:
        """The set-point at ``progress``, 0 to 1."""
        x = min(1.0, max(0.0, (progress - self.begin) / (self.finish - self.begin)))
        if self.shape == "cosine":
            x = 0.5 * (1.0 - math.cos(math.pi * x))
        return self.start + x * (self.end - self.start)
