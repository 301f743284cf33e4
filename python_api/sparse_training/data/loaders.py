"""Loaders of a data set, of images or of other tensors."""

from __future__ import annotations

from typing import Any

import torch

from sparse_training.data.resident import ResidentLoader
from sparse_training.data.splits import ImageData, Split
from sparse_training.data.tensors import TensorData, TensorLoader, TensorSplit
from sparse_training.ranks import rank_and_world_size

EVALUATION_BATCH = 1000  # rows


def make_loader(split: Split | TensorSplit, data: ImageData | TensorData, **options: Any) -> ResidentLoader:
    """Make a loader of a split, of the data's kind.

    Args:
        split: the split.
        data: the data set, whose channel statistics serve all splits.
        options: further arguments of ``ResidentLoader``.
    """
    if isinstance(data, TensorData):
        return TensorLoader(split, **options)
    return ResidentLoader(split, mean=data.mean, std=data.std, **options)


def evaluation_loader(
    data: ImageData | TensorData, device: torch.device, split: Split | TensorSplit | None = None
) -> ResidentLoader:
    """Make a loader of a split in order, in batches of at most 1,000 rows; each process has its part.

    Args:
        data: the data set.
        device: PyTorch device that holds the rows.
        split: split of the data. Default: the test split.
    """
    split = data.test if split is None else split
    rows = min(EVALUATION_BATCH, -(-len(split) // rank_and_world_size()[1]))
    return make_loader(split, data, batch_size=rows, shuffle=False, device=device)
