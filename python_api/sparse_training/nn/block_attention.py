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
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_GATHERED_BYTES = 1 << 20  # of keys, a thread: with values and their gradients a few times a core's own cache


def attend(q: Tensor, k: Tensor, v: Tensor, index: Tensor, tokens: int, scale: float) -> Tensor:
    """Attend to chosen blocks.

    Args:
        q: queries in blocks, [sequences, blocks, block, width], a sequence being a head of a batch's element.
        k: keys, of the same shape.
        v: values, of the same shape.
        index: chosen blocks, int64 [sequences, blocks, chosen], all different in a row.
        tokens: tokens of a sequence; keys behind them are padding, which gets no weight.
        scale: factor of the products of queries and keys.

    Returns:
        The weighted values, of the shape of ``q``; arbitrary but finite where the queries are padding.
    """
    if q.device.type == "cpu":
        y: Tensor = torch.ops.sparse_training.block_attention(q, k, v, index, tokens, scale)[0]
        return y
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        again: Tensor = checkpoint(
            gathered, q, k, v, index, tokens, scale, use_reentrant=False, preserve_rng_state=False
        )
        return again
    return gathered(q, k, v, index, tokens, scale)


def gathered(q: Tensor, k: Tensor, v: Tensor, index: Tensor, tokens: int, scale: float) -> Tensor:
    """Attend as ``attend`` does, with all chosen blocks gathered at once."""
    sequences, blocks, block, width = q.shape
    rows = _rows(index, blocks).flatten()
    # Gathered in float32: the gradient of a block is a sum over all that chose it, which 16 bits would lose.
    keys, values = (
        x.reshape(sequences * blocks, block * width).to(_wide(x.dtype)).index_select(0, rows).to(x.dtype)
        .view(sequences * blocks, 1, index.shape[-1] * block, width)
        for x in (k, v)
    )  # fmt: skip
    mask = _padding_mask(index, block, tokens, q.dtype) if tokens != blocks * block else None
    y = F.scaled_dot_product_attention(
        q.reshape(sequences * blocks, 1, block, width), keys, values, attn_mask=mask, scale=scale
    )
    return y.view(q.shape)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(index: Tensor, blocks: int) -> Tensor:
    """Rows of the chosen blocks among the blocks of all sequences, [sequences * blocks, chosen]."""
    first = torch.arange(index.shape[0], device=index.device) * blocks
    return (index + first.view(-1, 1, 1)).flatten(0, 1)


def _padding_mask(index: Tensor, block: int, tokens: int, dtype: torch.dtype) -> Tensor:
    """Summand of the scores, [sequences * blocks, 1, 1, chosen * block]: minus infinity for padding, else 0."""
    place = index.flatten(0, 1).unsqueeze(-1) * block + torch.arange(block, device=index.device)
    zeros = torch.zeros(place.shape, dtype=dtype, device=index.device)
    return zeros.masked_fill(place >= tokens, -torch.inf).view(place.shape[0], 1, 1, place.shape[1] * block)


def _pieces(q: Tensor, index: Tensor, tokens: int) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Blocks of queries whose gathered keys fit the caches, as a slice, with their rows of keys and their mask."""
    _, blocks, block, width = q.shape
    rows = _rows(index, blocks)
    masks = _padding_mask(index, block, tokens, q.dtype) if tokens != blocks * block else None
    of_one = rows.shape[1] * block * width * q.dtype.itemsize
    step = max(1, torch.get_num_threads() * _GATHERED_BYTES // max(1, of_one))
    for start in range(0, rows.shape[0], step):
        piece = slice(start, start + step)
        yield piece, rows[piece].flatten(), None if masks is None else masks[piece]


@torch.library.custom_op(
    "sparse_training::block_attention",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor q, Tensor k, Tensor v, Tensor index, SymInt tokens, float scale) -> (Tensor, Tensor)",
)
def _forward(q: Tensor, k: Tensor, v: Tensor, index: Tensor, tokens: int, scale: float) -> tuple[Tensor, Tensor]:
    """Attend a piece at a time; also returns each query's log-sum-exp, [sequences, blocks, block]."""
    sequences, blocks, block, width = q.shape
    flat_k, flat_v = (x.reshape(sequences * blocks, block * width) for x in (k, v))
    queries = q.reshape(sequences * blocks, 1, block, width)
    y, sums = _empty_results(q)
    flat_y, flat_sums = y.view(queries.shape), sums.view(sequences * blocks, 1, block)
    for piece, rows, mask in _pieces(q, index, tokens):
        at = queries[piece]
        keys, values = (x.index_select(0, rows).view(at.shape[0], 1, -1, width) for x in (flat_k, flat_v))
        flat_y[piece], flat_sums[piece] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            at, keys, values, attn_mask=mask, scale=scale
        )
    return y, sums


def _empty_results(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=_wide(q.dtype))


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, index: Tensor, tokens: int, scale: float) -> tuple[Tensor, Tensor]:
    return _empty_results(q)


@torch.library.custom_op(
    "sparse_training::block_attention_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor index, Tensor y, Tensor sums, SymInt tokens, "
    "float scale) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, y: Tensor, sums: Tensor, tokens: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, a piece at a time."""
    sequences, blocks, block, width = q.shape
    flat_k, flat_v = (x.reshape(sequences * blocks, block * width) for x in (k, v))
    grads, queries, ys = (x.reshape(sequences * blocks, 1, block, width) for x in (grad, q, y))
    flat_sums = sums.view(sequences * blocks, 1, block)
    # Sums over all blocks of queries that chose a block: more than 16 bits hold.
    wide = _wide(q.dtype)
    of_q, of_k, of_v = (torch.empty_like(queries), *(torch.zeros_like(x, dtype=wide) for x in (flat_k, flat_v)))
    for piece, rows, mask in _pieces(q, index, tokens):
        at = queries[piece]
        keys, values = (x.index_select(0, rows).view(at.shape[0], 1, -1, width) for x in (flat_k, flat_v))
        of_q[piece], of_keys, of_values = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grads[piece], at, keys, values, ys[piece], flat_sums[piece], 0.0, False, attn_mask=mask, scale=scale
        )
        of_k.index_add_(0, rows, of_keys.reshape(-1, block * width).to(wide))
        of_v.index_add_(0, rows, of_values.reshape(-1, block * width).to(wide))
    return of_q.view(q.shape), of_k.view(q.shape).to(q.dtype), of_v.view(q.shape).to(q.dtype)


@_backward.register_fake
def _(grad: Tensor, q: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, index, ctx.tokens, ctx.scale = inputs
    y, sums = output
    ctx.mark_non_differentiable(sums)
    ctx.save_for_backward(q, k, v, index, y, sums)


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.sparse_training.block_attention_backward(grad, *ctx.saved_tensors, ctx.tokens, ctx.scale)
    return (*found, None, None, None)


_forward.register_autograd(_gradient, setup_context=_save)
