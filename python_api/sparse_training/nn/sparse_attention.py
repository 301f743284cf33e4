"""Attention that reads a fixed number of keys a query: neighbours, global tokens, and those that content picks."""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_training.announcements import announce
from sparse_training.errors import UserError
from sparse_training.nn.block_attention import attend
from sparse_training.nn.block_choice import Blocks, best_blocks, block_means, check_tensors, checked_blocks, in_blocks
from sparse_training.nn.flex_attention import attend_flex, check_flex

Implementation = Literal["gathered", "flex"]


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = 64,
    local: int = 3,
    top: int = 4,
    global_blocks: int = 1,
    summary: bool = False,
    dense_below: int | None = None,
    scale: float | None = None,
    implementation: Implementation = "gathered",
) -> Tensor:
    """Self-attention of each block of queries to ``local + top + global_blocks`` blocks of keys.

    Time and memory grow in proportion to the number of tokens; those of the choice alone, and of a summary, grow with
    the square of the number of blocks. It is ``torch.nn.functional.scaled_dot_product_attention`` where every block is
    chosen.

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
        summary: let each query also read the mean key and the mean value of every block that it does not read, which
            count as often as the block has tokens: an approximation of the rest of dense attention. Default False.
        dense_below: number of tokens below which dense attention serves, at least 0. None (the default) for twice the
            keys that a query attends to, but no less than 512: 1,024 with the other defaults.
        scale: factor of the products of queries and keys; None (the default) for 1 / sqrt(width).
        implementation: "gathered" (the default) copies the chosen blocks, on any device. "flex" reads them in place by
            PyTorch's FlexAttention, compiled at its first call: on CUDA, where ``block`` must be a multiple of 64, and
            without gradients on a CPU. The results are the same.

    Returns:
        The weighted values, of the shape and dtype of ``q``; under ``torch.autocast`` of its dtype.

    Raises:
        UserError: tensors or settings that do not fit, or a device that "flex" does not serve.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 4096, 64)  # of 2 sequences and 4 heads
        >>> y = block_sparse_attention(q, k, v)  # every query sees 512 of 4,096 keys
    """
    check_tensors(q=q, k=k, v=v)
    # Under torch.compile it may be a symbol.
    if scale is not None and not torch.compiler.is_compiling() and not _finite(scale):
        raise UserError(f"`scale` must be None or a finite number, got {scale!r}")
    blocks = checked_blocks(block, local, top, global_blocks, dense_below, summary=summary)
    return _attention(q, k, v, blocks, scale, _checked(implementation))


def _attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float | None, implementation: Implementation
) -> Tensor:
    batch, heads, tokens, width = q.shape
    if blocks.dense(tokens):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if implementation == "flex":
        check_flex(blocks.block, q, k, v)
    kind = q.device.type
    # As PyTorch's own attention does; "meta" has no autocast to ask for.
    if kind != "meta" and torch.is_autocast_enabled(kind) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    q, k, v = (in_blocks(x, blocks.block) for x in (q, k, v))
    mean_k = block_means(k if blocks.summary else k.detach(), tokens)
    index = best_blocks(block_means(q.detach(), tokens), mean_k, blocks)
    mean_k, mean_v = (mean_k, block_means(v, tokens)) if blocks.summary else (mean_k[:, :, :0],) * 2
    q, k, v, mean_k, mean_v, index = (x.flatten(0, 1) for x in (q, k, v, mean_k, mean_v, index))
    mean_k, mean_v = mean_k.to(q.dtype), mean_v.to(q.dtype)
    form = attend_flex if implementation == "flex" else attend
    y = form(q, k, v, mean_k, mean_v, index, tokens, width**-0.5 if scale is None else scale)
    return y.view(batch, heads, y.shape[1] * blocks.block, width)[:, :, :tokens]


def _finite(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)


def _checked(implementation: Implementation) -> Implementation:
    if implementation not in ("gathered", "flex"):
        raise UserError(f"`implementation` must be 'gathered' or 'flex', got {implementation!r}")
    return implementation


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
        summary: let each query also read the mean key and the mean value of every block that it does not read, which
            count as often as the block has tokens: an approximation of the rest of dense attention. Default False.
        dense_below: number of tokens below which dense attention serves, at least 0; None (the default) for twice the
            keys that a query attends to, but no less than 512.
        implementation: "gathered" (the default), or "flex" for PyTorch's FlexAttention; see
            ``block_sparse_attention``.

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
        summary: bool = False,
        dense_below: int | None = None,
        implementation: Implementation = "gathered",
    ) -> None:
        super().__init__()
        whole = isinstance(dim, int) and isinstance(heads, int)
        if not whole or heads < 1 or dim < 1 or dim % heads:
            raise UserError(f"`dim` must be a multiple of `heads`, both at least 1, got {dim!r} and {heads!r}")
        self.heads = heads
        self.blocks = checked_blocks(block, local, top, global_blocks, dense_below, summary=summary)
        self.implementation = _checked(implementation)
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
        y = _attention(q, k, v, self.blocks, None, self.implementation)
        mixed: Tensor = self.out(y.transpose(1, 2).reshape(batch, tokens, width))
        return mixed

    def extra_repr(self) -> str:
        """Settings to print."""
        settings = {"heads": self.heads, **self.blocks._asdict(), "implementation": self.implementation}
        return ", ".join(f"{name}={value!r}" for name, value in settings.items())


@cache
def _announce_dense(tokens: int, blocks: Blocks) -> None:
    reason = f"up to {blocks.chosen() * blocks.block} that is the same"
    if tokens < blocks.dense_below:
        reason = f"below {blocks.dense_below} that is faster"
    announce(f"sparse attention over {tokens} tokens is served by dense attention: {reason}")
