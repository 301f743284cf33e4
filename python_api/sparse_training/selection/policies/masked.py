"""The original system's step, for comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_training.evaluation import forward
from sparse_training.selection.policies.base import Policy
from sparse_training.selection.types import Batch, Scores, SelectedBatch


class MaskedPolicy(Policy):
    """The original system's step, for comparison only: it saves no work.

    All rows go forward twice, the first time to be scored, and backward once. Rows that are not selected are masked
    out of the loss, which is divided by the number selected. That is four thirds of a dense step's work, whatever the
    rate. As in the original, scoring is in training mode and float32, so it moves BatchNorm's statistics; and the
    controller (``OriginalController``) waits for the device in every step and cannot reach every rate. The original's
    other settings are Adam at 1e-3 and ``clip_norm=1``.

    Args:
        rate: fraction of the rows to select, in (0, 1]. Default 0.4.
        seed: not used. Default 0.
    """

    name = "masked"
    uses_scores = True
    masks = True

    def __init__(self, rate: float = 0.4, seed: int = 0) -> None:
        super().__init__(rate, seed)
        self.controller = OriginalController(self.rate)
        self.clamped, self.steps = 0, 0

    @property
    def target(self) -> float:
        """Fraction of rows to select."""
        return self.rate

    def score(self, batch: Batch) -> Scores:
        """Score the batch in training mode."""
        with torch.no_grad():
            return Scores(
                batch.targets,
                self.scorer.criterion,
                logits=forward(self.scorer.model, batch.inputs, self.scorer.criterion),
            )

    def select(self, scores: Scores | None, batch: Batch) -> SelectedBatch:
        """Select rows above the threshold; the others stay in the batch with weight 0."""
        assert scores is not None
        p = scores.logits.softmax(-1)
        entropy = -(p * (p + 1e-8).log()).sum(-1)
        significance = 0.7 * scores.losses + 0.3 * entropy
        mask = significance > float(self.controller.threshold)
        least = self.controller.least(batch.rows)
        if int(mask.sum()) < least:
            mask = torch.zeros_like(mask).index_fill_(0, significance.topk(min(least, batch.rows)).indices, True)
        count = int(mask.sum())
        self.controller.observe(count / batch.rows)
        self.steps += 1
        self.clamped += not 0.5 < self.controller.threshold < 10.0
        everything = torch.arange(batch.rows, device=mask.device)
        return SelectedBatch(batch.inputs, batch.targets, count, everything, mask.float(), max(count, 1))

    def trace(self) -> tuple[Tensor, ...]:
        """Smoothed rate and threshold."""
        return torch.tensor(float(self.controller.rate)), torch.tensor(float(self.controller.threshold))

    def warnings(self, rate: float | None) -> list[str]:
        """Warn that the step saves nothing, and of a clamped threshold."""
        found = ["masked is the original system's step, for comparison only: every row goes forward twice and backward"]
        if self.clamped:
            found.append(f"masked's threshold was at its clamp in {self.clamped} of {self.steps} steps")
        return found

    def get_extra_state(self) -> dict[str, Any]:
        """State of the controller."""
        return {"law": [float(value) for value in vars(self.controller).values()], "counts": (self.clamped, self.steps)}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of ``get_extra_state``."""
        self.controller = OriginalController(*state["law"])
        self.clamped, self.steps = state["counts"]


@dataclass
class OriginalController:
    """The original system's controller of a clamped threshold.

    It is fed the rate after the fallback to the most significant tenth of the rows.

    Args:
        target: rate to reach, in (0, 1]: a number, or an array of them for as many controllers.
        threshold: current threshold, of the target's shape. Default 3.
        integral: current integral of the error, of the target's shape. Default 0.
        rate: current smoothed rate, of the target's shape; None (the default) for the target.
    """

    target: Any
    threshold: Any = 3.0
    integral: Any = 0.0
    rate: Any = None

    def __post_init__(self) -> None:
        self.rate = self.target if self.rate is None else self.rate

    @staticmethod
    def least(rows: int) -> int:
        """Least number of rows kept of a batch: the most significant ones."""
        return max(2, rows // 10)

    def observe(self, kept: Any) -> None:
        """Move the threshold by the fraction kept of a batch, of the target's shape."""
        self.rate = 0.1 * kept + 0.9 * self.rate
        error = self.rate - self.target
        inside = (self.threshold > 0.5) & (self.threshold < 10)
        self.integral = np.where(inside, np.clip(self.integral + error, -100, 100), 0.9 * self.integral)
        self.threshold = np.clip(self.threshold + 0.005 * error + 0.0001 * self.integral, 0.5, 10)
