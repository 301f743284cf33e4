"""Shapes of images and of what pooling leaves of them."""

from __future__ import annotations

from sparse_training.errors import UserError

Shape = tuple[int, int, int]


def pooled_shape(name: str, shape: Shape, pools: int) -> Shape:
    """Return the shape that 2x2 pools leave, channels unchanged.

    Args:
        name: name of the model, for the error.
        shape: (C, H, W) of one image.
        pools: number of pools.

    Returns:
        (C, H, W) after the pools.

    Raises:
        UserError: images too small for the pools.
    """
    channels, height, width = shape
    smallest = 2**pools
    if min(height, width) < smallest:
        raise UserError(
            f"the model {name} halves images {pools} times; they must have at least {smallest}x{smallest} pixels, "
            f"got {height}x{width}"
        )
    return channels, height // smallest, width // smallest
