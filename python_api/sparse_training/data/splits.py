"""A loaded data set: two splits of 8-bit images, their class names and channel statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from sparse_training.arguments import check_number
from sparse_training.errors import UserError

ROOT_VARIABLE = "SPARSE_TRAINING_DATA"
VALIDATION = 0.1  # share of the training rows that is held out for choices
VALIDATION_SEED = 20_241


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

    def take(self, index: torch.Tensor) -> Split:
        """Copy some rows, in the order of ``index``, int64 [n]."""
        return Split(self.images[index], self.labels[index])


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


class HeldOut(NamedTuple):
    """Rows to train on and rows to choose by: int64 indices, ascending, of a training split."""

    train: torch.Tensor
    validation: torch.Tensor


def hold_out(labels: torch.Tensor, *, fraction: float = VALIDATION, seed: int = VALIDATION_SEED) -> HeldOut:
    """Choose the rows of a validation split; the same rows for the same labels and seed.

    The rows are drawn at random and evenly along the sorted labels, so each class, or each range of values, has its
    share to within a row.

    Args:
        labels: class or value of each training row, [N].
        fraction: share of the rows to hold out, in (0, 1). Default 0.1.
        seed: seed of the draw. Default 20241.

    Returns:
        The indices of both parts, at least one row each.

    Raises:
        UserError: a fraction out of range, or fewer than two rows.
    """
    check_number("fraction", fraction, "in (0, 1)", lambda x: 0 < x < 1)
    rows = len(labels)
    if rows < 2:
        raise UserError(f"a validation split needs at least 2 training rows, got {rows}")
    held = min(max(1, round(fraction * rows)), rows - 1)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]
    is_held = torch.zeros(rows, dtype=torch.bool)
    is_held[order[(torch.arange(held) * 2 + 1) * rows // (2 * held)]] = True
    return HeldOut((~is_held).nonzero().squeeze(1), is_held.nonzero().squeeze(1))


def split_validation(
    data: ImageData, *, fraction: float = VALIDATION, seed: int = VALIDATION_SEED
) -> tuple[ImageData, Split]:
    """Take a validation split from the training split, for choices; the test split then decides nothing.

    Example:
        >>> data, validation = split_validation(load_data("digits"))

    Args:
        data: the data set.
        fraction: share of the training rows to hold out, in (0, 1), evenly from each class. Default 0.1.
        seed: seed of the draw. Default 20241.

    Returns:
        The data set without those rows, its channel statistics made again, and the validation split.

    Raises:
        UserError: a fraction out of range, or fewer than two training rows.
    """
    held = hold_out(data.train.labels, fraction=fraction, seed=seed)
    train = data.train.take(held.train)
    rest = ImageData.from_splits(data.name, train, data.test, data.classes, data.source)
    return rest, data.train.take(held.validation)


def take_part(data: ImageData, rows: int, *, seed: int = VALIDATION_SEED) -> ImageData:
    """Keep some of the training rows, drawn at random and evenly from each class; the test split stays whole.

    Args:
        data: the data set.
        rows: training rows to keep, from 1 to all of them.
        seed: seed of the draw. Default 20241.

    Returns:
        The data set with fewer training rows, or as it is where all are kept.

    Raises:
        UserError: a number out of range.
    """
    available = len(data.train)
    if not 1 <= rows <= available:
        raise UserError(f"`rows` must be 1 to {available}, the training rows of {data.name}, got {rows}")
    if rows == available:
        return data
    kept = hold_out(data.train.labels, fraction=rows / available, seed=seed).validation
    return ImageData.from_splits(data.name, data.train.take(kept), data.test, data.classes, data.source)


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
