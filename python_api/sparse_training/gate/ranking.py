"""Decisions that rank the rows of a batch, besides the comparison with a threshold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_kernels.philox import uniform


def break_ties(significance: Tensor, valid: Tensor, *, seed: int, step: int | Tensor) -> Tensor:
    """Put equal rows in a random order: each valid row gains up to 2^-14 of the mean significance.

    Args:
        significance: floating, any shape.
        valid: bool, the same shape: the rows that count.
        seed: seed of the order.
        step: number of the batch, which determines its order.

    Returns:
        The significance with its ties broken.
    """
    u = uniform(significance.numel(), seed=seed, step=step, device=significance.device).reshape(significance.shape)
    size = torch.where(valid & significance.isfinite(), significance, 0).abs().sum() / valid.sum().clamp(min=1)
    # Rows that are all 0 have a mean of 0: 1e-20 keeps their order random.
    return torch.where(valid, significance + u * (2.0**-14 * size.clamp(min=1e-20)), significance)


def keep_at_least(fraction: float, mask: Tensor, significance: Tensor, valid: Tensor) -> Tensor:
    """Add the most significant rows to a mask, so that it keeps at least a fraction of the valid rows.

    Args:
        fraction: least fraction of the valid rows to keep, in [0, 1].
        mask: bool, any shape: the rows kept so far, the most significant ones.
        significance: floating, the same shape.
        valid: bool, the same shape: the rows that count.

    Returns:
        The mask with the rows added. Nothing waits for the device.
    """
    # 1e-4 of a row: 0.1 of 30 rows is 3, not the 4 of a rounded-up product.
    needed = torch.ceil(fraction * valid.sum() - 1e-4)
    most = math.ceil(fraction * mask.numel() - 1e-4)
    ranked = torch.topk(significance.masked_fill(~valid, -math.inf).flatten(), most).indices
    taken = torch.arange(most, device=mask.device) < needed
    top = torch.zeros_like(mask).flatten().scatter(0, ranked, taken).reshape(mask.shape) & valid
    return mask | top  # where enough is kept, the top rows are among them
