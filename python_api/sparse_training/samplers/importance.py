"""Importance sampling: rows drawn in proportion to their scores, mixed with uniform draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_kernels.sum_tree import uniform_double
from sparse_training.arguments import check_fraction
from sparse_training.samplers.score_table import ScoreTable
from sparse_training.samplers.shuffle import Shuffle
from sparse_training.selection.types import WeightedIndices

# Separates these random numbers from those that the gate draws with the same seed: in the step's high bits, which no
# run's step count reaches.
_IMPORTANCE = 1 << 48


def check_uniform(uniform: float) -> float:
    """Return the share of uniform draws, if it is in (0, 1].

    Raises:
        UserError: it is not.
    """
    return check_fraction("uniform", uniform)  # at 0 importance weights would be unbounded


def relative_probability(scores: Tensor, mean: Tensor | float, uniform: float) -> Tensor:
    """Probability of each row relative to a uniform draw: (1 - uniform) * score / mean + uniform.

    Its mean over the rows that ``mean`` is of is 1. One draw among n rows takes a row with the n-th part of it, and
    its inverse is the row's importance weight.

    Args:
        scores: finite scores of rows, at least 0, any shape and floating dtype.
        mean: mean score of all rows to draw from, at least 0.
        uniform: share of draws that ignore the scores, in (0, 1].

    Returns:
        Relative probabilities, at least ``uniform``, of the scores' shape and dtype.
    """
    mean = mean.clamp(min=1e-30) if isinstance(mean, Tensor) else max(mean, 1e-30)
    return (1.0 - uniform) * scores / mean + uniform


def inclusion_probability(losses: Tensor, rate: float, uniform: float = 0.1) -> Tensor:
    """Probability with which each row of a batch is kept, in proportion to its loss.

    Args:
        losses: finite losses of the rows, floating [B]. A negative one counts as 0.
        rate: fraction of the rows to keep, in (0, 1]: the probabilities' mean.
        uniform: share of draws that ignore the losses, in (0, 1]. Default 0.1.

    Returns:
        Probabilities, [B], above 0 and at most 1; ``draw_systematic`` draws by them.
    """
    losses = losses.clamp(min=0.0)  # less a reference's loss, one may be negative
    count = rate * len(losses)
    p = relative_probability(losses, losses.mean(), uniform)
    scale = torch.tensor(rate, device=losses.device)
    for _ in range(4):  # hands what is cut off above 1 to the other rows
        scale = scale * (count / (p * scale).clamp(max=1.0).sum())
    return (p * scale).clamp(max=1.0)


class Importance:
    """Draws rows in proportion to their scores, once every row was drawn.

    Rows without a score come first, in random order, without repetition and with weight 1: an ordinary epoch. From
    then on a draw takes row i with probability p = (1 - uniform) * score / total + uniform / rows, and its weight is
    1 / (rows * p), at most 1 / uniform.

    Args:
        table: scores of the rows to draw from; the caller enters them after training on the rows.
        seed: seed of the draws. Default 0.
        uniform: share of draws that ignore the scores, in (0, 1]. Default 0.1.

    Raises:
        UserError: ``uniform`` is out of range.
    """

    def __init__(self, table: ScoreTable, *, seed: int = 0, uniform: float = 0.1) -> None:
        self.table, self.seed, self.uniform = table, seed, check_uniform(uniform)
        self.step = 0
        self.first = Shuffle(table.rows, seed)  # the pass over rows that have no score yet

    def draw(self, count: int) -> WeightedIndices:
        """Draw ``count`` rows with their importance weights."""
        new = self._unseen(count)
        if len(new) == count:
            return WeightedIndices(new, torch.ones(count, dtype=torch.float32, device="cpu"))
        index = self._by_score(count - len(new))
        return WeightedIndices(
            torch.cat((new, index)),
            torch.cat((torch.ones(len(new), dtype=torch.float32, device="cpu"), self.weight(index))),
        )

    def weight(self, index: Tensor) -> Tensor:
        """Importance weights 1 / (rows * p) of the rows in ``index``: float32 [n]."""
        # float64: exact to the last bit of a float32 for the mean of 100 million scores over one of them.
        scores = self.table.scores[index].double().nan_to_num(0.0)
        return (1.0 / relative_probability(scores, self.table.total / self.table.rows, self._uniform())).float()

    def _uniform(self) -> float:
        return self.uniform if self.table.total > 0.0 else 1.0

    def _unseen(self, count: int) -> Tensor:
        found: list[Tensor] = []
        while count and len(ahead := self.first.peek()):
            places = self.table.scores[ahead].isnan().nonzero().squeeze(1)[:count]
            found.append(ahead[places])
            count -= len(places)
            self.first.position += int(places[-1]) + 1 if not count else len(ahead)
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device="cpu")

    def _by_score(self, count: int) -> Tensor:
        slot = torch.arange(count, device="cpu")
        point = (slot + uniform_double(slot, seed=self.seed, step=self.step + _IMPORTANCE)) / count
        self.step += 1
        uniform = self._uniform()
        split = int((point < uniform).sum())  # points ascend
        anywhere = (point[:split] / uniform * self.table.rows).long().clamp_(max=self.table.rows - 1)
        return torch.cat((anywhere, self.table.find((point[split:] - uniform) / (1.0 - uniform))))

    def state_dict(self) -> dict[str, Any]:
        """State of the draws; the table's is its own."""
        return {"step": self.step, "first": self.first.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of ``state_dict``."""
        self.step, self.first.position = int(state["step"]), int(state["first"])
