"""Schedules of a gate's set-point."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparse_training.errors import UserError


@dataclass(frozen=True)
class Ramp:
    """A set-point that moves from ``start`` to ``end`` over a part of the run.

    Args:
        start: set-point until ``begin``: a rate or a grad-norm fraction, in (0, 1].
        end: set-point from ``finish`` on, in (0, 1].
        begin: fraction of the run at which it starts to move, in [0, 1). Default 0.
        finish: fraction of the run at which it arrives, in (0, 1], above ``begin``. Default 1.
        shape: "linear" (the default), or "cosine", which is level at both ends.

    Raises:
        UserError: a value is out of range, or the shape is unknown.

    Example:
        >>> gate = Gate(Ramp(1.0, 0.1, finish=0.5))
        >>> for step in range(steps):
        ...     gate.set_progress(step / steps)
    """

    start: float
    end: float
    begin: float = 0.0
    finish: float = 1.0
    shape: str = "linear"

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise UserError(f"`{name}` must be in (0, 1], got {getattr(self, name)}")
        if not 0.0 <= self.begin < self.finish <= 1.0:
            raise UserError(
                f"`begin` and `finish` must satisfy 0 <= begin < finish <= 1, got {self.begin} and {self.finish}"
            )
        if self.shape not in ("linear", "cosine"):
            raise UserError(f"`shape` must be linear or cosine, got {self.shape!r}")

    def __call__(self, progress: float) -> float:
        """Set-point at a fraction ``progress`` of the run, 0 to 1."""
        x = min(1.0, max(0.0, (progress - self.begin) / (self.finish - self.begin)))
        if self.shape == "cosine":
            x = 0.5 * (1.0 - math.cos(math.pi * x))
        return self.start + x * (self.end - self.start)
