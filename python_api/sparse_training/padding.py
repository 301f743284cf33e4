"""Padding of packed batches with finite values.

A packed batch of a fixed size repeats row 0 behind the kept rows (``sparse_kernels.compact``), whatever row 0 holds.
If that is NaN or infinite, a weight of 0 does not exclude it: 0 * NaN is NaN in the loss, in the gradient of a layer's
weights and in BatchNorm's statistics. Here padding repeats the first kept row, and where none is kept every slot holds
zeros (integers, such as classes and tokens, stay row 0's: they are finite). Nothing waits for the device, and no shape
depends on the data.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_kernels import Selection, gather_rows
from sparse_kernels.trees import map_rows


def take(tree: Any, selection: Selection) -> tuple[Any, Selection]:
    """Pack the selected rows of every tensor.

    Args:
        tree: nested structure of tensors and arrays, as in ``sparse_kernels.gather_rows``.
        selection: a selection made with a capacity.

    Returns:
        The tree with the packed rows, and the selection of the rows that its slots now hold.

    Raises:
        TypeError: a part of the tree might hold rows and is not known.
        ValueError: the tensors do not fit the selection, as in ``sparse_kernels.gather_rows``.
    """
    index = torch.where(selection.valid(), selection.index, selection.index[:1])
    selection = selection._replace(index=index)
    nothing = selection.count == 0

    def zeroed(rows: Any) -> Any:
        if not isinstance(rows, Tensor):  # an array, whose gathering has waited for the device
            return np.zeros_like(rows) if rows.dtype.kind in "fc" and bool(nothing) else rows
        return rows.masked_fill_(nothing, 0) if rows.is_floating_point() or rows.is_complex() else rows

    return map_rows(gather_rows(tree, selection), zeroed), selection


def zero_row_like(tree: Any) -> Any:
    """Replace every tensor and array by one row of zeros like its rows."""

    def zero_row(rows: Any) -> Any:
        shape = (1, *rows.shape[1:])
        return rows.new_zeros(shape) if isinstance(rows, Tensor) else np.zeros(shape, rows.dtype)

    return map_rows(tree, zero_row)
