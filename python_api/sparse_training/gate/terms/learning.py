"""How much a row would teach the model."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_training.arguments import check_integer
from sparse_training.errors import UserError
from sparse_training.gate.schedules import Weight
from sparse_training.gate.terms.base import ScaledTerm, Term
from sparse_training.gate.terms.context import Context

LARGEST = 2.0**0.5  # norm of the gradient of one row's loss in its logits: p - onehot(y)


class LearningValue(Term):
    """Norm of the loss's gradient in the logits (EL2N), over its largest possible value.

    Args:
        weight: as for ``Term``.
    """

    statistics = ("grad_norm",)

    def forward(self, context: Context) -> Tensor:
        """Gradient norms, 0 to 1."""
        return context.statistic("grad_norm", self) / LARGEST


class LossChange(ScaledTerm):
    """Distance of a row's loss from the same row's loss when it was last seen, on its running scale.

    The history is by row number. A row that is seen for the first time is given the scale itself, one half.

    Args:
        weight: as for ``Term``.
        rows: number of rows of the data set, at least 1. None (the default) for what the trainer's loader says.

    Raises:
        UserError: ``rows`` is out of range; at a batch, rows have no numbers, or numbers out of range.
    """

    statistics = ("loss",)
    needs = ("index",)
    per_process = True
    row_buffers = ("last",)
    last: Tensor

    def __init__(self, weight: float | Weight = 1.0, *, rows: int | None = None) -> None:
        super().__init__(weight)
        self.rows = None if rows is None else check_integer("rows", rows, 1)
        self.register_buffer("last", torch.empty(0) if rows is None else torch.full((rows,), torch.nan))

    def prepare(self, rows: int | None) -> None:
        """Make the table for the loader's rows, unless there is one of that size."""
        if rows is not None and self.last.shape[0] != rows:
            if self.last.shape[0]:
                raise UserError(f"the term LossChange has a history of {self.last.shape[0]} rows, got {rows} rows")
            self.last = torch.full((rows,), torch.nan, device=self.last.device)

    def check(self, context: Context) -> None:
        """Check the row numbers."""
        super().check(context)
        if not self.last.shape[0]:
            raise UserError("the term LossChange needs the number of rows; give LossChange(rows=...)")
        context.row_numbers(self.last.shape[0], self)

    def magnitude(self, context: Context) -> Tensor:
        """Absolute change of each row's loss; the losses are kept."""
        loss, index = context.statistic("loss", self), context.index
        assert index is not None
        before = self.last.index_select(0, index)
        change = torch.where(before.isnan() & loss.isfinite(), torch.inf, (loss - before).abs())
        known = context.valid & loss.isfinite()
        self.last.index_copy_(0, index, torch.where(known, loss.float(), before))
        return change
