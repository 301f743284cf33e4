"""Least work of the row statistics: bytes moved and operations, for the roofline (docs/design/row_stats.md)."""

from __future__ import annotations

import torch

# A float32 operation each, a fused multiply-add two; the exponential is 13 (range reduction 2, a polynomial of degree
# 5, a scaling). Forward: maximum, shift and scale, exponential, two sums. All eight: squares, the second largest and
# the argmax, label smoothing's sum. Backward: shift and scale, exponential, 1/S, log p + H, two products, two sums.
FORWARD, ALL, BACKWARD = 19, 25, 24


def forward(
    logits: torch.Tensor, dim: int = -1, outputs: int = 2, gate: bool = False, flops: int = FORWARD
) -> dict[str, int]:
    """The logits once; for each row an int64 target, 4 bytes an output (8 for the argmax), and the gate's two."""
    rows = logits.numel() // logits.shape[dim]
    each = 8 + 4 * outputs + (4 if outputs == 8 else 0) + (5 if gate else 0)
    size = logits.numel() * logits.element_size()
    return {"bytes": size + rows * each, "logits": size, "flops": flops * logits.numel()}


def forward_backward(logits: torch.Tensor) -> dict[str, int]:
    """The logits twice and their gradient once; what a row saves and is given besides."""
    rows = logits.numel() // logits.shape[-1]
    size = logits.numel() * logits.element_size()
    return {
        "bytes": 3 * size + rows * (2 * 8 + 4 * (2 + 2 + 2 + 3)),
        "logits": size,
        "flops": (FORWARD + BACKWARD) * logits.numel(),
    }
