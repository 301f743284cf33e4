"""Draws in proportion to past scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_kernels.sum_tree import uniform_double
from sparse_training.errors import UserError
from sparse_training.samplers.score_table import ScoreTable
from sparse_training.samplers.shuffle import Shuffle
from sparse_training.selection.types import WeightedIndices

# The laws' and the shuffle's numbers, apart from those that the gate draws with the same seed: in the
# step's high bits, where no run gets.
_IMPORTANCE = 1 << 48


class Importance:
    """Draws rows in proportion to their scores, after every row was drawn once.

    Rows without a score come first, in random order, none twice and with weight 1: that is an epoch as
    any other. From then on a draw takes row i with p = (1 - uniform) * score / total + uniform / rows,
    and its weight is 1 / (rows * p), at most 1 / uniform.

    Args:
        table: of the rows to draw from; whoever trains on them enters their scores.
        uniform: share of draws that ignore the scores, in (0, 1].
    """

    def __init__(self, table: ScoreTable, *, seed: int = 0, uniform: float = 0.1) -> None:
        if not 0.0 < uniform <= 1.0:
            raise UserError(f"uniform {uniform}: wanted more than 0, or weights are without bound, and at most 1")
        self.table, self.seed, self.uniform = table, seed, uniform
        self.step = 0
        self.first = Shuffle(table.rows, seed)  # the pass over rows that have no score yet

    def draw(self, count: int) -> WeightedIndices:
        """``count`` rows."""
        new = self._unseen(count)
        if len(new) == count:
            return WeightedIndices(new, torch.ones(count))
        index = self._by_score(count - len(new))
        return WeightedIndices(torch.cat((new, index)), torch.cat((torch.ones(len(new)), self.weight(index))))

    def weight(self, index: Tensor) -> Tensor:
        """float32 [n]: 1 / (rows * p) of the rows in ``index``."""
        uniform, total = self._uniform(), self.table.total
        # float64: the mean of 100 million scores over one of them, to the last bit of a float32.
        scores = self.table.scores[index].double().nan_to_num(0.0)
        relative = scores * (self.table.rows / total) if total > 0.0 else scores
        return (1.0 / (relative * (1.0 - uniform) + uniform)).float()

    def _uniform(self) -> float:
        return self.uniform if self.table.total > 0.0 else 1.0

    def _unseen(self, count: int) -> Tensor:
        found: list[Tensor] = []
        while count and len(ahead := self.first.peek()):
            places = self.table.scores[ahead].isnan().nonzero().squeeze(1)[:count]
            found.append(ahead[places])
            count -= len(places)
            self.first.position += int(places[-1]) + 1 if not count else len(ahead)
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)

    def _by_score(self, count: int) -> Tensor:
        slot = torch.arange(count)
        point = (slot + uniform_double(slot, seed=self.seed, step=self.step + _IMPORTANCE)) / count
        self.step += 1
        uniform = self._uniform()
        split = int((point < uniform).sum())  # points ascend
        anywhere = (point[:split] / uniform * self.table.rows).long().clamp_(max=self.table.rows - 1)
        return torch.cat((anywhere, self.table.find((point[split:] - uniform) / (1.0 - uniform))))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "first": self.first.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.first.position = int(state["step"]), int(state["first"])
