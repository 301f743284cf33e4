"""The phases of a run and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from sparse_training.arguments import check_number
from sparse_training.errors import UserError
from sparse_training.user_code import explained

PHASES = ("warmup", "sparse", "anneal")  # dense start, sparse, dense end: the names that recorded results have
SHAPES = ("cosine", "constant")
LR_WARMUP = 0.02
COMPARED = 1000  # points of two runs' schedules


@dataclass(frozen=True)
class Schedule:
    """Phases of a run (dense start, sparse, dense end), and a learning rate that follows the same progress.

    Args:
        dense_start: fraction of the run that trains on every row at the start, so that scores mean something, in
            [0, 1]. Default 0.05.
        dense_end: fraction that trains on every row at the end, so that rows left out are not forgotten, in [0, 1].
            Default 0.125.
        shape: learning rate: "cosine" to zero or "constant", after a linear rise; or a callable that maps progress
            in [0, 1] to a factor of the learning rate; or a scheduler of PyTorch's, which sets the learning rate
            itself. Default "cosine".
        lr_warmup: fraction of the run over which the learning rate of a named shape rises, in [0, 1]. Default 0.02.

    Raises:
        UserError: fractions outside [0, 1] or adding up to more than 1; an unknown shape.
    """

    dense_start: float = 0.05
    dense_end: float = 0.125
    shape: str | Callable[[float], float] | LRScheduler = "cosine"
    lr_warmup: float = LR_WARMUP

    def __post_init__(self) -> None:
        for name in ("dense_start", "dense_end", "lr_warmup"):
            check_number(name, getattr(self, name), "a fraction in [0, 1]", lambda x: 0.0 <= x <= 1.0)
        if self.dense_start + self.dense_end > 1.0:
            raise UserError(
                f"`dense_start` {self.dense_start} and `dense_end` {self.dense_end} add up to more than 1, "
                "which leaves no sparse phase"
            )
        if isinstance(self.shape, ReduceLROnPlateau):
            raise UserError("`schedule` must be a scheduler that is stepped without a metric, got a ReduceLROnPlateau")
        if isinstance(self.shape, type) and issubclass(self.shape, LRScheduler):
            raise UserError(f"`schedule` must be a scheduler of the optimizer, got the class {self.shape.__name__}")
        if not callable(self.shape) and self.scheduler is None and self.shape not in SHAPES:
            given = repr(self.shape) if isinstance(self.shape, str) else type(self.shape).__name__
            inner = isinstance(getattr(self.shape, "scheduler", None), LRScheduler)  # of Accelerate's wrapper
            raise UserError(
                f"`schedule` must be a scheduler, a callable or one of {', '.join(SHAPES)}, got {given}"
                + ("; give its .scheduler, and the optimizer of that" if inner else "")
            )
        if self.shape not in SHAPES and self.lr_warmup != LR_WARMUP:
            raise UserError(
                f"`lr_warmup` is for the schedules {' and '.join(SHAPES)}, got {self.lr_warmup} with {self.name}"
            )

    @property
    def scheduler(self) -> LRScheduler | None:
        """PyTorch's scheduler, where that sets the learning rate."""
        return self.shape if isinstance(self.shape, LRScheduler) else None

    @property
    def name(self) -> str:
        """Name of the shape, for a checkpoint's settings."""
        shape = self.shape
        if self.scheduler is not None:
            return type(shape).__name__
        if callable(shape):
            return getattr(shape, "__qualname__", type(shape).__name__)
        return str(shape) if self.lr_warmup == LR_WARMUP else f"{shape} after a rise over {self.lr_warmup:g}"

    def phase(self, progress: float) -> str:
        """Return the phase at a progress in [0, 1]: one of PHASES."""
        if progress < self.dense_start:
            return "warmup"
        return "anneal" if progress >= 1.0 - self.dense_end else "sparse"

    def factor(self, progress: float) -> float:
        """Return the learning rate's factor at a progress; the rise starts at 0.1, for a step at 0 is wasted.

        Of a scheduler, which has no factor, it is 1.

        Raises:
            UserError: a callable returns no number, or one below 0 or not finite.
        """
        if self.scheduler is not None:
            return 1.0
        if callable(self.shape):
            with explained(lambda: f"`schedule`, {self.name}, must map progress to a factor"):
                factor = float(self.shape(progress))
            if not 0.0 <= factor < math.inf:
                raise UserError(
                    f"`schedule`, {self.name}, must map progress to a finite factor of at least 0, got {factor} at "
                    f"{progress:g}"
                )
            return factor
        scale = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0))) if self.shape == "cosine" else 1.0
        if progress < self.lr_warmup:
            scale *= 0.1 + 0.9 * progress / self.lr_warmup
        return scale

    def differs(self, once: float, now: float, *, phased: bool) -> bool:
        """Tell whether learning rates or phases until a point differ by how far in a run it is.

        Args:
            once: progress at the point in a shorter run.
            now: progress at the same point in a longer one.
            phased: True to compare phases, too.
        """

        def at(progress: float) -> tuple[float, str]:
            return self.factor(progress), self.phase(progress) if phased else ""

        return any(at(once * point / COMPARED) != at(now * point / COMPARED) for point in range(COMPARED))
