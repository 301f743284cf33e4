"""Crops of images for training and evaluation, by Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_training.arguments import check_integer, check_number
from sparse_training.data.pillow import find_pillow
from sparse_training.errors import UserError
from sparse_training.user_code import described

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels, of values in [0, 1]
TRIES = 10  # random boxes that are tried before the largest one in the middle


class RandomCropAndFlip:
    """Crops a random part of an image, resizes it to a square, and mirrors half of the images.

    The part has a random area and a random aspect ratio, as in Szegedy et al. (2015). All draws come from PyTorch's
    global generator.

    Args:
        size: height and width of the result in pixels, at least 1. It is never chosen for you.
        area: smallest and largest part of the image's area, in (0, 1]. Default (0.08, 1.0).
        ratio: smallest and largest width by height, above 0. Default (3 / 4, 4 / 3).
        flip: probability of mirroring left and right, in [0, 1]. Default 0.5.
        mean: mean of each channel, of values in [0, 1]. Default ImageNet's.
        std: standard deviation of each channel, likewise, above 0. Default ImageNet's.

    Raises:
        UserError: an argument out of range, or no Pillow.

    Example:
        >>> data = ImageFiles("imagenet/train", RandomCropAndFlip(224))
    """

    def __init__(
        self,
        size: int,
        *,
        area: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        self.size, self.scale, self.shift = check_integer("size", size, 1), *_normalisation(mean, std)
        if not 0.0 < area[0] <= area[1] <= 1.0:
            raise UserError(f"`area` must be two parts in (0, 1], the smaller one first, got {area}")
        if not 0.0 < ratio[0] <= ratio[1] < math.inf:
            raise UserError(f"`ratio` must be two numbers above 0, the smaller one first, got {ratio}")
        self.flip = check_number("flip", flip, "in [0, 1]", lambda x: 0 <= x <= 1)
        self.area, self.ratio = area, ratio
        find_pillow("RandomCropAndFlip")

    def __call__(self, image: Any) -> Tensor:
        """Transform one image.

        Args:
            image: Pillow's image, of mode RGB.

        Returns:
            float32 [3, size, size], normalised.
        """
        pillow, box = find_pillow("RandomCropAndFlip"), self._box(*_size(image))
        square = image.resize((self.size, self.size), pillow.Resampling.BILINEAR, box=box)
        if float(torch.rand(())) < self.flip:
            square = square.transpose(pillow.Transpose.FLIP_LEFT_RIGHT)
        return _normalised(square, self.scale, self.shift)

    def _box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Draw the part to crop: left, top, right and bottom."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for share, aspect, x, y in torch.rand(TRIES, 4, dtype=torch.float64).tolist():
            area = width * height * (self.area[0] + (self.area[1] - self.area[0]) * share)
            wide = math.exp(low + (high - low) * aspect)
            across, down = round(math.sqrt(area * wide)), round(math.sqrt(area / wide))
            if 0 < across <= width and 0 < down <= height:
                left, top = int(x * (width - across + 1)), int(y * (height - down + 1))
                return left, top, left + across, top + down
        across = min(width, max(1, round(height * self.ratio[1])))
        down = min(height, max(1, round(width / self.ratio[0])))
        left, top = (width - across) // 2, (height - down) // 2
        return left, top, left + across, top + down


class CenterCrop:
    """Resizes an image by its shorter side, keeping its proportions, and crops a square from the middle.

    Args:
        size: height and width of the result in pixels, at least 1. It is never chosen for you.
        resize: length of the shorter side before the crop, at least ``size``. Default: 8/7 of ``size``, such as 256
            for 224.
        mean: mean of each channel, of values in [0, 1]. Default ImageNet's.
        std: standard deviation of each channel, likewise, above 0. Default ImageNet's.

    Raises:
        UserError: an argument out of range, or no Pillow.
    """

    def __init__(
        self, size: int, *, resize: int | None = None, mean: Sequence[float] = MEAN, std: Sequence[float] = STD
    ) -> None:
        self.size, self.scale, self.shift = check_integer("size", size, 1), *_normalisation(mean, std)
        self.resize = round(size * 8 / 7) if resize is None else check_integer("resize", resize, size)
        find_pillow("CenterCrop")

    def __call__(self, image: Any) -> Tensor:
        """Transform one image.

        Args:
            image: Pillow's image, of mode RGB.

        Returns:
            float32 [3, size, size], normalised.
        """
        pillow, (width, height) = find_pillow("CenterCrop"), _size(image)
        # The square that remains, in pixels of the image: one resize in place of a resize and a crop.
        side = min(width, height) * self.size / self.resize
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        square = image.resize((self.size, self.size), pillow.Resampling.BILINEAR, box=box)
        return _normalised(square, self.scale, self.shift)


def _size(image: Any) -> tuple[int, int]:
    """Return width and height of Pillow's image.

    Raises:
        UserError: it is something else, such as a tensor.
    """
    size = getattr(image, "size", None)
    if not isinstance(size, tuple) or len(size) != 2:
        raise UserError(f"the image must be Pillow's, got {described(image)}")
    return size


def _normalisation(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return the factor and the summand that bring bytes to mean 0 and deviation 1."""
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0.0:
        raise UserError(f"`mean` and `std` must have 3 channels, and `std` be above 0, got {mean} and {std}")
    spread, centre = torch.tensor(std).reshape(3, 1, 1), torch.tensor(mean).reshape(3, 1, 1)
    return 1.0 / (255.0 * spread), -centre / spread


def _normalised(image: Any, scale: Tensor, shift: Tensor) -> Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return torch.addcmul(shift, pixels.to(torch.float32, memory_format=torch.contiguous_format), scale)
