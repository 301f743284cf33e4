"""Shapes of images and of what pooling leaves of them."""

from __future__ import annotations

from sparse_training.errors import UserError

Shape = tuple[int, int, int]


def pooled_shape(name: str, shape: Shape, pools: int) -> Shape:
    """Return the shape after ``pools`` 2x2 pools, channels unchanged; ``name`` is the model's, for the error."""
    channels, height, width = shape
    smallest = 2**pools
    if min(height, width) < smallest:
        raise UserError(
            f"the model {name} halves images {pools} times; they must have at least {smallest}x{smallest} pixels, "
            f"got {height}x{width}"
        )
    return channels, height // smallest, width // smallest
