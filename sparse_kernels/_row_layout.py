"""Memory layout of the rows that gather and scatter move."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def empty_rows(tensor: Tensor, rows: int) -> Tensor:
    """Allocate ``rows`` rows like those of ``tensor``, in the layout that gather and scatter return.

    Rows follow one another. Within a row the dimensions keep their order in memory if the tensor's rows have no gaps;
    otherwise the result is contiguous.

    Args:
        tensor: the source of shape, dtype and device, [any, ...].
        rows: size of dim 0 of the result.
    """
    shape = rows, *tensor.shape[1:]
    if tensor.is_contiguous() or not rows_are_packed(tensor):
        return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    return torch.empty_strided(
        shape, (math.prod(shape[1:]), *tensor.stride()[1:]), dtype=tensor.dtype, device=tensor.device
    )


def rows_are_packed(tensor: Tensor) -> bool:
    """Return True if each row's elements lie together in memory, in any order of its dimensions.

    Args:
        tensor: at least one dimension; dim 0 counts the rows.
    """
    expected = 1
    for stride, size in sorted(zip(tensor.stride()[1:], tensor.shape[1:], strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
