"""Numbers of the user's."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_training.errors import UserError
from sparse_training.gate.schedules import Weight
from sparse_training.gate.terms.base import Term
from sparse_training.gate.terms.context import Context


class Feedback(Term):
    """A number of the user's for each row, as it is: a reward, a failure flag, a gap between simulation and reality.

    It comes with each call of a gate (``feedback=``) or, under a trainer, from a table by row number. Where there is
    neither, it is the model's own chance of failure, 1 - p[target].

    Args:
        weight: as for ``Term``.
        table: feedback of every row of the data set, finite, of any real dtype or bool, [rows of the data set]. Entries
            may be changed during the run, in the gate's copy: ``gate.terms[i].table``. None (the default) for none.

    Raises:
        UserError: the table is not a tensor of one dimension with finite real values.
    """

    statistics = ("loss",)
    takes_feedback = True
    table: Tensor

    def __init__(self, weight: float | Weight = 1.0, *, table: Tensor | None = None) -> None:
        super().__init__(weight)
        if table is not None:
            check_feedback("`table` of the term Feedback", table, None)
            self.needs = ("index",)
        self.register_buffer("table", torch.empty(0) if table is None else table.detach().float().clone())

    def prepare(self, rows: int | None) -> None:
        """Check that the table has an entry for each of the loader's rows."""
        if rows is not None and self.table.numel() and self.table.shape[0] != rows:
            raise UserError(
                f"`table` of the term Feedback must have {rows} entries, one per row, got {len(self.table)}"
            )

    def check(self, context: Context) -> None:
        """Check the row numbers that the table is read by."""
        if context.feedback is not None:
            return
        if self.table.numel():
            context.row_numbers(self.table.shape[0], self)
        else:
            super().check(context)

    def forward(self, context: Context) -> Tensor:
        """Return the batch's feedback, that of the table, or the chance of failure."""
        if context.feedback is not None:
            return context.feedback.float()
        if not self.table.numel():
            return 1.0 - torch.exp(-context.statistic("loss", self).clamp(min=0.0))
        index = context.index
        assert index is not None
        return self.table.index_select(0, index)


def check_feedback(name: str, values: Tensor, rows: int | None) -> None:
    """Check feedback. Where a look would wait or break a graph, a NaN is found later, as a row never selected.

    Args:
        name: name of the argument, for the message.
        values: the feedback.
        rows: its length; None for any.

    Raises:
        UserError: it is no tensor [rows] of real numbers, or not finite.
    """
    shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
    expected = "one dimension" if rows is None else f"shape [{rows}], one per row"
    if not isinstance(values, Tensor) or values.ndim != 1 or rows not in (None, values.shape[0]):
        raise UserError(f"{name} must be a tensor of {expected}, got {shape}")
    if values.is_complex():
        raise UserError(f"{name} must be real numbers, or bool, got {values.dtype}")
    looks = values.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and not bool(values.isfinite().all()):
        raise UserError(f"{name} must be finite, got {int((~values.isfinite()).sum())} entries that are not")
