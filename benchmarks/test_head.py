"""The head of a language model, forward and backward, beside those that users run: all rows, and a fifth of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import heads
import pytest
import torch

import sparse_kernels as sk
from sparse_training import Gate, Significance

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
SMOLLM2, QWEN = (576, 49_152), (896, 151_936)  # hidden size and classes of their heads
FASTEST = ("dense", "dense float32", "Liger")  # of the peers on a CPU, where all were timed


def cases(name, *sizes):
    """Parameters of a benchmark: hidden, classes, dtype and rounds."""
    return pytest.mark.parametrize(
        ("hidden", "classes", "dtype", "rounds"),
        [
            pytest.param(*size, dtype, rounds, id=f"{name}-{str(dtype)[6:]}-1024x{size[0]}x{size[1]}")
            for size, dtype, rounds in sizes
        ],
    )


def operands(hidden, classes, dtype, small, rows=1024):
    torch.manual_seed(0)
    if small:
        rows, hidden, classes = 32, 16, 64
    x, w = torch.randn(rows, hidden).to(dtype), (torch.randn(classes, hidden) / hidden**0.5).to(dtype)
    return x.requires_grad_(), w.requires_grad_(), torch.randint(0, classes, (rows,))


def side(head, x, w, y):
    return lambda: torch.autograd.grad(head(x, w, y), (x, w))


def check(ours, theirs):
    """No speed-up is printed unless the gradients agree, to some roundings of the largest."""
    for name, found in theirs.items():
        for a, c in zip(ours(), found(), strict=True):
            error, largest = (a.float() - c.float()).abs().max(), c.float().abs().max()
            assert error <= 0.03 * largest, f"{name}: {float(error / largest):.3g}"


@pytest.mark.timeout(1200)
@cases("head-all", (SMOLLM2, BFLOAT16, 7), (SMOLLM2, FLOAT32, 3), (QWEN, BFLOAT16, 3))
def test_all_rows(interleaved, small, hidden, classes, dtype, rounds):
    x, w, y = operands(hidden, classes, dtype, small)
    found, left_out = heads.available()
    ours = side(lambda x, w, y: sk.selective_linear_cross_entropy(x, w, y, select=None).loss, x, w, y)
    again = side(lambda x, w, y: sk.linear_row_stats(x, w, y, outputs="loss").loss.mean(), x, w, y)
    sides = {name: side(head, x, w, y) for name, head in found.items()} | {"linear_row_stats": again}
    check(ours, sides)
    notes = {"left out": left_out, "products of ours": 3, "products of linear_row_stats": 4}
    if dtype is BFLOAT16 and not small and Path("/proc/self/status").exists():
        measured = ["ours", "ours-quantile", *(name for name in ("torch mean", "dense") if name in found)]
        shape = x.shape[0], x.shape[1], w.shape[0]
        notes |= {f"MB besides the gradients: {name}": memory(name, *shape) for name in measured}
    interleaved(ours, sides, rounds=rounds, notes=notes, targets=dict.fromkeys(found, 0.97))


@pytest.mark.timeout(1200)
@cases("head-quantile", (SMOLLM2, BFLOAT16, 7), (SMOLLM2, FLOAT32, 3), (QWEN, BFLOAT16, 3))
def test_a_fifth_by_quantile(interleaved, small, hidden, classes, dtype, rounds):
    x, w, y = operands(hidden, classes, dtype, small)
    found, _ = heads.available(*FASTEST)
    select = sk.TopFraction(0.2, of="entropy")
    ours = side(lambda x, w, y: sk.selective_linear_cross_entropy(x, w, y, select=select).loss, x, w, y)
    peers = {name: side(head, x, w, y) for name, head in found.items()}
    interleaved(ours, peers, rounds=rounds, notes=fifth(ours), targets=dict.fromkeys(peers, 1.7))


@pytest.mark.timeout(1200)
@cases("head-gate", (SMOLLM2, BFLOAT16, 7), (SMOLLM2, FLOAT32, 3), (QWEN, BFLOAT16, 3))
def test_a_fifth_by_gate(interleaved, small, hidden, classes, dtype, rounds):
    x, w, y = operands(hidden, classes, dtype, small)
    found, _ = heads.available(*FASTEST)
    with torch.no_grad():
        losses = sk.linear_row_stats(x, w, y, outputs="loss").loss
    gate = Gate(rate=0.2, significance=Significance(loss=1.0), threshold=float(losses.quantile(0.8)))
    ours = side(lambda x, w, y: sk.selective_linear_cross_entropy(x, w, y, select=gate).loss, x, w, y)
    peers = {name: side(head, x, w, y) for name, head in found.items()}
    interleaved(ours, peers, rounds=rounds, notes=fifth(ours), targets=dict.fromkeys(peers, 2.0))


def fifth(ours):
    """Rows and products of one call."""
    with sk.count_multiplied_rows() as rows:
        ours()
    return {"rows kept": rows.differentiated, "products, of 3 a row": round(rows.products / max(rows.scored, 1), 2)}


@pytest.mark.timeout(1200)
@cases("head-prompts", (SMOLLM2, BFLOAT16, 3), (SMOLLM2, FLOAT32, 3))
def test_half_of_the_tokens_are_prompt(interleaved, small, hidden, classes, dtype, rounds):
    """TRL's function scores every position on a CPU."""
    x, w, y = operands(hidden, classes, dtype, small)
    y[: len(y) // 2] = -100
    found, left_out = heads.available("TRL", "torch mean")
    ours = side(lambda x, w, y: sk.linear_row_stats(x, w, y).loss.sum() / (y != -100).sum(), x, w, y)
    peers = {name: side(head, x, w, y) for name, head in found.items()}
    check(ours, peers)
    targets = {"TRL": 3.0} if "TRL" in found else {}
    interleaved(ours, peers, rounds=rounds, notes={"left out": left_out}, targets=targets)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "dtype", [pytest.param(d, id=f"backward-fifth-{str(d)[6:]}-1024x49152") for d in (BFLOAT16, FLOAT32)]
)
def test_backward_of_a_fifth_of_the_rows(interleaved, small, dtype):
    """``row_stats``' own backward: a fifth of the upstream gradients are not zero, against none."""
    torch.manual_seed(0)
    logits = torch.randn((16, 32) if small else (1024, 49_152)).to(dtype).requires_grad_()
    y = torch.randint(0, logits.shape[1], logits.shape[:1])
    loss = sk.row_stats(logits, y).loss
    every = torch.rand(len(y)) + 0.5
    some = every * (torch.arange(len(y)) % 5 == 0)

    def backward(above):
        return torch.autograd.grad(loss, logits, above, retain_graph=True)

    interleaved(lambda: backward(some), {"all rows": lambda: backward(every)}, rounds=15, targets={"all rows": 3.0})


def memory(name, rows, hidden, classes):
    """Megabytes that a forward and backward take besides operands and gradients, in a process of its own."""
    script = Path(__file__).with_name("head_memory.py")
    command = [sys.executable, str(script), name, *map(str, (rows, hidden, classes))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return round(json.loads(done.stdout)["extra"] / 2**20, 1)
