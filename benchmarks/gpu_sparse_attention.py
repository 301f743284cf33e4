"""Block-sparse attention's rows of ``gpu.py bench``: forward and backward of 8 sequences, 12 heads of 64, bfloat16."""

from __future__ import annotations

from functools import partial

import torch
from gpu_bench import Bench, agree, case
from timing import Row, Side
from torch import Tensor
from torch.nn import functional as F

from sparse_training.nn import block_sparse_attention

SETTINGS = {"block": 64, "dense_below": 0}


def attention_row(bench: Bench, name: str, tokens: int, *, flex: bool = False) -> Row:
    """Gathered blocks beside dense attention, or FlexAttention beside both."""
    rows, heads, width = bench.shape(8, 12, 64)
    shape = (rows, heads, 640 if bench.small else tokens, width)
    torch.manual_seed(0)
    operands = [torch.randn(shape, device=bench.device, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    grad = torch.randn_like(operands[0])

    def run(implementation: str | None) -> tuple[Tensor, ...]:
        form = F.scaled_dot_product_attention
        if implementation is not None:
            form = partial(block_sparse_attention, implementation=implementation, **SETTINGS)
        return torch.autograd.grad(form(*operands), operands, grad)

    sides: dict[str, Side] = {"dense": partial(run, None)}
    ours = partial(run, "gathered")
    if flex and bench.device.type == "cuda":  # elsewhere it has no gradient
        sides["gathered"], ours = ours, partial(run, "flex")
        for mine, theirs in zip(ours(), sides["gathered"](), strict=True):
            agree("gathered", mine, theirs, torch.bfloat16)
    moved = 2 * 8 * operands[0].numel()  # three operands, their gradients, the result and its gradient
    return bench.measure(name, ours, sides, moved=moved, targets={"dense": 1.0})


@case("attention-bfloat16-4096")
def gathered_4096(bench: Bench, name: str) -> Row:
    return attention_row(bench, name, 4096)


@case("attention-bfloat16-16384")
def gathered_16384(bench: Bench, name: str) -> Row:
    return attention_row(bench, name, 16384)


@case("attention-flex-bfloat16-16384")
def flex_16384(bench: Bench, name: str) -> Row:
    return attention_row(bench, name, 16384, flex=True)
