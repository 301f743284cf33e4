"""Data sets by name."""

from __future__ import annotations

import os
from pathlib import Path

from sparse_training.data import cifar10, digits, imagefolder
from sparse_training.data import fashion_mnist as idx
from sparse_training.data.splits import ROOT_VARIABLE, ImageData
from sparse_training.errors import UserError

DATASETS = ("digits", "fashion-mnist", "cifar10", "imagefolder")


def load_data(name: str, root: str | Path | None = None, *, size: int | None = None) -> ImageData:
    """Loads a data set whole into memory.

    Args:
        name: one of `DATASETS`.
        root: the folder that holds it; for `cifar10` the published tar.gz will do too. By default
            the folder named in the environment variable SPARSE_TRAINING_DATA, then, for
            `fashion-mnist`, where Debian's package puts it. A root that is given is the only place
            searched, so what is loaded is never a surprise. `digits` is in the package.
        size: for `imagefolder`: resize every image to size x size pixels. By default 32, unless
            all images have one size, which is then kept.

    Raises:
        UserError: unknown name, data missing or corrupt, or an argument that the set cannot use.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: one of {', '.join(DATASETS)} is wanted")
    if size is not None and name != "imagefolder":
        raise UserError(f"data set {name} has a fixed image size: size={size} is for imagefolder")
    if name == "digits":
        if root is not None:
            raise UserError(f"data set digits is part of the package: no root wanted, got {root}")
        return digits.load()
    roots = _roots(name, root)
    if name == "fashion-mnist":
        return idx.load(roots)
    if name == "cifar10":
        return cifar10.load(roots)
    return imagefolder.load(roots, size)


def _roots(name: str, root: str | Path | None) -> list[Path]:
    """The places to search, in order."""
    if root is not None:
        return [Path(root).expanduser()]
    variable = os.environ.get(ROOT_VARIABLE)
    roots = [Path(variable).expanduser()] if variable else []
    return [*roots, idx.DEBIAN] if name == "fashion-mnist" else roots
