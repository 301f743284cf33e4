"""Attention that reads a fixed number of keys a query: neighbours, global tokens, and those that content picks."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_training.announcements import announce
from sparse_training.errors import UserError
from sparse_training.nn.block_attention import attend
from sparse_training.nn.block_choice import Blocks, best_blocks, check_tensors, checked_blocks, in_blocks


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = 64,
    local: int = 3,
    top: int = 4,
    global_blocks: int = 1,
    dense_below: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Self-attention of each block of queries to ``local + top + global_blocks`` blocks of keys.

    Time and memory grow in proportion to the number of tokens; those of the choice alone grow with the square of the
    number of blocks. It is ``torch.nn.functional.scaled_dot_product_attention`` where every block is chosen.

    Dense attention serves sequences shorter than ``dense_below``, where it is faster, and those of no more blocks than
    are chosen, where it is the same. ``attends_densely`` says so in advance.

    The choice has no gradient: ``choose_blocks`` and the notes on sparse attention in the documentation say how it is
    made, and why queries and keys learn to be chosen all the same. There is no mask and no dropout, and queries in
    global blocks see no more keys than others.

    Args:
        q: queries, floating point, [batch, heads, tokens, width]; any number of tokens.
        k: keys, of the same shape, dtype and device.
        v: values, of the same shape, dtype and device.
        block: tokens of a block, at least 1. Default 64.
        local: neighbouring blocks, the query's own among them, at least 1. At the ends of the sequence the window is
            shifted, not cut. Default 3.
        top: blocks chosen by content for each block of queries and each head, at least 0. Default 4.
        global_blocks: blocks at the start of the sequence that every query attends to, at least 0. Default 1.
        dense_below: number of tokens below which dense attention serves, at least 0. None (the default) for twice the
            keys that a query attends to, but no less than 512: 1,024 with the other defaults.
        scale: factor of the products of queries and keys; None (the default) for 1 / sqrt(width).

    Returns:
        The weighted values, of the shape and dtype of ``q``; under ``torch.autocast`` of its dtype.

    Raises:
        UserError: tensors or settings that do not fit.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 4096, 64)  # of 2 sequences and 4 heads
        >>> y = block_sparse_attention(q, k, v)  # every query sees 512 of 4,096 keys
    """
    check_tensors(q=q, k=k, v=v)
    return _attention(q, k, v, checked_blocks(block, local, top, global_blocks, dense_below), scale)


def _attention(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float | None) -> Tensor:
    batch, heads, tokens, width = q.shape
    if blocks.dense(tokens):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    kind = q.device.type
    # As PyTorch's own attention does; "meta" has no autocast to ask for.
    if kind != "meta" and torch.is_autocast_enabled(kind) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    q, k, v = (in_blocks(x, blocks.block) for x in (q, k, v))
    index = best_blocks(q, k, tokens, blocks)
    q, k, v, index = (x.flatten(0, 1) for x in (q, k, v, index))
    y = attend(q, k, v, index, tokens, width**-0.5 if scale is None else scale)
    return y.view(batch, heads, y.shape[1] * blocks.block, width)[:, :, :tokens]


def attends_densely(
    tokens: int,
    *,
    block: int = 64,
    local: int = 3,
    top: int = 4,
    global_blocks: int = 1,
    dense_below: int | None = None,
) -> bool:
    """Tell if ``block_sparse_attention`` serves sequences of this length by dense attention.

    Args:
        tokens: number of tokens.
        block: as for ``block_sparse_attention``.
        local: as for ``block_sparse_attention``.
        top: as for ``block_sparse_attention``.
        global_blocks: as for ``block_sparse_attention``.
        dense_below: as for ``block_sparse_attention``.

    Raises:
        UserError: settings that do not fit.
    """
    return checked_blocks(block, local, top, global_blocks, dense_below).dense(tokens)


class BlockSparseAttention(nn.Module):
    """Multi-head self-attention of tokens [batch, tokens, dim] through ``block_sparse_attention``, without a mask.

    Its parameters are those of dense attention, ``qkv`` and ``out``. The first time that a sequence is short enough for
    dense attention, the logger ``sparse_training`` says so.

    Args:
        dim: features of a token, divisible by ``heads``.
        heads: number of attention heads, at least 1.
        block: tokens of a block, at least 1. Default 64.
        local: neighbouring blocks, the query's own among them, at least 1. Default 3.
        top: blocks chosen by content, at least 0. Default 4.
        global_blocks: blocks at the start of the sequence that every query attends to, at least 0. Default 1.
        dense_below: number of tokens below which dense attention serves, at least 0; None (the default) for twice the
            keys that a query attends to, but no less than 512.

    Raises:
        UserError: settings that do not fit.

    Example:
        >>> attention = BlockSparseAttention(192, heads=3)
        >>> y = attention(torch.randn(2, 4096, 192))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        block: int = 64,
        local: int = 3,
        top: int = 4,
        global_blocks: int = 1,
        dense_below: int | None = None,
    ) -> None:
        super().__init__()
        whole = isinstance(dim, int) and isinstance(heads, int)
        if not whole or heads < 1 or dim < 1 or dim % heads:
            raise UserError(f"`dim` must be a multiple of `heads`, both at least 1, got {dim!r} and {heads!r}")
        self.heads = heads
        self.blocks = checked_blocks(block, local, top, global_blocks, dense_below)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend.

        Args:
            x: tokens, [batch, tokens, dim].

        Returns:
            Tokens of the same shape.

        Raises:
            UserError: ``x`` has another shape.
        """
        if x.dim() != 3 or x.shape[2] != self.out.in_features:
            raise UserError(f"`x` must have shape [batch, tokens, {self.out.in_features}], got {tuple(x.shape)}")
        batch, tokens, width = x.shape
        if self.blocks.dense(tokens) and not torch.compiler.is_compiling():
            _announce_dense(tokens, self.blocks)
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = _attention(q, k, v, self.blocks, None)
        mixed: Tensor = self.out(y.transpose(1, 2).reshape(batch, tokens, width))
        return mixed

    def extra_repr(self) -> str:
        """Settings to print."""
        return ", ".join([f"heads={self.heads}", *(f"{name}={value}" for name, value in self.blocks._asdict().items())])


@cache
def _announce_dense(tokens: int, blocks: Blocks) -> None:
    reason = f"up to {blocks.chosen() * blocks.block} that is the same"
    if tokens < blocks.dense_below:
        reason = f"below {blocks.dense_below} that is faster"
    announce(f"sparse attention over {tokens} tokens is served by dense attention: {reason}")
