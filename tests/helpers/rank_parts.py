"""What several processes run, for tests of the trainer."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

RANKS, ROWS, CLASSES = 2, 45, 4  # a rank has 23 rows, the other 22


PLAIN = {"dense_start": 0, "dense_end": 0, "schedule": "constant", "lr": 0.1}


def split(rows: int = ROWS) -> SimpleNamespace:
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(0, CLASSES, (rows,), generator=g)
    images = torch.randint(0, 120, (rows, 1, 4, 4), dtype=torch.uint8, generator=g)
    images[:, 0, 0, :] += (30 * labels)[:, None].to(torch.uint8)
    return SimpleNamespace(images=images, labels=labels)


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


def network(seed: int = 0) -> nn.Module:
    """In float64, so that a sum in another order differs by 1e-16."""
    torch.manual_seed(seed)
    return nn.Sequential(Double(), nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def weights(model: nn.Module) -> list[list[float]]:
    return [value.flatten().tolist() for value in model.state_dict().values()]
