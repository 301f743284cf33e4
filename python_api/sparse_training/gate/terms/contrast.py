"""Statistics of images."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from sparse_training.errors import UserError
from sparse_training.gate.terms.base import ScaledTerm
from sparse_training.gate.terms.context import Context

NEIGHBOURS = 3  # side of the square around a pixel


class Contrast(ScaledTerm):
    """Standard deviation of an image's pixels, on its running scale.

    Where rows are pixels, it is that of the 3 x 3 pixels around each, all channels together.

    Args:
        weight: as for ``Term``.

    Raises:
        UserError: at a batch, the inputs are no images, or the rows neither images nor their pixels.
    """

    needs = ("inputs",)

    def check(self, context: Context) -> None:
        """Check that the inputs are images, and the rows images or their pixels."""
        images = context.inputs
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
            shape = f"shape {list(images.shape)}" if isinstance(images, Tensor) else f"type {type(images).__name__}"
            raise UserError(f"the term Contrast needs images, float [B, C, H, W], got inputs of {shape}")
        count, _, height, width = images.shape
        if context.rows not in (count, count * height * width):
            raise UserError(
                f"the term Contrast needs a target for each image or for each of its pixels, got {context.rows} for "
                f"images of shape {list(images.shape)}; use a significance without it"
            )

    def magnitude(self, context: Context) -> Tensor:
        """Standard deviation of each image, or around each pixel."""
        images: Tensor = context.inputs.float()
        if context.rows == images.shape[0]:
            return images.flatten(1).std(1, correction=0)
        centred = images - images.mean((1, 2, 3), keepdim=True)  # squares of a large mean would cancel
        mean = _around(centred.mean(1, keepdim=True))
        return (_around(centred.square().mean(1, keepdim=True)) - mean.square()).clamp(min=0.0).sqrt().flatten()


def _around(values: Tensor) -> Tensor:
    """Mean over each pixel's neighbours within the image."""
    return F.avg_pool2d(values, NEIGHBOURS, stride=1, padding=NEIGHBOURS // 2, count_include_pad=False)
