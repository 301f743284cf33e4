"""InfoBatch (Qin et al., ICLR 2024): random pruning of well-learned rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_kernels.sum_tree import uniform_double
from sparse_training.errors import UserError
from sparse_training.samplers.score_table import ScoreTable
from sparse_training.selection.types import WeightedIndices

_INFOBATCH = 2 << 48  # separates its random numbers from others of the same seed, as in importance.py


def check_prune(prune: float) -> float:
    """Return the probability of pruning a row, if it is in [0, 1).

    Raises:
        UserError: it is not.
    """
    if not 0.0 <= prune < 1.0:
        raise UserError(f"`prune` must be in [0, 1), got {prune}")
    return prune


def prune_probability(scores: Tensor, threshold: Tensor | float, prune: float = 0.5) -> Tensor:
    """Probability with which each row is left out: ``prune`` where the score is below the threshold, otherwise 0.

    A kept row weighs 1 / (1 - probability), so that a weighted sum over the kept rows estimates the sum over all.

    Args:
        scores: scores of the rows, [n]; NaN for a row without one, which is never left out.
        threshold: the mean of the scores, as published, or another number.
        prune: probability of leaving out a well-learned row, in [0, 1). Default 0.5.

    Returns:
        Probabilities: float64 [n].
    """
    return (scores < threshold).double() * prune


def whole_batch(waiting: WeightedIndices, kept: WeightedIndices, size: int) -> tuple[WeightedIndices, WeightedIndices]:
    """Collect kept rows until they fill a batch.

    Args:
        waiting: rows kept earlier and not yet in a batch.
        kept: rows kept now; they come after those waiting.
        size: number of rows of a whole batch.

    Returns:
        The batch, of ``size`` rows or none, and the rows that go on waiting.
    """
    index = torch.cat((waiting.index, kept.index))
    weight = torch.cat((waiting.weights(), kept.weights()))
    count = size if len(index) >= size else 0
    return WeightedIndices(index[:count], weight[:count]), WeightedIndices(index[count:], weight[count:])


def no_rows() -> WeightedIndices:
    """No rows: the start of ``whole_batch``."""
    return WeightedIndices(torch.empty(0, dtype=torch.int64), torch.empty(0))


class InfoBatch:
    """Prunes well-learned rows of an epoch at random, and weights the kept ones of them accordingly.

    A row whose score is below the table's mean, as it was when the epoch began, is left out with probability
    ``prune`` or kept with weight 1 / (1 - prune). Other rows, and rows without a score, are kept with weight 1. The
    published method ends training with epochs of every row; those are left to the caller.

    Args:
        table: scores of the rows; the caller enters them after training on the rows.
        seed: seed of the draws. Default 0.
        prune: probability of leaving out a well-learned row, in [0, 1). Default 0.5.

    Raises:
        UserError: ``prune`` is out of range.
    """

    def __init__(self, table: ScoreTable, *, seed: int = 0, prune: float = 0.5) -> None:
        self.table, self.seed, self.probability = table, seed, check_prune(prune)
        self.epoch = -1
        self.threshold = 0.0

    def begin(self, epoch: int) -> None:
        """Take the threshold of a new epoch; no effect if it is the current one."""
        if epoch != self.epoch:
            self.epoch, self.threshold = epoch, self.table.mean

    def prune(self, index: Tensor, epoch: int) -> WeightedIndices:
        """Rows of ``index`` that are kept in this epoch, in their order, with their weights."""
        self.begin(epoch)
        probability = prune_probability(self.table.scores[index], self.threshold, self.probability)
        keep = uniform_double(index, seed=self.seed, step=epoch + _INFOBATCH) >= probability
        return WeightedIndices(index[keep], (1.0 / (1.0 - probability[keep])).float())

    def state_dict(self) -> dict[str, Any]:
        """State of the epoch; the table's is its own."""
        return {"epoch": self.epoch, "threshold": self.threshold}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of ``state_dict``."""
        self.epoch, self.threshold = int(state["epoch"]), float(state["threshold"])
