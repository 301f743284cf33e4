"""Decisions that rank the rows of a batch, besides the comparison with a threshold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_kernels import GatedRows
from sparse_kernels.philox import uniform
from sparse_training.errors import UserError


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


def rank(
    gated: GatedRows, valid: Tensor, threshold: Tensor, *,
    ties: str, decision: str, rate: float, floor: float, seed: int, step: int | Tensor,
) -> GatedRows:  # fmt: skip
    """Apply the decisions of a gate that rank rows; the names are those of ``Gate``.

    Args:
        gated: the rows, as compared with the threshold.
        valid: bool, the rows that count.
        threshold: the threshold, one element.
        ties: "random" to put equal rows in a random order.
        decision: "topk" for the most significant ``rate`` of the rows.
        rate: fraction of the rows to keep.
        floor: least fraction of the rows to keep.
        seed: seed of the order of equal rows.
        step: number of the batch.
    """
    mask, significance = gated.mask, gated.significance
    valid = valid & ~significance.isnan()
    if ties == "random":
        significance = break_ties(significance, valid, seed=seed, step=step)
        mask = (significance > threshold) & valid
    if decision == "topk":
        mask = keep_at_least(rate, torch.zeros_like(mask), significance, valid)
    elif floor:
        mask = keep_at_least(floor, mask, significance, valid)
    return gated._replace(mask=mask, significance=significance)


def certain_rows(significance: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Make logits and targets whose loss and entropy are 0, so that an offset alone decides.

    Args:
        significance: real numbers [rows], for the shape and device.
        ignore_index: target of the rows that do not count, which is avoided by a second class of probability 1.

    Raises:
        UserError: the significance is complex.
    """
    if significance.is_complex():
        raise UserError(f"`significance` must be real numbers, got {significance.dtype}")
    label = 1 if ignore_index == 0 else 0
    logits = torch.zeros(significance.shape[0], label + 1, device=significance.device)
    logits[:, :label] = -30.0
    return logits, torch.full(significance.shape, label, device=significance.device)
