"""The whole public call against the same decision unfused, eager and compiled.

Bytes that must move: the logits, once (work.py); the unfused form reads or writes about nine times as many.
"""

from __future__ import annotations

import math

import peers
import pytest
import timing
import torch
import work

import sparse_kernels as sk

LARGE = {"fastest read": 0.75, "eager": 20, "best compiled": 5}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("shape", "dim", "dtype", "targets", "rounds", "calls"),
    [
        pytest.param((1024, 32000), 1, torch.float32, LARGE, 9, 1, id="gate_rows-float32-1024x32000"),
        pytest.param((1024, 128256), 1, torch.float32, LARGE, 5, 1, id="gate_rows-float32-1024x128256"),
        pytest.param((4096, 1000), 1, torch.float32, {"best compiled": 3}, 21, 2, id="gate_rows-float32-4096x1000"),
        pytest.param((256, 1000), 1, torch.float32, {"best compiled": 3}, 31, 20, id="gate_rows-float32-256x1000"),
        pytest.param((512, 100), 1, torch.float32, {"best compiled": 2}, 51, 50, id="gate_rows-float32-512x100"),
        pytest.param((128, 10), 1, torch.float32, {"best compiled": 2}, 51, 100, id="gate_rows-float32-128x10"),
        pytest.param(
            (8, 21, 512, 512), 1, torch.float32, {"best compiled": 2}, 7, 1, id="gate_rows-float32-8x21x512x512"
        ),
        pytest.param((1024, 32000), 1, torch.bfloat16, {"eager": 15}, 9, 1, id="gate_rows-bfloat16-1024x32000"),
    ],
)
def test_gate_rows(interleaved, with_compiled, small, shape, dim, dtype, targets, rounds, calls):
    torch.manual_seed(0)
    if small:
        shape = tuple(min(size, 16) for size in shape)
    classes = shape[dim]
    logits = 2 * torch.randn(shape).to(dtype)
    labels = torch.randint(0, classes, shape[:dim] + shape[dim + 1 :])
    threshold = torch.tensor([0.9 * math.log(classes)])
    forms = with_compiled(peers.GATES)

    def ours():
        return sk.gate_rows(logits, labels, threshold, weights=peers.WEIGHTS, dim=dim)

    with torch.no_grad():
        gated = ours()
        tolerance = 1e-4 if dtype is torch.float32 else 0.03  # theirs are rounded to the logits' type
        for name, form in forms.items():  # no speed-up is printed unless the results agree
            mask, significance = form(logits, labels, threshold, dim)
            torch.testing.assert_close(
                gated.significance,
                significance.float(),
                rtol=tolerance,
                atol=tolerance,
                msg=lambda m, n=name: f"{n}: {m}",
            )
            unsure = (gated.significance - threshold).abs() <= tolerance * (1 + threshold)
            assert ((gated.mask == mask) | unsure).all()
        sides = {name: (lambda form=form: form(logits, labels, threshold, dim)) for name, form in forms.items()}
        interleaved(
            ours, sides | timing.reads(logits), targets=targets, rounds=rounds, calls=calls,
            notes=work.forward(logits, dim, outputs=0, gate=True),
        )  # fmt: skip
