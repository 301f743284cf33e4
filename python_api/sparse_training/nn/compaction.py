"""Compaction in the middle of a network: layers between ``Compact`` and ``Expand`` run on the kept rows alone.

There are two forms, as in ``sparse_kernels.compact``:

- Without a capacity (the default) the packed batch holds the kept rows and nothing else, so every layer is correct as
  it is. Its size depends on the data, which costs one synchronisation a call on an accelerator.
- With a capacity its size is fixed and nothing waits, but the slots behind the kept rows are padding: copies of the
  first of them, or zeros where none is kept. ``Expand`` drops them, and they give no gradient. Layers that treat each
  row by itself (linear, convolution, LayerNorm, GroupNorm, dropout) are correct. A layer that mixes rows is not:
  ``torch.nn.BatchNorm*`` would count the padding in its statistics; ``BatchNorm`` here does not.

In both forms batch statistics are those of the kept rows, not of the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparse_kernels import Selection, compact, gather_rows, scatter_rows
from sparse_training import padding
from sparse_training.arguments import check_integer


class Compact(nn.Module):
    """Packs the rows that a mask keeps.

    Args:
        capacity: number of slots of the packed batch, whatever the mask holds, at least 0; None (the default) for as
            many as the mask keeps.

    Raises:
        UserError: the capacity is out of range.

    Example:
        >>> compact, expand = Compact(), Expand()
        >>> rows, selection = compact(x, mask)  # x [N, ...], mask bool [N]
        >>> x = expand(rows + block(rows), selection, skip=x)  # rows left out bypass the block
    """

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__()
        self.capacity = None if capacity is None else check_integer("capacity", capacity, 0)

    def forward(self, tree: Any, mask: Tensor, weight: Tensor | None = None) -> tuple[Any, Selection]:
        """Pack the rows of every tensor.

        Args:
            tree: nested structure of tensors and arrays with N rows in dim 0, as in ``sparse_kernels.gather_rows``.
            mask: rows to keep, bool [N].
            weight: importance weights of the rows, float32 [N], packed into the selection; None (the default) for 1.

        Returns:
            The tree with the kept rows, in their order, and the selection, which ``Expand`` and ``BatchNorm`` need.

        Raises:
            TypeError: a part of the tree might hold rows and is not known.
            ValueError: the tensors do not fit one another, as in ``sparse_kernels.compact`` and
                ``sparse_kernels.gather_rows``.
        """
        selection = compact(mask, weight=weight, capacity=self.capacity)
        if self.capacity is None:
            return gather_rows(tree, selection), selection
        return padding.take(tree, selection)

    def extra_repr(self) -> str:
        """Settings to print."""
        return f"capacity={self.capacity}"


class Expand(nn.Module):
    """Puts packed rows back in their places: the inverse of ``Compact``."""

    def forward(self, rows: Any, selection: Selection, skip: Tensor | None = None) -> Any:
        """Unpack the rows.

        Args:
            rows: packed rows, [slots, ...], one for each slot of the selection; padding is dropped. Without ``skip``
                also a nested structure of them, as in ``sparse_kernels.scatter_rows``.
            selection: selection of the packed rows, from ``Compact``.
            skip: values of the rows left out, [N, ...]; None (the default) for zeros. Kept rows take nothing from it:
                for a residual connection add it before, as in ``expand(rows + block(rows), selection, skip=x)``.

        Returns:
            All N rows of the batch that the selection was made for, [N, ...]. Rows beyond a capacity count as left out.

        Raises:
            TypeError: ``rows`` is no tensor where there is a ``skip``; a part of it might hold rows and is not known.
            ValueError: ``rows`` or ``skip`` does not fit the selection.
        """
        if skip is None:
            return scatter_rows(rows, selection)
        for name, given in (("rows", rows), ("skip", skip)):
            if not isinstance(given, Tensor):
                raise TypeError(f"`{name}` must be a tensor where there is a `skip`, got {type(given).__name__}")
        shape = (selection.size, *rows.shape[1:])
        if skip.shape != shape or skip.dtype != rows.dtype or skip.device != rows.device:
            raise ValueError(
                f"`skip` must be {rows.dtype} of shape {shape} on {rows.device} for rows of shape {tuple(rows.shape)}, "
                f"got {skip.dtype} of shape {tuple(skip.shape)} on {skip.device}"
            )
        full, kept = scatter_rows((rows, selection.valid()), selection)
        return torch.where(kept.reshape(-1, *[1] * (rows.dim() - 1)), full, skip)
