"""The blocks of keys that a block of queries attends to: its neighbours, the first ones, and the best of the rest.

One top-k makes the choice. Neighbours and global blocks enter it with an infinite score, so a block that is both is
chosen once, and the place that this saves goes to the content. Every block of queries gets the same number of distinct
blocks, whatever the data: shapes are static, and no mask against duplicates is needed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_training.errors import UserError
from sparse_training.nn.blocks import tokens_in_blocks, wide


class Blocks(NamedTuple):
    """Settings of the choice; ``checked_blocks`` makes one of what a user gave."""

    block: int
    local: int
    top: int
    global_blocks: int
    dense_below: int
    summary: bool

    def chosen(self) -> int:
        """Number of blocks that a block of queries attends to."""
        return self.local + self.top + self.global_blocks

    def dense(self, tokens: int) -> bool:
        """True where dense attention serves: a short sequence, or one of no more blocks than are chosen."""
        return tokens < self.dense_below or tokens <= self.chosen() * self.block


def checked_blocks(
    block: int, local: int, top: int, global_blocks: int, dense_below: int | None, *, summary: bool = False
) -> Blocks:
    """Settings as one value.

    Args:
        block: tokens of a block, at least 1.
        local: neighbouring blocks, the query's own among them, at least 1.
        top: blocks chosen by content, at least 0.
        global_blocks: blocks at the start that every query attends to, at least 0.
        dense_below: tokens below which dense attention serves, at least 0; None for 512, or twice the tokens
            attended to where that is more.
        summary: read the means of the blocks that are not chosen. Default False.

    Raises:
        UserError: one is out of its range, or of another type.
    """
    given = {"block": (block, 1), "local": (local, 1), "top": (top, 0), "global_blocks": (global_blocks, 0)}
    if dense_below is not None:
        given["dense_below"] = (dense_below, 0)
    for name, (value, least) in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"`{name}` must be an integer of at least {least}, got {value!r}")
    if dense_below is None:
        dense_below = max(512, 2 * block * (local + top + global_blocks))
    if not isinstance(summary, bool):
        raise UserError(f"`summary` must be True or False, got {summary!r}")
    return Blocks(block, local, top, global_blocks, dense_below, summary)


def choose_blocks(
    q: Tensor, k: Tensor, *, block: int = 64, local: int = 3, top: int = 4, global_blocks: int = 1
) -> Tensor:
    """Choose the blocks of keys that each block of queries attends to, as ``block_sparse_attention`` does.

    A block's score is the product of the mean of its keys and the mean of the queries, per head. No gradient flows
    through the choice.

    Args:
        q: queries, [batch, heads, tokens, width].
        k: keys, of the same shape.
        block: tokens of a block, at least 1. Default 64.
        local: neighbouring blocks, the query's own among them, at least 1. At the ends of the sequence the window is
            shifted, not cut. Default 3.
        top: blocks with the highest scores among the others, at least 0. Default 4.
        global_blocks: blocks at the start of the sequence that every query attends to, at least 0. Default 1.

    Returns:
        Numbers of the chosen blocks, int64 [batch, heads, blocks, chosen], all different in a row and in no order.
        ``blocks`` is tokens / block, rounded up, and ``chosen`` is local + top + global_blocks, or ``blocks`` where
        that is less.

    Raises:
        UserError: tensors or settings that do not fit.
    """
    check_tensors(q=q, k=k)
    blocks = checked_blocks(block, local, top, global_blocks, None)
    mean_q, mean_k = (block_means(in_blocks(x, block), q.shape[2]) for x in (q, k))
    return best_blocks(mean_q, mean_k, blocks)


@torch.no_grad()
def best_blocks(mean_q: Tensor, mean_k: Tensor, blocks: Blocks) -> Tensor:
    """Choose by the means of each block's queries and keys, [batch, heads, blocks, width]."""
    count = mean_q.shape[2]
    place = torch.arange(count, device=mean_q.device)
    scores = mean_q @ mean_k.transpose(-1, -2)
    start = (place - blocks.local // 2).clamp(max=count - blocks.local).clamp(min=0).unsqueeze(-1)
    forced = ((place >= start) & (place < start + blocks.local)) | (place < blocks.global_blocks)
    # A NaN would rank above infinity, and its row would lose its neighbours.
    scores = torch.nan_to_num(scores, nan=0.0, posinf=torch.finfo(scores.dtype).max).masked_fill(forced, torch.inf)
    return scores.topk(min(blocks.chosen(), count), dim=-1, sorted=False).indices


def block_means(x: Tensor, tokens: int) -> Tensor:
    """Mean of each block of [batch, heads, blocks, block, width], of which the last holds padding; at least float32."""
    filled = tokens_in_blocks(x.shape[2], x.shape[3], tokens, x.device).unsqueeze(-1)
    return x.sum(3, dtype=wide(x.dtype)) / filled


def in_blocks(x: Tensor, block: int) -> Tensor:
    """Cut [batch, heads, tokens, width] to [batch, heads, blocks, block, width]; zeros fill the last block."""
    batch, heads, tokens, width = x.shape
    count = -(-tokens // block)
    if count * block != tokens:
        x = F.pad(x, (0, 0, 0, count * block - tokens))
    return x.reshape(batch, heads, count, block, width)


def check_tensors(**tensors: Tensor) -> None:
    """Check that tensors have one shape [batch, heads, tokens, width], one floating dtype and one device.

    Raises:
        UserError: they have not; the message names the first that differs.
    """
    (first_name, first), *others = tensors.items()
    for name, given in tensors.items():
        if not isinstance(given, Tensor):
            raise UserError(f"`{name}` must be a tensor, got {type(given).__name__}")
    if first.dim() != 4 or not first.is_floating_point():
        raise UserError(
            f"`{first_name}` must be a floating-point tensor of shape [batch, heads, tokens, width], "
            f"got {first.dtype} of shape {tuple(first.shape)}"
        )
    if first.shape[3] < 1:
        raise UserError(f"`{first_name}` must have a width of at least 1, got the shape {tuple(first.shape)}")
    for name, other in others:
        if other.shape != first.shape or other.dtype != first.dtype or other.device != first.device:
            raise UserError(
                f"`{name}` must be as `{first_name}`, {first.dtype} of shape {tuple(first.shape)} on {first.device}, "
                f"got {other.dtype} of shape {tuple(other.shape)} on {other.device}"
            )
