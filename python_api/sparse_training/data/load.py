"""Data sets by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from sparse_training.data import cifar10, digits, fashion_mnist, imagefolder
from sparse_training.data.image_files import ImageFiles
from sparse_training.data.splits import ROOT_VARIABLE, ImageData
from sparse_training.data.transforms import CenterCrop, RandomCropAndFlip
from sparse_training.errors import UserError

DATASETS = ("digits", "fashion-mnist", "cifar10", "imagefolder")


def load_data(name: str, root: str | Path | None = None, *, size: int | None = None) -> ImageData:
    """Load a data set whole into memory.

    Example:
        >>> data = load_data("digits")
        >>> loader = ResidentLoader(data.train, batch_size=64, mean=data.mean, std=data.std)

    Args:
        name: one of ``DATASETS``: "digits" (embedded in the package), "fashion-mnist", "cifar10" or "imagefolder".
        root: the folder that holds the data, and the only place searched; for "cifar10" also the published tar.gz.
            Default: the folder named in the environment variable ``SPARSE_TRAINING_DATA``, then, for
            "fashion-mnist", the folder of Debian's package.
        size: for "imagefolder" alone: height and width in pixels that every image is resized to, at least 1.
            Default: the images' own size, which they must share.

    Returns:
        The training and test split, with the class names and the channel statistics.

    Raises:
        UserError: unknown name, data missing or corrupt, or an argument that the set cannot use.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}; use one of {', '.join(DATASETS)}")
    if size is not None and name != "imagefolder":
        raise UserError(f"size={size} is for imagefolder; the images of {name} have a fixed size")
    if name == "digits":
        if root is not None:
            raise UserError(f"the data set digits is part of the package and takes no root, got {root}")
        return digits.load()
    roots = _roots(name, root)
    if name == "fashion-mnist":
        return fashion_mnist.load(roots)
    if name == "cifar10":
        return cifar10.load(roots)
    return imagefolder.load(roots, size)


class Crops(NamedTuple):
    """Images of a folder as they are, of which crops are trained on; each is read when its row is asked for.

    Attributes:
        train: random crops of the training images.
        plain: crops from the middle of the same images.
        test: crops from the middle of the test images.
    """

    train: ImageFiles
    plain: ImageFiles
    test: ImageFiles


def load_crops(root: str | Path | None = None, *, size: int, seed: int = 0) -> Crops:
    """Find the images of ``train/<class>/*.png`` (or .jpg, ...) and ``test/...``, or else ``val/...``.

    Args:
        root: the folder that holds both. Default: the one named in the environment variable
            ``SPARSE_TRAINING_DATA``.
        size: height and width of a crop in pixels, at least 1.
        seed: seed of the random crops. Default 0.

    Raises:
        UserError: data missing or no Pillow.
    """
    (train, test), classes = imagefolder.train_and_test_folders(_roots("imagefolder", root))
    middle = CenterCrop(size)
    return Crops(
        ImageFiles(train, RandomCropAndFlip(size), classes=classes, seed=seed),
        ImageFiles(train, middle, classes=classes),
        ImageFiles(test, middle, classes=classes),
    )


def _roots(name: str, root: str | Path | None) -> list[Path]:
    """Return the places to search, in order."""
    if root is not None:
        return [Path(root).expanduser()]
    variable = os.environ.get(ROOT_VARIABLE)
    roots = [Path(variable).expanduser()] if variable else []
    return [*roots, fashion_mnist.DEBIAN] if name == "fashion-mnist" else roots
