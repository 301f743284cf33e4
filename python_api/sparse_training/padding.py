"""Padding of packed batches with finite values.

A packed batch of a fixed size repeats row 0 behind the kept rows (``sparse_kernels.compact``), whatever row 0 holds.
If that is NaN or infinite, a weight of 0 does not exclude it: 0 * NaN is NaN in the loss, in the gradient of a layer's
weights and in BatchNorm's statistics. Here padding repeats the first kept row, and where none is kept every slot holds
zeros (integers, such as classes and tokens, stay row 0's: they are finite). Nothing waits for the device, and no shape
depends on the data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparse_kernels import Selection, gather_rows


def take(tree: Any, selection: Selection) -> tuple[Any, Selection]:
    """Pack the selected rows of every tensor.

    Args:
        tree: nested structure of tensors with ``selection.size`` rows in dim 0.
        selection: a selection made with a capacity.

    Returns:
        The tree with the packed rows, and the selection of the rows that its slots now hold.

    Raises:
        ValueError: the tensors do not fit the selection, as in ``sparse_kernels.gather_rows``.
    """
    index = torch.where(selection.valid(), selection.index, selection.index[:1])
    selection = selection._replace(index=index)
    nothing = selection.count == 0

    def zeroed(rows: Tensor) -> Tensor:
        return rows.masked_fill_(nothing, 0) if rows.is_floating_point() or rows.is_complex() else rows

    return pytree.tree_map_only(Tensor, zeroed, gather_rows(tree, selection)), selection
