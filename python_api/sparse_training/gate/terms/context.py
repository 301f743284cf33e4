"""All that a term of significance may look at: one batch, as the gate sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_training.errors import UserError


def _alone(sums: Tensor) -> Tensor:
    return sums


@dataclass(frozen=True)
class Context:
    """One batch, for the terms of a significance. Every tensor is on the device, and dim 0 counts the rows.

    Attributes:
        targets: targets, [rows, ...].
        valid: bool [rows], False for rows that do not count.
        statistics: statistics of the logits by name, float [rows]: those that the terms ask for.
        classes: number of classes; 0 where the loss has none.
        index: int64 [rows], row numbers in the data set; None where rows have none. Never positions in a batch.
        inputs: the model's inputs, of whole samples where rows are tokens or pixels; None where the gate was not given
            them.
        embedding: embeddings of the rows, float [rows, width]; None where there are none.
        feedback: numbers of the user's, float [rows]; None where none were given.
        total: sums a tensor over the processes that share the gate; the identity for one process.
    """

    targets: Tensor
    valid: Tensor
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    classes: int = 0
    index: Tensor | None = None
    inputs: Any = None
    embedding: Tensor | None = None
    feedback: Tensor | None = None
    total: Callable[[Tensor], Tensor] = _alone

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.valid.shape[0]

    def row_numbers(self, rows: int, term: object) -> Tensor:
        """Return the row numbers, checked to be within a table.

        On an accelerator, where a look would wait, PyTorch checks them as the table is read.

        Args:
            rows: number of rows of the table.
            term: the term that asks, for the message.

        Raises:
            UserError: a number is below 0, or not below ``rows``.
        """
        index = self.index
        assert index is not None
        if torch.compiler.is_compiling():
            in_range = ((index >= 0) & (index < rows)).all()
            torch._assert_async(in_range, f"`index` must be row numbers from 0 to {rows - 1}")
        elif index.device.type == "cpu" and index.numel():
            least, most = int(index.min()), int(index.max())
            if least < 0 or most >= rows:
                raise UserError(
                    f"`index` of the term {type(term).__name__} must be row numbers from 0 to {rows - 1}, got {least} "
                    f"to {most}"
                )
        return index

    def statistic(self, name: str, term: object) -> Tensor:
        """Look up a statistic of the logits.

        Args:
            name: its name, as in ``sparse_kernels.row_stats``.
            term: the term that asks, for the message.

        Raises:
            UserError: the rows have losses alone, without class logits.
        """
        if name not in self.statistics:
            raise UserError(f"the term {type(term).__name__} needs class logits for {name}, got losses alone")
        return self.statistics[name]

    def mean(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of the valid, finite values over all processes, and their number; float32 scalars on the device."""
        counts = self.valid & values.isfinite()
        sums = self.total(torch.stack((torch.where(counts, values, 0.0).sum().float(), counts.sum().float())))
        return sums[0] / sums[1].clamp(min=1.0), sums[1]
