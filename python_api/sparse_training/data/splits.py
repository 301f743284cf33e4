"""A loaded data set: two splits of 8-bit images, their class names and channel statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sparse_training.errors import UserError

ROOT_VARIABLE = "SPARSE_TRAINING_DATA"


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels, in memory on the CPU.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N], indices into ``ImageData.classes``.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(f"images must be uint8 [N, C, H, W], got {self.images.dtype} {list(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must be int64 [{len(self.images)}], got {self.labels.dtype} {list(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled image data set.

    Attributes:
        name: one of ``DATASETS``.
        train: training split.
        test: test split, never trained on.
        classes: name of each label.
        mean: mean of each channel, of the training images / 255.
        std: standard deviation of each channel, of the training images / 255; at least 1/255, so that dividing by it
            is safe.
        source: where the data came from, in words.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str

    @classmethod
    def from_splits(cls, name: str, train: Split, test: Split, classes: Sequence[str], source: str) -> ImageData:
        """Make a data set of two splits, with the channel statistics of its training images.

        Args:
            name: one of ``DATASETS``.
            train: training split.
            test: test split.
            classes: name of each label.
            source: where the data came from, in words.

        Returns:
            The data set.
        """
        mean, std = channel_statistics(train.images)
        return cls(name, train, test, tuple(classes), mean, std, source)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def channel_statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute the mean and population standard deviation of each channel of images / 255.

    Both come from a histogram of the 256 values: one pass over the bytes, no floating-point copy of the images, and
    the same digits in any order of summation.

    Args:
        images: uint8 [N, C, H, W].

    Returns:
        Means and standard deviations, one per channel.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.unbind(1):
        counts = torch.bincount(channel.reshape(-1), minlength=256).double()
        mean = (counts @ values) / counts.sum()
        variance = (counts @ (values - mean).square()) / counts.sum()
        means.append(mean.item())
        deviations.append(max(variance.sqrt().item(), 1 / 255))
    return tuple(means), tuple(deviations)


def missing_set(name: str, contents: str, roots: Sequence[Path], advice: str) -> UserError:
    """Make the error for a data set that is in none of ``roots``.

    Args:
        name: the data set.
        contents: what was looked for in each root.
        roots: the folders that were searched; empty if none was named.
        advice: where to get the set.

    Returns:
        The error, to be raised.
    """
    places = ", ".join(map(str, roots)) if roots else f"no folder: none given, {ROOT_VARIABLE} unset"
    return UserError(
        f"data set {name} not found: looked for {contents} in {places}; {advice}, "
        f"then give its folder as the data root or in {ROOT_VARIABLE}"
    )
