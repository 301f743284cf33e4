"""Attention of blocks of queries to the blocks of keys chosen for each, differentiable in all three operands.

``attend`` is the whole of it in plain PyTorch: gather the chosen blocks, then one ``scaled_dot_product_attention`` of
[sequences * blocks, 1, block, width] queries to ``chosen * block`` keys each. Every device serves it, and compilers see
through it. Its backward gathers anew, so that gathered keys are not held from forward to backward.

On a CPU the same happens a few blocks at a time (``torch.ops.sparse_training.block_attention``): what is gathered stays
in the processor's caches, and memory for a few blocks is all that it takes. Forward and backward of a piece are
PyTorch's own flash attention for CPUs; the log-sum-exp of each query is kept between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparse_training.nn.blocks import tokens_in_blocks, wide

_GATHERED_BYTES = 1 << 20  # of keys, a thread: with values and their gradients a few times a core's own cache


def attend(
    q: Tensor, k: Tensor, v: Tensor, mean_k: Tensor, mean_v: Tensor, index: Tensor, tokens: int, scale: float
) -> Tensor:
    """Attend to chosen blocks, and to the means of the others.

    Args:
        q: queries in blocks, [sequences, blocks, block, width], a sequence being a head of a batch's element.
        k: keys, of the same shape.
        v: values, of the same shape.
        mean_k: the mean key of each block, [sequences, blocks, width], or [sequences, 0, width] for none. The mean of a
            block that was not chosen counts as often as the block has tokens.
        mean_v: mean values, of the shape of ``mean_k``.
        index: chosen blocks, int64 [sequences, blocks, chosen], all different in a row.
        tokens: tokens of a sequence; keys behind them are padding, which gets no weight.
        scale: factor of the products of queries and keys.

    Returns:
        The weighted values, of the shape of ``q``; arbitrary but finite where the queries are padding.
    """
    operands = (q, k, v, mean_k, mean_v)
    if q.device.type == "cpu":
        y: Tensor = torch.ops.sparse_training.block_attention(*operands, index, tokens, scale)[0]
        return y
    if torch.is_grad_enabled() and any(x.requires_grad for x in operands):
        again: Tensor = checkpoint(
            gathered, *operands, index, tokens, scale, use_reentrant=False, preserve_rng_state=False
        )
        return again
    return gathered(*operands, index, tokens, scale)


def gathered(
    q: Tensor, k: Tensor, v: Tensor, mean_k: Tensor, mean_v: Tensor, index: Tensor, tokens: int, scale: float
) -> Tensor:
    """Attend as ``attend`` does, with all chosen blocks gathered at once."""
    sequences, blocks, block, width = q.shape
    rows = _rows(index, blocks).flatten()
    # Gathered in float32: the gradient of a block is a sum over all that chose it, which 16 bits would lose.
    keys, values = (
        x.reshape(sequences * blocks, block * width).to(wide(x.dtype)).index_select(0, rows).to(x.dtype)
        .view(sequences * blocks, index.shape[-1] * block, width)
        for x in (k, v)
    )  # fmt: skip
    if mean_k.shape[1]:
        keys, values = (
            torch.cat([x, mean.to(wide(mean.dtype)).repeat_interleave(blocks, 0).to(mean.dtype)], 1)
            for x, mean in ((keys, mean_k), (values, mean_v))
        )
    keys, values = keys.unsqueeze(1), values.unsqueeze(1)
    mask = _mask(index, block, tokens, mean_k)
    y = F.scaled_dot_product_attention(
        q.reshape(sequences * blocks, 1, block, width), keys, values, attn_mask=mask, scale=scale
    )
    return y.view(q.shape)


def _rows(index: Tensor, blocks: int) -> Tensor:
    """Rows of the chosen blocks among the blocks of all sequences, [sequences * blocks, chosen]."""
    first = torch.arange(index.shape[0], device=index.device) * blocks
    return (index + first.view(-1, 1, 1)).flatten(0, 1)


def _mask(index: Tensor, block: int, tokens: int, mean_k: Tensor) -> Tensor | None:
    """Summand of the scores, [sequences * blocks, 1, 1, chosen * block + means]; None where it is 0 everywhere.

    Minus infinity for padding, and for the means of chosen blocks; the logarithm of its tokens for another mean.
    """
    blocks, means = index.shape[1], mean_k.shape[1]
    if tokens == blocks * block and not means:
        return None
    index = index.flatten(0, 1)
    place = index.unsqueeze(-1) * block + torch.arange(block, device=index.device)
    padding = mean_k.new_zeros(place.shape).masked_fill(place >= tokens, -torch.inf).flatten(1)
    filled = tokens_in_blocks(means, block, tokens, index.device)
    counts = filled.to(wide(mean_k.dtype)).log().to(mean_k.dtype).repeat(len(index), 1)
    if means:
        counts = counts.scatter(1, index, -torch.inf)
    return torch.cat([padding, counts], 1)[:, None, None]


class _Piece(NamedTuple):
    """Some blocks of queries whose gathered keys fit the caches.

    Attributes:
        at: these among the blocks of all sequences.
        rows: the blocks that they read, one after the other.
        of: the sequence of each.
        mask: summand of their scores, if any.
    """

    at: slice
    rows: Tensor
    of: Tensor
    mask: Tensor | None

    def gather(self, blocks: Tensor, means: Tensor) -> Tensor:
        """Gather what they read of blocks [sequences * blocks, block * width] and means: [pieces, 1, read, width]."""
        width = means.shape[-1]
        read = blocks.index_select(0, self.rows).view(len(self.of), -1, width)
        if means.shape[1]:
            read = torch.cat([read, means.index_select(0, self.of)], 1)
        return read.unsqueeze(1)

    def add_to(self, blocks: Tensor, means: Tensor, read: Tensor) -> None:
        """Add the gradient of what was gathered to those of the blocks and of the means, in their precision."""
        read = read.squeeze(1)
        of_blocks = read[:, : read.shape[1] - means.shape[1]].reshape(len(self.rows), -1)
        blocks.index_add_(0, self.rows, of_blocks.to(blocks.dtype))
        if means.shape[1]:
            means.index_add_(0, self.of, read[:, -means.shape[1] :].to(means.dtype))


def _pieces(q: Tensor, index: Tensor, tokens: int, mean_k: Tensor) -> Iterator[_Piece]:
    sequences, blocks, block, width = q.shape
    rows, masks = _rows(index, blocks), _mask(index, block, tokens, mean_k)
    of = torch.arange(sequences).repeat_interleave(blocks)
    of_one = (rows.shape[1] * block + mean_k.shape[1]) * width * q.dtype.itemsize
    step = max(1, torch.get_num_threads() * _GATHERED_BYTES // max(1, of_one))
    for start in range(0, rows.shape[0], step):
        at = slice(start, start + step)
        yield _Piece(at, rows[at].flatten(), of[at], None if masks is None else masks[at])


@torch.library.custom_op(
    "sparse_training::block_attention",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor q, Tensor k, Tensor v, Tensor mean_k, Tensor mean_v, Tensor index, SymInt tokens, float scale) "
    "-> (Tensor, Tensor)",
)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, mean_k: Tensor, mean_v: Tensor, index: Tensor, tokens: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend a piece at a time; also returns each query's log-sum-exp, [sequences, blocks, block]."""
    sequences, blocks, block, width = q.shape
    flat_k, flat_v = (x.reshape(sequences * blocks, block * width) for x in (k, v))
    queries = q.reshape(sequences * blocks, 1, block, width)
    y, sums = _empty_results(q)
    flat_y, flat_sums = y.view(queries.shape), sums.view(sequences * blocks, 1, block)
    for piece in _pieces(q, index, tokens, mean_k):
        keys, values = piece.gather(flat_k, mean_k), piece.gather(flat_v, mean_v)
        flat_y[piece.at], flat_sums[piece.at] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries[piece.at], keys, values, attn_mask=piece.mask, scale=scale
        )
    return y, sums


def _empty_results(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide(q.dtype))


@_forward.register_fake
def _(q: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return _empty_results(q)


@torch.library.custom_op(
    "sparse_training::block_attention_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor mean_k, Tensor mean_v, Tensor index, Tensor y, "
    "Tensor sums, SymInt tokens, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mean_k: Tensor, mean_v: Tensor, index: Tensor, y: Tensor,
    sums: Tensor, tokens: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys, values and means, a piece at a time."""
    sequences, blocks, block, width = q.shape
    flat_k, flat_v = (x.reshape(sequences * blocks, block * width) for x in (k, v))
    grads, queries, ys = (x.reshape(sequences * blocks, 1, block, width) for x in (grad, q, y))
    flat_sums = sums.view(sequences * blocks, 1, block)
    # Sums over all blocks of queries that read a block: more than 16 bits hold.
    of_sums, of_q = wide(q.dtype), torch.empty_like(queries)
    of_k, of_v, of_mean_k, of_mean_v = (torch.zeros_like(x, dtype=of_sums) for x in (flat_k, flat_v, mean_k, mean_v))
    for piece in _pieces(q, index, tokens, mean_k):
        at, keys, values = piece.at, piece.gather(flat_k, mean_k), piece.gather(flat_v, mean_v)
        of_q[at], of_keys, of_values = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grads[at], queries[at], keys, values, ys[at], flat_sums[at], 0.0, False, attn_mask=piece.mask, scale=scale
        )
        piece.add_to(of_k, of_mean_k, of_keys)
        piece.add_to(of_v, of_mean_v, of_values)
    of_blocks = (x.view(q.shape).to(q.dtype) for x in (of_q, of_k, of_v))
    return (*of_blocks, of_mean_k.to(q.dtype), of_mean_v.to(q.dtype))  # type: ignore[return-value]


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mean_k: Tensor, mean_v: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    blocks, means = q.shape, mean_k.shape
    return q.new_empty(blocks), q.new_empty(blocks), q.new_empty(blocks), q.new_empty(means), q.new_empty(means)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *operands, ctx.tokens, ctx.scale = inputs
    y, sums = output
    ctx.mark_non_differentiable(sums)
    ctx.save_for_backward(*operands, y, sums)


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.sparse_training.block_attention_backward(grad, *ctx.saved_tensors, ctx.tokens, ctx.scale)
    return (*found, None, None, None)


_forward.register_autograd(_gradient, setup_context=_save)
