"""Schedules of a gate's set-point and of the weights of its significance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_training.arguments import check_integer, check_number
from sparse_training.errors import UserError

Weight = Callable[[float], float]  # maps the fraction of the run that is done, 0 to 1, to a weight


@dataclass(frozen=True)
class Transition:
    """A number, such as a weight, that moves from ``start`` to ``end`` over a part of the run.

    Args:
        start: value until ``begin``, finite.
        end: value from ``finish`` on, finite.
        begin: fraction of the run at which it starts to move, in [0, 1). Default 0.
        finish: fraction of the run at which it arrives, in (0, 1], above ``begin``. Default 1.
        shape: "linear" (the default), or "cosine", which is level at both ends.

    Raises:
        UserError: a value is out of range, or the shape is unknown.

    Example:
        >>> easy_to_hard = Difficulty(Transition(-0.25, 0.25, finish=0.5))
    """

    start: float
    end: float
    begin: float = 0.0
    finish: float = 1.0
    shape: str = "linear"

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            check_number(name, getattr(self, name), self._range, self._fits)
        for name in ("begin", "finish"):
            check_number(name, getattr(self, name), "a finite number", math.isfinite)
        if not 0.0 <= self.begin < self.finish <= 1.0:
            raise UserError(
                f"`begin` and `finish` must satisfy 0 <= begin < finish <= 1, got {self.begin} and {self.finish}"
            )
        if self.shape not in ("linear", "cosine"):
            raise UserError(f"`shape` must be linear or cosine, got {self.shape!r}")

    _range = "finite"

    @staticmethod
    def _fits(value: float) -> bool:
        return math.isfinite(value)

    def __call__(self, progress: float) -> float:
        """Value at a fraction ``progress`` of the run, 0 to 1."""
        x = min(1.0, max(0.0, (progress - self.begin) / (self.finish - self.begin)))
        if self.shape == "cosine":
            x = 0.5 * (1.0 - math.cos(math.pi * x))
        return self.start + x * (self.end - self.start)


@dataclass(frozen=True)
class Ramp(Transition):
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

    _range = "in (0, 1]"

    @staticmethod
    def _fits(value: float) -> bool:
        return 0.0 < value <= 1.0


class Follow(nn.Module):
    """A rate or weight that follows the model's own state: from ``start`` to ``end`` as a loss falls.

    The value is ``start`` at the first loss, and ``end`` once the loss is ``low`` times that. If the loss rises again,
    so does the value: the curriculum adapts itself. State is in buffers of the gate.

    Args:
        signal: "loss", the smoothed loss of the rows that the gate scores, or "validation", the loss of each
            evaluation, which the trainer passes on; in a loop of your own, call ``gate.observe_validation``.
        start: value at the first loss, finite; a rate in (0, 1].
        end: value at a low loss, finite; a rate in (0, 1].
        low: fraction of the first loss at which ``end`` is reached, in [0, 1). Default 0.2.
        memory: share of the smoothed loss that a further loss leaves, in [0, 1). Default 0.95 for "loss", else 0.
        interval: losses between two looks at the smoothed one, at least 1: each look waits for an accelerator.
            Default 20; for "validation" it looks at each.

    Raises:
        UserError: a setting is out of range.

    Example:
        >>> gate = Gate(Follow("loss", 1.0, 0.1))
    """

    first: Tensor
    smoothed: Tensor
    current: Tensor

    def __init__(
        self, signal: str, start: float, end: float, *, low: float = 0.2, memory: float | None = None,
        interval: int = 20,
    ) -> None:  # fmt: skip
        super().__init__()
        if signal not in ("loss", "validation"):
            raise UserError(f"`signal` must be loss or validation, got {signal!r}")
        memory = (0.95 if signal == "loss" else 0.0) if memory is None else memory
        self.signal, self.interval = signal, check_integer("interval", interval, 1)
        self.start, self.end = (check_number(*one, "finite", math.isfinite) for one in (("start", start), ("end", end)))
        self.low, self.memory = (
            check_number(*one, "in [0, 1)", lambda x: 0 <= x < 1) for one in (("low", low), ("memory", memory))
        )
        for name in ("first", "smoothed"):
            self.register_buffer(name, torch.full((), torch.nan))
        # On the host: the value in use, losses taken, and their number at the last look.
        self.register_buffer("current", torch.tensor([start, 0.0, 0.0], dtype=torch.float64))

    def observe(self, loss: Tensor) -> None:
        """Take a loss into the smoothed one, on the device; one that is not finite is left out.

        Args:
            loss: float scalar.
        """
        loss = loss.detach().float()
        begun, fine = self.first.isfinite(), loss.isfinite()
        mixed = torch.where(begun, self.memory * self.smoothed + (1.0 - self.memory) * loss, loss)
        self.first.copy_(torch.where(~begun & fine, loss, self.first))
        self.smoothed.copy_(torch.where(fine, mixed, self.smoothed))
        self.current[1] += 1.0

    def forward(self, progress: float) -> float:
        """Value at the smoothed loss; ``progress`` is not used."""
        value, taken, looked = self.current.tolist()
        if taken - looked >= (self.interval if self.signal == "loss" else 1):
            first, smoothed = float(self.first), float(self.smoothed)  # waits for an accelerator
            if math.isfinite(first) and first > 0.0:
                fallen = min(1.0, max(0.0, (1.0 - smoothed / first) / (1.0 - self.low)))
                value = self.start + fallen * (self.end - self.start)
            self.current.copy_(torch.tensor([value, taken, taken], dtype=torch.float64))
        return float(value)

    def _apply(self, fn: Any, recurse: bool = True) -> Follow:
        current = self.current
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.current = current  # stays on the host, in double precision
        return self

    def extra_repr(self) -> str:
        """Settings that a resumed run must share."""
        return f"{self.signal}, {self.start:g} to {self.end:g}, low={self.low:g}, memory={self.memory:g}"


def schedule_name(weight: Any) -> str:
    """Describe a weight, a number or a schedule, in the same words in every process."""
    return getattr(weight, "__qualname__", None) or repr(weight)
