"""Random pruning of well-learned rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_kernels.sum_tree import uniform_double
from sparse_training.errors import UserError
from sparse_training.samplers.score_table import ScoreTable
from sparse_training.selection.types import WeightedIndices

_INFOBATCH = 2 << 48


class InfoBatch:
    """Drops well-learned rows of an epoch at random, and counts the kept ones of them for the dropped.

    A row whose score is below the mean of the table, as it was when the epoch began, is dropped with
    probability ``prune``, or kept with weight 1 / (1 - prune). Other rows, and rows without a score, are
    kept with weight 1. Training ends on every row; that is up to the caller.
    """

    def __init__(self, table: ScoreTable, *, seed: int = 0, prune: float = 0.5) -> None:
        if not 0.0 <= prune < 1.0:
            raise UserError(f"prune {prune}: wanted a probability, at least 0 and below 1")
        self.table, self.seed, self.probability = table, seed, prune
        self.epoch = -1
        self.threshold = 0.0

    def begin(self, epoch: int) -> None:
        """Take the threshold of a new epoch; nothing if it is the current one."""
        if epoch != self.epoch:
            self.epoch, self.threshold = epoch, self.table.mean

    def prune(self, index: Tensor, epoch: int) -> WeightedIndices:
        """The rows of ``index`` that are kept, in their order."""
        self.begin(epoch)
        learned = self.table.scores[index] < self.threshold  # false where there is no score
        chance = uniform_double(index, seed=self.seed, step=epoch + _INFOBATCH)
        keep = ~(learned & (chance < self.probability))
        weight = torch.where(learned, 1.0 / (1.0 - self.probability), 1.0)
        return WeightedIndices(index[keep], weight[keep])

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "threshold": self.threshold}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.threshold = int(state["epoch"]), float(state["threshold"])
