"""Rows drawn uniformly at random."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_training.generators import further_state
from sparse_training.samplers.resharding import NewRank
from sparse_training.selection.policies.base import Policy
from sparse_training.selection.types import CandidateIndices, WeightedIndices


class RandomPolicy(Policy):
    """Draws round(rate * B) rows of each batch uniformly, before they are loaded.

    Where that rounds to 0, one row is drawn with probability rate * B.

    Args:
        rate: fraction of the rows to keep, in (0, 1]. Default 0.1.
        seed: seed of the draws. Default 0.
    """

    name = "random"

    def __init__(self, rate: float = 0.1, seed: int = 0) -> None:
        super().__init__(rate, seed)
        self.generator = torch.Generator().manual_seed(seed)

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

    def get_extra_state(self) -> Tensor:
        """State of the generator."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Continue from a state of ``get_extra_state``."""
        self.generator.set_state(state.cpu())

    def reshard(self, states: Sequence[Tensor], now: NewRank) -> Tensor:
        """Return the generator's state on the former process of this rank, or one of its own on a further one."""
        return states[now.rank] if now.rank < len(states) else further_state(states[0], now.rank)
