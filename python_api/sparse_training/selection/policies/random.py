"""Rows drawn uniformly at random."""

from __future__ import annotations

import torch

from sparse_training.selection.policies.drawing import GeneratorPolicy
from sparse_training.selection.types import CandidateIndices, WeightedIndices


class RandomPolicy(GeneratorPolicy):
    """Draws round(rate * B) rows of each batch uniformly, before they are loaded.

    Where that rounds to 0, one row is drawn with probability rate * B.

    Args:
        rate: fraction of the rows to keep, in (0, 1]. Default 0.1.
        seed: seed of the draws. Default 0.
    """

    name = "random"

    @property
    def before_loading(self) -> bool:
        """True: rows left out are never loaded."""
        return True

    @property
    def target(self) -> float:
        """Fraction of rows to keep."""
        return self.rate

    def choose(self, candidates: CandidateIndices) -> WeightedIndices:
        """Draw some of the candidates."""
        rows = len(candidates.ids)
        return WeightedIndices(
            candidates.ids[torch.randperm(rows, generator=self.generator, device="cpu")[: self.count(rows)]]
        )

    def count(self, rows: int) -> int:
        """Number of rows to keep this time of ``rows``."""
        count = round(self.rate * rows)
        return count or int(
            torch.rand((), generator=self.generator, dtype=torch.float64, device="cpu").item() < self.rate * rows
        )
