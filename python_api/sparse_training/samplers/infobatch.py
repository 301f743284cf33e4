"""InfoBatch (Qin et al., ICLR 2024): random pruning of well-learned rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_kernels.sum_tree import uniform_double
from sparse_training.arguments import check_number
from sparse_training.ranks import gather_numbers
from sparse_training.samplers.score_table import ScoreTable
from sparse_training.selection.types import WeightedIndices

_INFOBATCH = 2 << 48  # separates its random numbers from others of the same seed, as in importance.py


def check_prune(prune: float) -> float:
    """Return the probability of pruning a row, if it is in [0, 1).

    Raises:
        UserError: it is not.
    """
    return check_number("prune", prune, "in [0, 1)", lambda x: 0 <= x < 1)


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


def common_batch(waiting: WeightedIndices, kept: WeightedIndices, size: int) -> tuple[WeightedIndices, WeightedIndices]:
    """Collect kept rows until those of all processes fill a batch of each; all processes call this together.

    Processes keep different numbers of rows. Each gives all that it has, and weights correct for batches that are
    larger than whole ones: divided by their rows, they estimate the sum over rows that a whole batch would be divided
    by.

    Args:
        waiting: rows kept earlier and not yet in a batch.
        kept: rows kept now; they come after those waiting.
        size: number of rows of a whole batch of this process.

    Returns:
        The batch, of at least one row on every process or of none on any, and the rows that go on waiting.
    """
    index = torch.cat((waiting.index, kept.index))
    weight = torch.cat((waiting.weights(), kept.weights()))
    rows, sizes = gather_numbers(len(index), size).unbind(1)
    if int(rows.min()) == 0 or int(rows.sum()) < int(sizes.sum()):
        return no_rows(), WeightedIndices(index, weight)
    return WeightedIndices(index, weight * float(rows.sum() / sizes.sum())), no_rows()


def no_rows() -> WeightedIndices:
    """No rows: the start of ``whole_batch``."""
    return WeightedIndices(
        torch.empty(0, dtype=torch.int64, device="cpu"), torch.empty(0, dtype=torch.float32, device="cpu")
    )


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
        self._pruned, self._news = False, list[str]()

    def begin(self, epoch: int) -> None:
        """Take the threshold of a new epoch; no effect if it is the current one."""
        if epoch != self.epoch:
            self.epoch, self.threshold = epoch, self.table.mean

    def prune(self, index: Tensor, epoch: int, places: Tensor | None = None) -> WeightedIndices:
        """Choose the rows that are kept in an epoch.

        Args:
            index: row numbers, int64 [n].
            epoch: number of the epoch, from 0.
            places: numbers that the draws depend on, int64 [n], each used once in the epoch; for rows that may come
                several times in one. None (the default) for the row numbers.

        Returns:
            The rows kept, in their order, with their weights.
        """
        self.begin(epoch)
        probability = prune_probability(self.table.scores[index], self.threshold, self.probability)
        numbers = index if places is None else places
        keep = uniform_double(numbers, seed=self.seed, step=epoch + _INFOBATCH) >= probability
        if not self._pruned and not keep.all():
            self._pruned = True
            self._news.append(
                f"infobatch: from now on rows whose last loss is below the mean are left out with probability "
                f"{self.probability:g}, and otherwise weigh {1.0 / (1.0 - self.probability):g}; the expected gradient "
                "stays that of all rows"
            )
        return WeightedIndices(index[keep], (1.0 / (1.0 - probability[keep])).float())

    def take_news(self) -> list[str]:
        """Return what has begun since the last call, in sentences."""
        news, self._news = self._news, []
        return news

    def state_dict(self) -> dict[str, Any]:
        """State of the epoch; the table's is its own."""
        return {"epoch": self.epoch, "threshold": self.threshold}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of ``state_dict``."""
        self.epoch, self.threshold = int(state["epoch"]), float(state["threshold"])
