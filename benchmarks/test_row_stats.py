"""Row statistics: all eight at once, the gradient of two, and the same work by other packages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import peers
import pytest
import timing
import torch
import work

import sparse_kernels as sk

CPU = torch.device("cpu")


def agree(name, ours, theirs, tolerance):
    """No speed-up is printed unless the results agree; ``tolerance`` is a share of the largest value."""
    ours, theirs = ours.float(), theirs.float()
    torch.testing.assert_close(
        ours, theirs, rtol=tolerance, atol=tolerance * float(ours.abs().max()), msg=lambda m: f"{name}: {m}"
    )


def rows_of(shape, dtype, small):
    torch.manual_seed(0)
    if small:
        shape = tuple(min(size, 16) for size in shape)
    return 2 * torch.randn(shape).to(dtype), torch.randint(0, shape[-1], shape[:-1])


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("shape", "rounds"),
    [
        pytest.param((1024, 32000), 7, id="row_stats-all-float32-1024x32000"),
        pytest.param((4096, 1000), 15, id="row_stats-all-float32-4096x1000"),
    ],
)
def test_all_outputs(interleaved, with_compiled, small, shape, rounds):
    logits, labels = rows_of(shape, torch.float32, small)
    forms = with_compiled(peers.STATISTICS)

    def ours():
        return sk.row_stats(logits, labels, outputs=sk.STATISTICS)

    with torch.no_grad():
        found = ours()
        for form, function in forms.items():
            for name, theirs in zip(sk.STATISTICS, function(logits, labels), strict=True):
                agree(f"{form}: {name}", getattr(found, name), theirs, 1e-4)
        sides = {name: (lambda form=form: form(logits, labels)) for name, form in forms.items()}
        interleaved(
            ours, sides | timing.reads(logits), rounds=rounds, notes=work.forward(logits, outputs=8, flops=work.ALL)
        )


def gradient_cases(*cases):
    """``kept``: the gradient's memory is that of the last one; otherwise the system maps it anew."""
    return [
        pytest.param(
            shape, dtype, rounds, calls,
            id=f"forward-backward-{'kept-' if kept else ''}{str(dtype)[6:]}-{shape[0]}x{shape[1]}",
            marks=[pytest.mark.keeps_freed_memory] if kept else [],
        )
        for shape, kept, rounds, calls in cases
        for dtype in (torch.float32, torch.bfloat16)
    ]  # fmt: skip


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("shape", "dtype", "rounds", "calls"),
    gradient_cases(
        ((1024, 32000), False, 7, 1),
        ((1024, 32000), True, 7, 1),
        ((4096, 1000), False, 15, 1),
        ((65536, 10), False, 15, 4),
        ((3000, 10), False, 31, 50),
    ),
)
def test_forward_and_backward(interleaved, with_compiled, small, shape, dtype, rounds, calls):
    logits, labels = rows_of(shape, dtype, small)
    logits.requires_grad_()
    weights = torch.rand(2, len(labels))

    def gradient(function):
        loss, entropy = function(logits, labels)
        return torch.autograd.grad((loss, entropy), logits, list(weights.to(loss.dtype)))[0]

    def pair(logits, labels):
        return sk.row_stats(logits, labels)[:2]

    forms = with_compiled(peers.PAIRS)
    found = gradient(pair)
    for name, form in forms.items():
        agree(name, found, gradient(form), 1e-4 if dtype is torch.float32 else 0.03)
    interleaved(
        lambda: gradient(pair),
        {name: (lambda form=form: gradient(form)) for name, form in forms.items()} | timing.reads(logits),
        targets={"eager": 5, "best compiled": 2},
        rounds=rounds,
        calls=calls,
        notes=work.forward_backward(logits),
    )


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("shape", "rounds"), [pytest.param((8, 256, 151936), 3, id="row_stats-bfloat16-2048x151936-packages")]
)
def test_against_packages(interleaved, small, shape, rounds):
    """TRL's pair makes the same two numbers; Liger's cross-entropy the loss alone."""
    logits, labels = rows_of(shape, torch.bfloat16, small)
    functions, left_out = {}, {}
    wanted = {"TRL's pair": peers.trl_eager, "TRL's kernel": peers.trl, "Liger (loss alone)": peers.liger}
    peers.add(functions, left_out, CPU, **wanted)
    notes = {**work.forward(logits), "left out": left_out}
    sides = ("ours", "trl") if "TRL's pair" in functions else ("ours",)
    if Path("/proc/self/status").exists():
        extra = {side: extra_memory(side, logits.shape) for side in sides}
        notes |= {f"peak extra memory of {side}, share of the logits": value for side, value in extra.items()}
        assert small or extra["ours"] < 0.01

    def ours():
        return sk.row_stats(logits, labels)[:2]

    with torch.no_grad():
        found = ours()
        for name, function in functions.items():
            theirs = function(logits, labels)
            for a, b in zip(found, theirs if isinstance(theirs, tuple) else (theirs,), strict=False):
                agree(name, a, b, 0.03)
        sides = {name: (lambda f=function: f(logits, labels)) for name, function in functions.items()}
        interleaved(
            ours, sides | timing.reads(logits), rounds=rounds, notes=notes,
            targets={"TRL's pair": 10.0} if "TRL's pair" in functions else {},
        )  # fmt: skip


def extra_memory(side: str, shape: tuple[int, ...]) -> float:
    """Growth of the resident high-water mark during one call in a process of its own, over the logits' bytes."""
    script = Path(__file__).with_name("peak_memory.py")
    command = [sys.executable, str(script), side, *map(str, shape)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)["share"])
