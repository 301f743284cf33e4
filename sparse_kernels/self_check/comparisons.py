"""Comparisons of a result with the float64 reference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Comparison(NamedTuple):
    """Outcome for one tensor of one call."""

    what: str
    """The call and its output."""
    agrees: bool
    """True if the result is within the allowed error everywhere."""
    error: float
    """Largest error over 1 + |value|; infinite where a NaN, an infinity or an exact value differs."""
    torch_error: float
    """The same of PyTorch at the same precision; 0 where only equality agrees."""


def _errors(found: Tensor, exact: Tensor) -> Tensor:
    """Return the error of each element over 1 + |value|; infinite where what is not finite differs."""
    error = (found - exact).abs() / (1 + exact.abs())
    same = (found == exact) | (found.isnan() & exact.isnan())
    different = ~found.isfinite() | ~exact.isfinite()
    return torch.where(same, 0.0, torch.where(different, torch.inf, error))


def _largest(errors: Tensor) -> float:
    return float(errors.max()) if errors.numel() else 0.0


def near(what: str, found: Tensor, exact: Tensor, plain: Tensor, tiny: float) -> Comparison:
    """Compare with a tolerance: twice PyTorch's own error at the same precision, and a few roundings.

    Args:
        what: the call and its output.
        found: on any device.
        exact: float64, on the CPU.
        plain: PyTorch's result at the precision of ``found``, on the CPU.
        tiny: the few roundings, relative to 1 + |value|.
    """
    if found.shape != exact.shape or found.dtype is not plain.dtype:
        return Comparison(f"{what}: {found.dtype} of shape {tuple(found.shape)}", False, torch.inf, 0.0)
    ours, theirs = (_errors(x.detach().cpu().double(), exact) for x in (found, plain))
    finite = torch.where(theirs.isfinite(), theirs, 0.0)  # an overflow of PyTorch's own allows nothing
    return Comparison(what, bool((ours <= 2 * finite + tiny).all()), _largest(ours), _largest(theirs))


def equal(what: str, found: Tensor, exact: Tensor) -> Comparison:
    """Compare bit by bit, but that NaN equals NaN; PyTorch's own error is 0.

    Args:
        what: the call and its output.
        found: on any device.
        exact: on the CPU.
    """
    found = found.detach().cpu()
    same = found.dtype is exact.dtype and found.shape == exact.shape
    if same and exact.dtype.is_floating_point:
        same = bool(((found == exact) | (found.isnan() & exact.isnan())).all())
    elif same:
        same = torch.equal(found, exact)
    return Comparison(what, same, 0.0 if same else torch.inf, 0.0)
