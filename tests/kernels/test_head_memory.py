"""Memory that a head takes: of the logits a share, no more than PyTorch's chunks, and kept rows' as they come."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import profile

import sparse_kernels as sk
from sparse_training import Gate, Significance

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "head_memory.py"
CLOSE = {"rtol": 2e-2, "atol": 1e-3}  # gradients of 16-bit weights, of products in another order
SHAPE = (2048, 128, 32_768)  # the logits are 16 times the weight


def measured(side):
    command = [sys.executable, str(SCRIPT), side, *map(str, SHAPE)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_extra_memory_is_a_share_of_the_logits_and_below_pytorchs():
    ours, fifth = measured("ours"), measured("ours-quantile")
    assert ours["extra"] < 0.7 * ours["logits"]
    assert fifth["extra"] < 0.7 * fifth["logits"]
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        assert ours["extra"] < measured("torch mean")["extra"] * 1.1


def operands(rows, hidden, classes, dtype):
    torch.manual_seed(0)
    x, w = torch.randn(rows, hidden).to(dtype), (torch.randn(classes, hidden) / hidden**0.5).to(dtype)
    return x.requires_grad_(), w.requires_grad_(), torch.randint(0, classes, (rows,))


def gate_at(threshold):
    return Gate(rate=0.2, significance=Significance(loss=1.0), threshold=float(threshold))


def test_a_gates_rows_take_no_more_memory_at_once_than_freed_memory_lasts():
    """A few rows of 1,024 are kept: room for all would be 67 MB, which a C library gives back and takes anew."""
    x, w, y = operands(1024, 512, 32_768, torch.bfloat16)
    w.requires_grad_(False)
    with torch.no_grad():
        threshold = sk.linear_row_stats(x, w, y).loss.quantile(0.8)
    with profile(profile_memory=True) as found:
        sk.selective_linear_cross_entropy(x, w, y, select=gate_at(threshold)).loss.backward()
    assert max(event.self_cpu_memory_usage for event in found.events()) < 32 << 20


def test_rows_that_are_kept_late_and_in_number_have_their_gradients():
    """The first tile keeps a few, so that memory for a few is taken; the next keeps more than it holds."""
    x, w, y = operands(512, 256, 98_304, torch.bfloat16)
    with torch.no_grad():
        y[:256] = (x[:256] @ w.t()).argmax(-1)  # learned
        y[::32] = 0
        losses = sk.linear_row_stats(x, w, y).loss
    kept = losses > 8.0
    assert 0 < kept[:256].sum() < 40
    assert kept[256:].sum() > 200
    loss, mask = sk.selective_linear_cross_entropy(x, w, y, select=gate_at(8.0))
    right, _ = sk.selective_linear_cross_entropy(x, w, y, select=kept)
    assert torch.equal(mask, kept)
    for ours, theirs in zip(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(right, (x, w)), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("classes", [51, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows_of_whole_words_and_others(classes, dtype):
    x, w, y = operands(40, 16, classes, dtype)
    with torch.no_grad():
        losses = sk.linear_row_stats(x, w, y).loss
    threshold = losses.median()
    loss, mask = sk.selective_linear_cross_entropy(x, w, y, select=gate_at(threshold), chunk=13)
    right, _ = sk.selective_linear_cross_entropy(x, w, y, select=losses > threshold)
    assert 0 < mask.sum() < 40
    for ours, theirs in zip(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(right, (x, w)), strict=True):
        torch.testing.assert_close(ours, theirs, **(CLOSE if dtype is torch.bfloat16 else {}))
