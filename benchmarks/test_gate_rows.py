"""The whole public call against the same decision unfused, eager and compiled.

Bytes that must move: 4 rows classes (float32). The fused pass reads them once; the unfused form
reads or writes about nine times as many.
"""

from __future__ import annotations

import peers
import pytest
import torch

import sparse_kernels as sk

WEIGHTS = {"loss": peers.LOSS, "entropy": peers.ENTROPY}


@pytest.mark.parametrize(
    ("rows", "classes", "targets", "rounds", "calls"),
    [
        pytest.param(1024, 32000, {"eager": 20, "best compiled": 5}, 9, 1, id="gate_rows-float32-1024x32000"),
        pytest.param(4096, 1000, {"eager": 8, "best compiled": 2.5}, 21, 2, id="gate_rows-float32-4096x1000"),
        pytest.param(128, 10, {"eager": 3, "best compiled": 2}, 51, 100, id="gate_rows-float32-128x10"),
    ],
)
def test_gate_rows(interleaved, rows, classes, targets, rounds, calls):
    torch.manual_seed(0)
    logits, labels = 2 * torch.randn(rows, classes), torch.randint(0, classes, (rows,))
    threshold = torch.tensor([0.9 * float(torch.tensor(float(classes)).log())])
    forms = {"eager": peers.unfused, "eager_log_softmax": peers.unfused_log_softmax}
    compiled = {
        f"compiled{name.removeprefix('eager')}": torch.compile(form, dynamic=False) for name, form in forms.items()
    }

    def ours():
        return sk.gate_rows(logits, labels, threshold, weights=WEIGHTS)

    with torch.no_grad():
        gated = ours()
        for name, form in {**forms, **compiled}.items():  # no speed-up is printed unless the results agree
            mask, significance = form(logits, labels, threshold)
            torch.testing.assert_close(gated.significance, significance, rtol=1e-4, atol=1e-4, msg=name)
            assert (gated.mask != mask).sum() <= rows // 1000 + 1
        sides = {
            name: (lambda form=form: form(logits, labels, threshold)) for name, form in {**forms, **compiled}.items()
        }
        # The floor: a read of the same bytes, by PyTorch's own reduction.
        sides["read"] = lambda: logits.sum()
        row = interleaved(ours, sides, targets=targets, rounds=rounds, calls=calls)
    row.notes["share of the bandwidth of torch.sum over the same bytes"] = round(row.ratios["read"], 2)
