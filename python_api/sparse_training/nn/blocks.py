"""Shared by the forms of sparse attention: how full the blocks of a sequence are, and the dtype of their sums."""

from __future__ import annotations

import torch
from torch import Tensor


def tokens_in_blocks(blocks: int, block: int, tokens: int, device: torch.device) -> Tensor:
    """Return the number of tokens in each of the first blocks of a sequence, int64 [blocks]; the last may hold padding.

    Args:
        blocks: their number.
        block: tokens of a full block.
        tokens: of the sequence.
        device: of the result.
    """
    return (tokens - torch.arange(blocks, device=device) * block).clamp(max=block)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which tensors of ``dtype`` are summed: at least float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
