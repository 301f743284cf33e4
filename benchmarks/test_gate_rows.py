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
FEW = {"best compiled": 3}
PIXELS = {torch.float32: {"fastest read": 0.6, "best compiled": 2}, torch.bfloat16: {"fastest read": 0.45}}


def case(shape, dtype, targets, rounds, calls, dim=1):
    name = f"gate_rows-{str(dtype).removeprefix('torch.')}-{'x'.join(map(str, shape))}"
    return pytest.param(shape, dim, dtype, targets, rounds, calls, id=name)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("shape", "dim", "dtype", "targets", "rounds", "calls"),
    [
        case((1024, 32000), torch.float32, LARGE, 9, 1),
        case((1024, 128256), torch.float32, LARGE, 5, 1),
        case((4096, 1000), torch.float32, {"best compiled": 3}, 21, 2),
        case((256, 1000), torch.float32, {"best compiled": 3}, 31, 20),
        case((512, 100), torch.float32, FEW, 51, 50),
        case((128, 10), torch.float32, {"best compiled": 2}, 51, 100),
        case((1024, 32000), torch.bfloat16, {"eager": 15, "fastest read": 0.55}, 9, 1),
        *(
            case(shape, dtype, PIXELS[dtype], 7, 1)
            for shape in ((8, 21, 512, 512), (4, 19, 512, 1024), (2, 150, 256, 256))
            for dtype in PIXELS
        ),
        case((512, 100), torch.bfloat16, {}, 51, 50),
        *(
            case(shape, dtype, targets, 31, calls)
            for shape, targets, calls in (((3000, 10), FEW, 50), ((65536, 10), {}, 5), ((65536, 100), {}, 2))
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        ),
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
