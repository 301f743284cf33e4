"""The number of an evaluation that a choice goes by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sparse_training.arguments import check_number
from sparse_training.errors import UserError
from sparse_training.training.callbacks import Run
from sparse_training.training.log import evaluation_numbers

MODES = ("min", "max")
# Ends of names whose direction is known.
LOWER_IS_BETTER = ("loss", "error", "perplexity", "mse", "rmse", "mae")
HIGHER_IS_BETTER = ("accuracy", "acc", "auc", "auroc", "f1", "precision", "recall", "r2")


class Monitor:
    """Best value so far of one number of the evaluations; NaN is never better.

    Args:
        name: name of the number, such as "loss" or "accuracy".
        mode: "min" or "max"; None where the name tells.
        min_delta: smallest difference that counts as better, at least 0.
        owner: name of the callback, in messages.

    Attributes:
        best: best value; None before the first.
        step: its step.

    Raises:
        UserError: a direction that is unknown, or a difference below 0.
    """

    def __init__(self, name: str, mode: str | None, min_delta: float, *, owner: str) -> None:
        if mode is None:
            mode = "min" if name.endswith(LOWER_IS_BETTER) else "max" if name.endswith(HIGHER_IS_BETTER) else None
        if mode not in MODES:
            raise UserError(f"{owner}(`mode`) must be min or max, where {name!r} does not tell it, got {mode!r}")
        self.min_delta = check_number("min_delta", min_delta, "at least 0 and finite", lambda x: 0 <= x < math.inf)
        self.name, self.mode, self.owner = name, mode, owner
        self.best: float | None = None
        self.step = 0

    def check(self, run: Run) -> None:
        """Refuse a run without evaluation.

        Raises:
            UserError: it has none.
        """
        if not run.evaluates:
            raise UserError(f"{self.owner} needs evaluations: give `evaluate` to fit")

    def improved(self, run: Run) -> bool:
        """Take note of the latest evaluation; tell whether it is the best.

        Raises:
            UserError: it has no number of that name.
        """
        numbers = evaluation_numbers(run.status.evaluation)
        if self.name not in numbers:
            raise UserError(f"{self.owner}(`monitor`) must be one of {', '.join(numbers)}, got {self.name!r}")
        value = numbers[self.name]
        if self.best is None:
            better = not math.isnan(value)
        else:
            gain = self.best - value if self.mode == "min" else value - self.best
            better = gain > self.min_delta
        if better:
            self.best, self.step = value, run.status.step
        return better

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers."""
        return {"best": self.best, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self.best, self.step = state["best"], int(state["step"])
