"""The last score of each row of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_kernels.sum_tree import SumTree, assign
from sparse_training.errors import UserError


class ScoreTable:
    """The last score of each of ``rows`` rows: four bytes a row, and an eighth of one for drawing.

    Args:
        rows: of the data set, or of this process's shard of it.
        cpp: see ``sparse_kernels.sum_tree``.
    """

    def __init__(self, rows: int, *, cpp: bool | None = None) -> None:
        if rows < 1:
            raise UserError(f"a table of {rows} rows: wanted at least 1")
        self.scores = torch.full((rows,), torch.nan)  # float32 [rows], NaN before a row's first score
        self.seen = 0  # rows that have a score
        self.invalid = 0  # scores that were refused
        self._tree = SumTree(self.scores, cpp=cpp)

    @property
    def rows(self) -> int:
        return len(self.scores)

    @property
    def total(self) -> float:
        return self._tree.total

    @property
    def mean(self) -> float:
        """Of the rows that have a score; 0 before there is one."""
        return self._tree.total / self.seen if self.seen else 0.0

    def update(self, index: Tensor, scores: Tensor) -> None:
        """Enter the scores of the rows in ``index``.

        Args:
            index: int64 [n]; of a row that is there twice, the last score counts.
            scores: [n], any floating dtype and device; reading them from an accelerator waits for it. A
                negative score counts as 0. One that is not finite is counted in ``invalid``, and its row
                keeps the score that it had.

        Raises:
            UserError: tensors that do not fit one another; IndexError: a row that the table has not.
        """
        index, scores = one_per_row(index, scores, self.rows)
        scores = scores.clamp(min=0.0)
        finite = scores.isfinite()
        if not finite.all():
            self.invalid += int((~finite).sum())
            index, scores = index[finite], scores[finite]
        new = self.scores[index].isnan()
        if new.any():
            self.seen += len(torch.unique(index[new]))
        assign(self.scores, index, scores)
        self._tree.update(index)

    def find(self, points: Tensor) -> Tensor:
        """int64: the rows at points, float64 in [0, 1), of the scores laid end to end."""
        return self._tree.find(points * self._tree.total)

    def age(self, keep: float) -> None:
        """Move every score towards the mean: score = mean + keep * (score - mean), with ``keep`` in [0, 1].

        A score says less of its row the longer ago it was taken. Reads and writes the whole table.
        """
        if not 0.0 <= keep <= 1.0:
            raise UserError(f"keep {keep}: wanted a fraction from 0 to 1")
        self.scores.mul_(keep).add_((1.0 - keep) * self.mean)
        self._tree.build()

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores, "invalid": self.invalid}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copies; the sums are made again, bit for bit what they were."""
        if state["scores"].shape != self.scores.shape:
            raise UserError(f"a table of {len(state['scores'])} rows: wanted one of {self.rows}")
        self.scores.copy_(state["scores"])
        self.seen = self.rows - int(self.scores.isnan().count_nonzero())
        self.invalid = int(state["invalid"])
        self._tree.build()


def one_per_row(index: Tensor, scores: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """int64 [n] and float32 [n], both on the CPU, of scores of rows.

    Raises:
        UserError: not one score a row; IndexError: a row outside 0 to ``rows`` - 1.
    """
    index, scores = index.detach().reshape(-1).cpu(), scores.detach().reshape(-1).float().cpu()
    if index.shape != scores.shape:
        raise UserError(f"{len(scores)} scores for {len(index)} rows: wanted one a row")
    if len(index):
        low, high = index.aminmax()
        if low < 0 or high >= rows:
            raise IndexError(f"rows {int(low)} to {int(high)}: wanted 0 to {rows - 1}")
    return index, scores
