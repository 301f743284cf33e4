"""The whole gate call (score, decide, pack, control, count) against the published systems' form of it.

Theirs: cross_entropy and softmax entropy in several passes, a controller on the host fed by ``.item()``, and
boolean indexing for the rows kept. ``compiled`` is the same with the scoring compiled; ``gate_rows`` is our
scoring alone, so that what packing and control add shows.
"""

from __future__ import annotations

import peers
import pytest
import torch
from torch import Tensor

import sparse_kernels as sk
from sparse_training import Gate

RATE = 0.1


class Unfused:
    """A gate as published: the threshold on the host, moved by a PI law in Python."""

    def __init__(self, score=peers.unfused) -> None:
        self.score, self.threshold, self.rate, self.integral = score, torch.tensor(2.0), RATE, 0.0

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        mask, significance = self.score(logits, targets, self.threshold)
        kept = mask.sum().item()
        if kept < max(2, len(targets) // 100):  # its fallback
            mask = torch.zeros_like(mask)
            mask[significance.topk(max(2, len(targets) // 100)).indices] = True
        self.rate = 0.1 * kept / len(targets) + 0.9 * self.rate
        error = self.rate - RATE
        self.integral = min(100.0, max(-100.0, self.integral + error))
        moved = self.threshold.item() + 0.005 * error + 0.0001 * self.integral
        self.threshold.fill_(min(10.0, max(0.5, moved)))
        return torch.arange(len(targets))[mask]


@pytest.mark.parametrize(
    ("rows", "classes", "targets", "rounds", "calls"),
    [
        pytest.param(128, 10, {"unfused": 3}, 51, 100, id="gate-float32-128x10"),
        pytest.param(512, 10, {"unfused": 3}, 51, 50, id="gate-float32-512x10"),
        pytest.param(4096, 1000, {"unfused": 8}, 21, 2, id="gate-float32-4096x1000"),
    ],
)
def test_gate(interleaved, rows, classes, targets, rounds, calls):
    torch.manual_seed(0)
    logits, labels = 2 * torch.randn(rows, classes), torch.randint(0, classes, (rows,))
    gate = Gate(RATE, capacity=rows // 5)
    start = torch.quantile(peers.unfused(logits, labels, torch.tensor(0.0))[1], 1 - RATE)
    unfused, compiled = Unfused(), Unfused(torch.compile(peers.unfused, dynamic=False))
    for peer in (unfused, compiled):
        peer.threshold.copy_(start)
    with torch.no_grad():
        for _ in range(100):
            kept = gate(logits, labels)
        # No speed-up is printed unless both keep about the rows asked for.
        assert abs(int(kept.count) / rows - RATE) < 0.02
        assert abs(len(unfused(logits, labels)) / rows - RATE) < 0.02
        weights, threshold = {"loss": peers.LOSS, "entropy": peers.ENTROPY}, gate.threshold
        sides = {
            "unfused": lambda: unfused(logits, labels),
            "compiled": lambda: compiled(logits, labels),
            "gate_rows": lambda: sk.gate_rows(logits, labels, threshold, weights=weights),
        }
        row = interleaved(lambda: gate(logits, labels), sides, targets=targets, rounds=rounds, calls=calls)
    row.notes["us a call"] = round(1e6 * row.seconds["ours"]["p50"], 1)
    row.notes["of them gate_rows"] = round(1e6 * row.seconds["gate_rows"]["p50"], 1)
