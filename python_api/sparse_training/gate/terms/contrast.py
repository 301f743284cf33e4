"""Statistics of images."""

from __future__ import annotations

from torch import Tensor

from sparse_training.errors import UserError
from sparse_training.gate.terms.base import ScaledTerm
from sparse_training.gate.terms.context import Context


class Contrast(ScaledTerm):
    """Standard deviation of an image's pixels, on its running scale.

    Args:
        weight: as for ``Term``.

    Raises:
        UserError: at a batch, the inputs are no images.
    """

    needs = ("inputs",)

    def check(self, context: Context) -> None:
        """Check that the inputs are images."""
        images = context.inputs
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
            shape = f"shape {list(images.shape)}" if isinstance(images, Tensor) else f"type {type(images).__name__}"
            raise UserError(f"the term Contrast needs images, float [B, C, H, W], got inputs of {shape}")

    def magnitude(self, context: Context) -> Tensor:
        """Standard deviation of each image."""
        images: Tensor = context.inputs
        return images.flatten(1).float().std(1, correction=0)
