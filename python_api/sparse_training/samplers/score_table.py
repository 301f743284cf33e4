"""The last score of each row of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_kernels.sum_tree import SumTree, assign
from sparse_training.arguments import check_integer, check_number
from sparse_training.errors import UserError
from sparse_training.gate.checks import check_row_numbers


class ScoreTable:
    """The last score of each row: four bytes a row, and an eighth of a byte once rows are drawn by it.

    Args:
        rows: number of rows of the data set, or of this process's shard of it, at least 1.
        signed: keep negative scores. False (the default) enters them as 0; a signed table has no ``total``, ``mean``
            or ``find``.
        cpp: whether the C++ sum tree is used, see ``sparse_kernels.sum_tree``; None (the default) for where it was
            built.

    Attributes:
        scores: float32 [rows], on the CPU; NaN before a row's first score.
        seen: number of rows that have a score.
        invalid: number of scores that were not finite, and so were not entered.

    Raises:
        UserError: ``rows`` is below 1.
    """

    def __init__(self, rows: int, *, signed: bool = False, cpp: bool | None = None) -> None:
        check_integer("rows", rows, 1)
        self.scores = torch.full((rows,), torch.nan, dtype=torch.float32, device="cpu")
        self.seen = 0
        self.invalid = 0
        self._tree = None if signed else SumTree(self.scores, cpp=cpp)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.scores)

    @property
    def tree(self) -> SumTree:
        """Partial sums of the scores."""
        assert self._tree is not None, "a signed table has no sums"
        return self._tree

    @property
    def total(self) -> float:
        """Sum of the scores."""
        return self.tree.total

    @property
    def mean(self) -> float:
        """Mean score of the rows that have one; 0 before there is one."""
        return self.total / self.seen if self.seen else 0.0

    def update(self, index: Tensor, scores: Tensor) -> None:
        """Enter the scores of the rows in ``index``.

        Args:
            index: row numbers, int64 [n]; if a row occurs twice, its last score counts.
            scores: scores, [n], of any floating dtype and device; reading them from an accelerator waits for it. One
                that is not finite is counted in ``invalid``, and its row keeps the score that it had.

        Raises:
            UserError: the tensors do not fit one another.
            IndexError: the table has no such row.
        """
        index, scores = one_per_row(index, scores, self.rows)
        if self._tree is not None:
            scores = scores.clamp(min=0.0)
        finite = scores.isfinite()
        if not finite.all():
            self.invalid += int((~finite).sum())
            index, scores = index[finite], scores[finite]
        new = self.scores[index].isnan()
        if new.any():
            self.seen += len(torch.unique(index[new]))
        assign(self.scores, index, scores)
        if self._tree is not None:
            self._tree.update(index)

    def find(self, points: Tensor) -> Tensor:
        """Row numbers (int64) at points, float64 in [0, 1), of the scores laid end to end."""
        return self.tree.find(points * self.total)

    def age(self, keep: float) -> None:
        """Move every score towards the mean, for the longer ago a score was taken, the less it says of its row.

        Reads and writes the whole table.

        Args:
            keep: factor of each score's distance from the mean, in [0, 1].

        Raises:
            UserError: ``keep`` is out of range.
        """
        check_number("keep", keep, "in [0, 1]", lambda x: 0 <= x <= 1)
        self.scores.mul_(keep).add_((1.0 - keep) * self.mean)
        self.tree.build()

    def state_dict(self) -> dict[str, Any]:
        """The scores in use, not a copy, and the number of invalid ones."""
        return {"scores": self.scores, "invalid": self.invalid}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy a state of ``state_dict``; the sums are recomputed, bit for bit what they were.

        Raises:
            UserError: the state has another number of rows.
        """
        if state["scores"].shape != self.scores.shape:
            raise UserError(f"the state must be of a table of {self.rows} rows, got {len(state['scores'])}")
        self.scores.copy_(state["scores"])
        self.seen = self.rows - int(self.scores.isnan().count_nonzero())
        self.invalid = int(state["invalid"])
        if self._tree is not None:
            self._tree.build()


def one_per_row(index: Tensor, scores: Any, rows: int) -> tuple[Tensor, Tensor]:
    """Row numbers and scores, checked, flattened and brought to the CPU.

    Args:
        index: row numbers, [n].
        scores: one score for each of them, [n].
        rows: number of rows that there are.

    Returns:
        int64 [n] and float32 [n].

    Raises:
        UserError: not one real score a row, or row numbers that are no integers.
        IndexError: a row outside 0 to ``rows`` - 1.
    """
    if not isinstance(scores, Tensor):  # a list or an array
        scores = torch.as_tensor(scores, device="cpu")
    if scores.is_complex():
        raise UserError(f"`scores` must be real numbers, got {scores.dtype}")
    index = check_row_numbers(index.detach().reshape(-1).cpu())
    scores = scores.detach().reshape(-1).float().cpu()
    if index.shape != scores.shape:
        raise UserError(f"`scores` must hold one score for each row, got {len(scores)} scores for {len(index)} rows")
    if len(index):
        low, high = index.aminmax()
        if low < 0 or high >= rows:
            raise IndexError(f"row numbers must be in 0 to {rows - 1}, got {int(low)} to {int(high)}")
    return index, scores
