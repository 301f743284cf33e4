"""Attention to chosen blocks by PyTorch's FlexAttention, which reads them in place: nothing is gathered.

It is given the same choice as ``block_attention.attend``, as a ``BlockMask`` with an entry for each chosen block. The
means of the other blocks are further keys, behind those of the sequence.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sparse_training.errors import UserError
from sparse_training.nn.blocks import tokens_in_blocks

_TILE = 64  # tokens: PyTorch tunes its CUDA kernels among tiles of which some divide every multiple of 64


def check_flex(block: int, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check that FlexAttention serves the operands.

    Raises:
        UserError: it has no kernel for the device, no gradient on it, or none for blocks of this size or this graph.
    """
    kind, instead = q.device.type, "use implementation='gathered'"
    if kind not in ("cpu", "cuda"):
        raise UserError(f"implementation='flex' serves tensors on cpu and cuda, got them on {q.device}; {instead}")
    if kind == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise UserError(f"implementation='flex' has no gradient on a CPU, got tensors that require one; {instead}")
    if kind == "cpu" and torch.compiler.is_compiling():  # PyTorch 2.13 has no kernel for it inside a larger graph
        raise UserError(
            f"implementation='flex' is compiled by itself on a CPU, got a call under torch.compile; {instead}"
        )
    if kind == "cuda" and block % _TILE:
        raise UserError(
            f"implementation='flex' on cuda needs `block` to be a multiple of {_TILE}, got {block}; {instead}"
        )


def attend_flex(
    q: Tensor, k: Tensor, v: Tensor, mean_k: Tensor, mean_v: Tensor, index: Tensor, tokens: int, scale: float
) -> Tensor:
    """Attend as ``block_attention.attend`` does, with the same arguments."""
    blocks, block, means = q.shape[1], q.shape[2], mean_k.shape[1]
    rest, place = -means % block, torch.arange(blocks * block, device=q.device)
    # For each key the column of [chosen, not chosen, nothing] that allows it.
    column = (place // block).masked_fill(place >= tokens, 2 * blocks)
    column = torch.cat([column, F.pad(blocks + place[:means], (0, rest), value=2 * blocks)])
    filled = tokens_in_blocks(means, block, tokens, q.device)
    weight = F.pad(filled.to(torch.float32).log(), (blocks * block, rest))
    if not torch.is_grad_enabled():  # PyTorch refuses views of what requires a gradient even so
        q, k, v = q.detach(), k.detach(), v.detach()
    queries, keys, values = (x.flatten(1, 2) for x in (q, k, v))
    keys, values = (torch.cat([x, F.pad(y, (0, 0, 0, rest))], 1) for x, y in ((keys, mean_k), (values, mean_v)))

    def score_mod(score: Tensor, sequence: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + weight[key]

    flex: Any = flex_attention if torch.compiler.is_compiling() else _compiled(q.device.type)
    y: Tensor = flex(
        *(x.unsqueeze(1) for x in (queries, keys, values)),
        score_mod=score_mod if means else None,
        block_mask=_block_mask(index, block, column, tokens),
        scale=scale,
    )
    return y.view(q.shape)


@cache
def _compiled(kind: str) -> Any:
    if kind == "cpu":
        return torch.compile(flex_attention, dynamic=False)  # for any number of tokens, its C++ does not compile
    # Untuned, some devices have kernels with tiles of 128 alone, which no block of 64 is a multiple of.
    return torch.compile(flex_attention, mode="max-autotune-no-cudagraphs")


def _block_mask(index: Tensor, block: int, column: Tensor, tokens: int) -> BlockMask:
    blocks = index.shape[1]
    chosen = index.new_zeros((*index.shape[:2], blocks), dtype=torch.bool).scatter(-1, index, True)
    allowed = torch.cat([chosen, ~chosen, torch.zeros_like(chosen[..., :1])], -1)

    def mask_mod(sequence: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return allowed[sequence, query // block, column[key]]

    # Blocks that hold padding or means are asked for key by key.
    whole = torch.arange(len(column) // block, device=index.device) < tokens // block
    read = F.pad(chosen, (0, len(whole) - blocks), value=True).unsqueeze(1)
    return BlockMask.from_kv_blocks(
        *_ordered(read & ~whole), *_ordered(read & whole), BLOCK_SIZE=block, mask_mod=mask_mod
    )


def _ordered(read: Tensor) -> tuple[Tensor, Tensor]:
    """Number of the blocks of keys that each block of queries reads, and these before all others."""
    return read.sum(-1, dtype=torch.int32), read.int().argsort(dim=-1, descending=True, stable=True).int()
