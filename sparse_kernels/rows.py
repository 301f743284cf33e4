"""How the rows that gather and scatter move lie in memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def empty_rows(tensor: Tensor, rows: int) -> Tensor:
    """Unwritten memory for ``rows`` rows like those of ``tensor``, in the layout that gather and scatter give:
    rows one after the other, each laid out as the tensor's are where these have no gaps, else contiguous."""
    shape = rows, *tensor.shape[1:]
    if tensor.is_contiguous() or not rows_are_packed(tensor):
        return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    return torch.empty_strided(
        shape, (math.prod(shape[1:]), *tensor.stride()[1:]), dtype=tensor.dtype, device=tensor.device
    )


def rows_are_packed(tensor: Tensor) -> bool:
    """Whether each row's elements lie together, in any order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride()[1:], tensor.shape[1:], strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
