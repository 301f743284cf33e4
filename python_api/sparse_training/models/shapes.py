"""Shapes of images."""

from __future__ import annotations

from sparse_training.errors import UserError

Shape = tuple[int, int, int]


def _pooled(name: str, shape: Shape, pools: int) -> Shape:
    """The shape after that many 2x2 pools, channels unchanged."""
    channels, height, width = shape
    smallest = 2**pools
    if min(height, width) < smallest:
        raise UserError(
            f"model {name} halves images {pools} times: at least {smallest}x{smallest} pixels "
            f"wanted, got {height}x{width}"
        )
    return channels, height // smallest, width // smallest
