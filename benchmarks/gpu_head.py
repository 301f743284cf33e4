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


def head_row(bench: Bench, name: str, loss_of: heads.Head, products: float, *, compared: bool = False) -> Row:
    """Gradients of the loss of selected rows, against those of all rows by other packages.

    ``products``: of a row and the weight that ours needs. ``compared``: ours takes all rows, too.
    """
    rows, hidden, classes = (*bench.shape(ROWS, HIDDEN), bench.shape(CLASSES)[0])
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, hidden, generator=g).to(bench.device, torch.bfloat16).requires_grad_()
    w = (torch.randn(classes, hidden, generator=g) / hidden**0.5).to(bench.device, torch.bfloat16).requires_grad_()
    y = torch.randint(0, classes, (rows,), generator=g).to(bench.device)

    def ours() -> tuple[Tensor, ...]:
        with bench.served():
            return torch.autograd.grad(loss_of(x, w, y), (x, w))

    found, left_out = heads.available(*PEERS, device=bench.device, dtype=torch.bfloat16)
    sides: dict[str, Side] = {
        other: (lambda head=head: torch.autograd.grad(head(x, w, y), (x, w))) for other, head in found.items()
    }
    for other, side in sides.items() if compared else ():
        agree(other, ours()[0], side()[0], torch.bfloat16)
    moved = 2 * (3 * w.numel() + 2 * x.numel())  # the weight twice and its gradient once; hidden states and theirs
    notes = {"flops": 2 * products * rows * hidden * classes} | ({"left out": left_out} if left_out else {})
    return bench.measure(name, ours, sides, moved=moved, targets={}, notes=notes)


def selective(select: Any) -> heads.Head:
    return lambda x, w, y: sk.selective_linear_cross_entropy(x, w, y, select=select).loss


def statistics(every: int) -> heads.Head:
    """Loss and entropy of all rows, and an upstream gradient of each ``every``-th."""

    def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        stats = sk.linear_row_stats(x, w, y)
        assert stats.loss is not None
        return stats.loss[::every].mean()

    return loss


@case("head-bfloat16-8192x4096x131072")
def all_rows(bench: Bench, name: str) -> Row:
    return head_row(bench, name, selective(None), 3, compared=True)


@case("head-fifth-bfloat16-8192x4096x131072")
def fifth(bench: Bench, name: str) -> Row:
    return head_row(bench, name, selective(sk.TopFraction(0.2)), 1.6)


@case("linear_row_stats-bfloat16-8192x4096x131072")
def all_statistics(bench: Bench, name: str) -> Row:
    return head_row(bench, name, statistics(1), 4, compared=True)


@case("linear_row_stats-fifth-bfloat16-8192x4096x131072")
def statistics_of_a_fifth(bench: Bench, name: str) -> Row:
    return head_row(bench, name, statistics(5), 1.6)
