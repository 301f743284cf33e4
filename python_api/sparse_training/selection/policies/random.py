"""Rows at random."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_training.selection.policies.base import Policy
from sparse_training.selection.types import CandidateIndices, WeightedIndices


class RandomPolicy(Policy):
    """round(rate * B) rows of each batch, drawn before loading by a generator of its own.

    Where that rounds to 0, one row with probability rate * B.
    """

    name = "random"

    @property
    def before_loading(self) -> bool:
        return True

    def __init__(self, rate: float = 0.1, seed: int = 0) -> None:
        super().__init__(rate, seed)
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def target(self) -> float:
        return self.rate

    def choose(self, offer: CandidateIndices) -> WeightedIndices:
        rows = len(offer.ids)
        return WeightedIndices(offer.ids[torch.randperm(rows, generator=self.generator)[: self.count(rows)]])

    def count(self, rows: int) -> int:
        """How many of so many rows to keep this time."""
        count = round(self.rate * rows)
        return count or int(torch.rand((), generator=self.generator).item() < self.rate * rows)

    def get_extra_state(self) -> Tensor:
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state.cpu())
