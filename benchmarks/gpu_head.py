"""The head's rows of ``gpu.py bench``: forward and backward of 8,192 tokens, for all of them and for a fifth."""

from __future__ import annotations

from typing import Any

import heads
import torch
from gpu_bench import Bench, agree, case
from timing import Row, Side
from torch import Tensor

import sparse_kernels as sk

ROWS, HIDDEN, CLASSES = 8192, 4096, 131_072
PEERS = ("Liger", "Cut Cross-Entropy")


def head_row(bench: Bench, name: str, select: Any, kept: float) -> Row:
    """Gradients of the loss of selected rows, against those of all rows by other packages."""
    rows, hidden, classes = (*bench.shape(ROWS, HIDDEN), bench.shape(CLASSES)[0])
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, hidden, generator=g).to(bench.device, torch.bfloat16).requires_grad_()
    w = (torch.randn(classes, hidden, generator=g) / hidden**0.5).to(bench.device, torch.bfloat16).requires_grad_()
    y = torch.randint(0, classes, (rows,), generator=g).to(bench.device)

    def ours() -> tuple[Tensor, ...]:
        with bench.served():
            return torch.autograd.grad(sk.selective_linear_cross_entropy(x, w, y, select=select).loss, (x, w))

    found, left_out = heads.available(*PEERS, device=bench.device)
    sides: dict[str, Side] = {
        other: (lambda head=head: torch.autograd.grad(head(x, w, y), (x, w))) for other, head in found.items()
    }
    if select is None:
        for other, side in sides.items():
            agree(other, ours()[0], side()[0], torch.bfloat16)
    product = 2 * rows * hidden * classes
    needed = (3 if select is None else 1 + 3 * kept) * product
    moved = 2 * (3 * w.numel() + 2 * x.numel())  # the weight twice and its gradient once; hidden states and theirs
    notes = {"flops": needed} | ({"left out": left_out} if left_out else {})
    return bench.measure(name, ours, sides, moved=moved, targets={}, notes=notes)


@case("head-bfloat16-8192x4096x131072")
def all_rows(bench: Bench, name: str) -> Row:
    return head_row(bench, name, None, 1.0)


@case("head-fifth-bfloat16-8192x4096x131072")
def fifth(bench: Bench, name: str) -> Row:
    return head_row(bench, name, sk.TopFraction(0.2), 0.2)
