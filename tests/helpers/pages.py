"""Python blocks of Markdown pages, and names that they may use."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parents[2]


def blocks(page: Path, language: str = "python") -> list[str]:
    """The fenced blocks of a page in one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def names(rows: int = 512) -> dict[str, Any]:
    """A small problem: a model, data, loaders, a batch, and what a page takes for imported."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(rows, 20), torch.randint(0, 10, (rows,))
    dataset = TensorDataset(inputs, labels)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 10))
    return {
        "torch": torch,
        "nn": nn,
        "F": F,
        "DataLoader": DataLoader,
        "dataset": dataset,
        "labels": labels,
        "inputs": inputs[:256],
        "targets": labels[:256],
        "loader": DataLoader(dataset, batch_size=128),
        "test_loader": DataLoader(dataset, batch_size=128),
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
    }
