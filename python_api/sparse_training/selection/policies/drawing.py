"""The bases of policies that draw the rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_training.generators import further_state
from sparse_training.samplers.resharding import NewRank
from sparse_training.samplers.systematic import draw_systematic
from sparse_training.selection.policies.base import Policy
from sparse_training.selection.types import Scores, WeightedIndices


class GeneratorPolicy(Policy):
    """The base of policies that draw from a generator of their own, which checkpoints hold.

    Args:
        rate: fraction of the rows to keep, in (0, 1]. Default 0.1.
        seed: seed of the draws. Default 0.
    """

    def __init__(self, rate: float = 0.1, seed: int = 0) -> None:
        super().__init__(rate, seed)
        self.generator = torch.Generator().manual_seed(seed)

    def get_extra_state(self) -> Tensor:
        """State of the generator."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Continue from a state of ``get_extra_state``."""
        self.generator.set_state(state.cpu())

    def reshard(self, states: Sequence[Tensor], now: NewRank) -> Tensor:
        """Return the generator's state on the former process of this rank, or one of its own on a further one."""
        return states[now.rank] if now.rank < len(states) else further_state(states[0], now.rank)


class DrawingPolicy(GeneratorPolicy):
    """Keeps each row of a batch with a probability p of its own and weights it 1/p.

    Args:
        rate: fraction of the rows to keep, in (0, 1]. Default 0.1.
        seed: seed of the draws. Default 0.
    """

    uses_scores = True

    def probability(self, losses: Tensor) -> Tensor:
        """Probability of keeping each row: float32 [B], above 0 and at most 1, from finite losses [B]."""
        raise NotImplementedError

    def decide(self, scores: Scores) -> WeightedIndices:
        """Draw rows of the batch; a row whose loss is not finite is never drawn."""
        losses = scores.losses
        finite = losses.isfinite()
        p = torch.where(finite, self.probability(torch.where(finite, losses, 0.0)), 0.0)
        return draw_systematic(p, torch.rand((), generator=self.generator, dtype=torch.float64, device="cpu").item())
