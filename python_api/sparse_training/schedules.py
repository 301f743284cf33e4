"""What depends on how far a run has come: its phase and its learning rate.

Progress is a fraction in [0, 1] of the run's budget (steps, rows or seconds of the clock), never a number of
epochs: arms that take different numbers of steps in the same time still go through the same schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sparse_training.errors import UserError

PHASES = ("warmup", "sparse", "anneal")
SHAPES = ("cosine", "constant")


@dataclass(frozen=True)
class Schedule:
    """Dense warm-up, sparse training, dense anneal; a learning rate that follows the same progress.

    Args:
        warmup: fraction of the run trained on every row at the start, so that scores mean something.
        anneal: fraction trained on every row at the end, so that what was left out is not forgotten.
        shape: "cosine" to zero or "constant", after a linear rise over the first ``rise`` of the run; or the whole
            course, a callable of the progress that gives the learning rate's factor.

    Raises:
        UserError: fractions outside [0, 1] or adding up to more than 1; an unknown shape.
    """

    warmup: float = 0.05
    anneal: float = 0.125
    shape: str | Callable[[float], float] = "cosine"
    rise: float = 0.02

    def __post_init__(self) -> None:
        for name in ("warmup", "anneal", "rise"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise UserError(f"{name} {value}: wanted a fraction from 0 to 1")
        if self.warmup + self.anneal > 1.0:
            raise UserError(
                f"warmup {self.warmup} and anneal {self.anneal} add up to more than 1: nothing is left to gate"
            )
        if not callable(self.shape) and self.shape not in SHAPES:
            raise UserError(f"schedule {self.shape!r}: wanted {', '.join(SHAPES)} or a callable")

    @property
    def name(self) -> str:
        """Of the shape, for a checkpoint's settings."""
        shape = self.shape
        return getattr(shape, "__qualname__", type(shape).__name__) if callable(shape) else shape

    def phase(self, progress: float) -> str:
        """One of PHASES."""
        if progress < self.warmup:
            return "warmup"
        return "anneal" if progress >= 1.0 - self.anneal else "sparse"

    def factor(self, progress: float) -> float:
        """What the learning rate is multiplied by; the rise starts at 0.1, for a step at 0 is wasted."""
        if callable(self.shape):
            return float(self.shape(progress))
        scale = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0))) if self.shape == "cosine" else 1.0
        if progress < self.rise:
            scale *= 0.1 + 0.9 * progress / self.rise
        return scale


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
