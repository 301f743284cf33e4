"""Batches for tests of the gate."""

from __future__ import annotations

import torch
from torch import Tensor

CLASSES = 10


def batches(count: int, rows: int = 512, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (3 * torch.randn(rows, CLASSES, generator=g), torch.randint(0, CLASSES, (rows,), generator=g))
        for _ in range(count)
    ]
