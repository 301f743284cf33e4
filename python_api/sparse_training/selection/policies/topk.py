"""The rows of the largest losses."""

from __future__ import annotations

import torch

from sparse_training.selection.policies.base import Policy
from sparse_training.selection.types import Scores, WeightedIndices


class TopKPolicy(Policy):
    """Keeps the rows of the largest losses, round(rate * B) of each batch and at least one.

    It is biased towards them, on purpose: noise and what cannot be learned stay on top.

    Args:
        rate: fraction of the rows to keep, in (0, 1]. Default 1.
        seed: not used. Default 0.
    """

    name = "topk"
    uses_scores = True

    @property
    def target(self) -> float:
        """Fraction of rows to keep."""
        return self.rate

    def decide(self, scores: Scores) -> WeightedIndices:
        """Rows of the largest scores."""
        losses = scores.losses
        count = min(len(losses), max(1, round(self.rate * len(losses))))
        # A NaN loss ranks below all others.
        return WeightedIndices(losses.nan_to_num(-torch.inf).topk(count, sorted=False).indices.sort().values)
