"""Rows of a batch by their losses alone, as a scorer gives them: the largest, or drawn with weights."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_training.errors import UserError
from sparse_training.selection.policies.base import Policy
from sparse_training.selection.types import Scores, WeightedIndices


class TopKPolicy(Policy):
    """The rows of the largest losses, round(rate * B) of each batch and at least one.

    Biased towards them, on purpose: what is noise or cannot be learned stays on top.
    """

    name = "topk"
    uses_scores = True

    @property
    def target(self) -> float:
        return self.rate

    def decide(self, scores: Scores) -> WeightedIndices:
        losses = scores.losses
        count = min(len(losses), max(1, round(self.rate * len(losses))))
        # A loss that is not a number ranks below all others.
        return WeightedIndices(losses.nan_to_num(-torch.inf).topk(count, sorted=False).indices.sort().values)


class DrawingPolicy(Policy):
    """The base of policies that keep each row of a batch with a probability of its own and weigh it 1/p."""

    uses_scores = True

    def __init__(self, rate: float = 0.1, seed: int = 0) -> None:
        super().__init__(rate, seed)
        self.generator = torch.Generator().manual_seed(seed)

    def probability(self, losses: Tensor) -> Tensor:
        """float32 [B], above 0 and at most 1; of finite losses [B]."""
        raise NotImplementedError

    def decide(self, scores: Scores) -> WeightedIndices:
        losses = scores.losses
        finite = losses.isfinite()
        p = torch.where(finite, self.probability(torch.where(finite, losses, 0.0)), 0.0)
        # Systematic: as many rows as the probabilities add up to, to within one.
        ends = p.cumsum(0, dtype=torch.float64) + torch.rand((), generator=self.generator, dtype=torch.float64).item()
        index = (ends.floor() > (ends - p).floor()).nonzero().squeeze(1)
        return WeightedIndices(index, 1.0 / p[index])

    def get_extra_state(self) -> Tensor:
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state.cpu())


class BatchImportancePolicy(DrawingPolicy):
    """``importance`` within a batch, by what a scorer says of it now: round(rate * B) rows to within one.

    Drawn in proportion to their losses, but for a share of draws that ignore them, none twice.
    """

    name = "importance"

    def __init__(self, rate: float = 0.1, seed: int = 0, uniform: float = 0.1) -> None:
        super().__init__(rate, seed)
        if not 0.0 < uniform <= 1.0:
            raise UserError(f"uniform {uniform}: wanted more than 0, or weights are without bound, and at most 1")
        self.uniform = uniform

    @property
    def target(self) -> float:
        return self.rate

    def probability(self, losses: Tensor) -> Tensor:
        losses = losses.clamp(min=0.0)  # one less a reference's may be below
        count, mean = self.rate * len(losses), losses.mean().clamp(min=1e-30)
        p = (1.0 - self.uniform) * losses / mean + self.uniform
        scale = torch.tensor(self.rate, device=losses.device)
        for _ in range(4):  # what is cut off above 1 goes to the others
            scale = scale * (count / (p * scale).clamp(max=1.0).sum())
        return (p * scale).clamp(max=1.0)

    def likely_rows(self, rows: int) -> range:
        count = max(1, round(self.rate * rows))
        return range(rows, rows + 1) if self.before_loading else range(max(1, count - 1), min(rows, count + 1) + 1)


class BatchInfoBatchPolicy(DrawingPolicy):
    """``infobatch`` within a batch, by what a scorer says of it now.

    Rows whose loss is below the batch's mean are left out with probability ``prune``, or count 1 / (1 - prune).
    The rate follows from the losses; ``rate`` is not used.
    """

    name = "infobatch"

    def __init__(self, rate: float = 1.0, seed: int = 0, prune: float = 0.5) -> None:
        super().__init__(rate, seed)
        if not 0.0 <= prune < 1.0:
            raise UserError(f"prune {prune}: wanted a probability, at least 0 and below 1")
        self.prune = prune

    def probability(self, losses: Tensor) -> Tensor:
        return torch.where(losses < losses.mean(), 1.0 - self.prune, 1.0)

    def likely_rows(self, rows: int) -> range:
        return range(min(rows, max(1, rows // 2)), rows + 1)
