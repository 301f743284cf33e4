"""Systematic sampling: each row is kept with a probability of its own, and the number of rows hardly varies."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_training.selection.types import WeightedIndices


def draw_systematic(probability: Tensor, start: float) -> WeightedIndices:
    """Draw rows without replacement, each with its probability, and weight them by the inverse of it.

    The number of rows drawn is the sum of the probabilities, rounded down or up.

    Args:
        probability: inclusion probability of each row, float32 [B], in [0, 1].
        start: uniform random number in [0, 1) that decides the whole draw.

    Returns:
        Positions of the drawn rows, ascending, with weights 1 / probability.
    """
    ends = probability.cumsum(0, dtype=torch.float64) + start
    index = (ends.floor() > (ends - probability).floor()).nonzero().squeeze(1)
    return WeightedIndices(index, 1.0 / probability[index])
