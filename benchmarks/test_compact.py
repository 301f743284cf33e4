"""From a mask to packed rows, against what PyTorch offers for it."""

from __future__ import annotations

import pytest
import torch

import sparse_kernels as sk


@pytest.mark.parametrize(
    ("rows", "shape", "dtype", "rounds", "calls"),
    [
        pytest.param(4096, (3, 32, 32), torch.float32, 15, 4, id="pack-4096x3x32x32-float32"),
        pytest.param(65536, (768,), torch.bfloat16, 9, 1, id="pack-65536x768-bfloat16"),
        pytest.param(128, (3, 32, 32), torch.float32, 31, 50, id="pack-128x3x32x32-float32"),
    ],
)
def test_mask_to_packed_rows(interleaved, rows, shape, dtype, rounds, calls):
    torch.manual_seed(0)
    batch, mask = torch.randn(rows, *shape).to(dtype), torch.rand(rows) < 0.1
    sides = {
        "x[mask]": lambda: batch[mask],
        "index_select(nonzero)": lambda: batch.index_select(0, mask.nonzero().squeeze(-1)),
    }

    def ours():
        return sk.compact(mask).take(batch)

    assert all(torch.equal(ours(), side()) for side in sides.values())
    interleaved(ours, sides, targets=dict.fromkeys(sides, 1.0), rounds=rounds, calls=calls)


@pytest.mark.parametrize("rows", [pytest.param(2**24, id="compact-16M-flags")])
def test_indices_alone(interleaved, rows):
    torch.manual_seed(0)
    mask = torch.rand(rows) < 0.1
    assert torch.equal(sk.compact(mask).index, mask.nonzero().squeeze(-1))
    interleaved(lambda: sk.compact(mask), {"nonzero": lambda: mask.nonzero()}, targets={"nonzero": 5.0}, rounds=9)
