"""The user's own data set: a folder of images for each class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from sparse_training.arguments import check_integer
from sparse_training.data.pillow import FORMATS, check_depth, find_pillow, open_image
from sparse_training.data.splits import ImageData, Split, missing_set
from sparse_training.errors import UserError


def load(roots: Sequence[Path], size: int | None = None) -> ImageData:
    """Load ``train/<class>/*.png`` (or .jpg, ...) and ``test/...``, or else ``val/...``, from the first root with both.

    The classes are the folders in train, sorted by name; the rows are sorted by class and file name. Images are
    converted to RGB and resized with antialiasing, without keeping their proportions. Folders and files whose names
    begin with a dot, and files without the suffix of an image, are ignored.

    Args:
        roots: folders to search, in order.
        size: height and width in pixels, at least 1; None (the default) for the images' own, which they must share.

    Returns:
        The training and test split, with the class names and the channel statistics.

    Raises:
        UserError: no such folders, no Pillow, a class whose name is no UTF-8, an image that cannot be read, or images
            of several sizes without ``size``.
    """
    if size is not None:
        check_integer("size", size, 1)
    parts, classes = train_and_test_folders(roots)
    pillow = find_pillow("the data set imagefolder")
    train, test = (_files(folder, classes) for folder in parts)
    width, height = (size, size) if size is not None else _common_size(pillow, train + test)
    return ImageData.from_splits(
        "imagefolder",
        _read_split(pillow, train, width, height),
        _read_split(pillow, test, width, height),
        classes=classes,
        source=f"images in {parts[0].parent}",
    )


def train_and_test_folders(roots: Sequence[Path]) -> tuple[tuple[Path, Path], list[str]]:
    """Find the folders ``train`` and ``test``, or else ``val``, in the first root with both, and the classes' names.

    Args:
        roots: folders to search, in order.

    Raises:
        UserError: no such folders, fewer than two classes, or a class in the other one alone.
    """
    root = _find(roots)
    held_out = root / "test" if (root / "test").is_dir() else root / "val"
    classes = class_folders(root / "train")
    if len(classes) < 2:
        raise UserError(f"{root / 'train'} must hold at least 2 class folders, got {len(classes)}")
    if unknown := sorted(set(class_folders(held_out)) - set(classes)):
        raise UserError(f"{held_out / unknown[0]}: no such class in {root / 'train'}")
    return (root / "train", held_out), classes


def _find(roots: Sequence[Path]) -> Path:
    for root in roots:
        if (root / "train").is_dir() and any((root / name).is_dir() for name in ("test", "val")):
            return root
    raise missing_set(
        "imagefolder",
        "train/<class>/*.png and test/<class>/*.png (or val)",
        roots,
        "arrange your images in such folders",
    )


def class_folders(folder: Path) -> list[str]:
    """Return the names of a folder's subfolders, sorted; those that begin with a dot are left out.

    Raises:
        UserError: a name that is no UTF-8.
    """
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    for name in (str(folder), *names):
        if name.encode(errors="replace").decode() != name:  # no report could hold it
            raise UserError(f"{str(folder)!r}: a folder's name must be UTF-8, got {os.fsencode(name)!r}")
    return names


def image_names(folder: Path) -> list[str]:
    """Return the names of a class's images, sorted; without a call of the system for each file.

    Raises:
        UserError: an image that is no regular file.
    """
    with os.scandir(folder) as entries:
        named = [entry for entry in entries if not entry.name.startswith(".") and _has_suffix(entry.name)]
    for entry in named:
        if not entry.is_file():  # opening a FIFO or a device may never return
            raise UserError(f"{entry.path}: an image must be a regular file, or a link to one")
    return sorted(entry.name for entry in named)


def _has_suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in FORMATS


def _files(folder: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    """Return each image's path and label."""
    files = [
        (folder / name / image, label)
        for label, name in enumerate(classes)
        if (folder / name).is_dir()
        for image in image_names(folder / name)
    ]
    if not files:
        raise UserError(f"{folder}: no images in its class folders")
    return files


def _common_size(pillow: ModuleType, files: Sequence[tuple[Path, int]]) -> tuple[int, int]:
    """Return (width, height) of all images, from their headers.

    Raises:
        UserError: they differ.
    """
    sizes = {_read_size(pillow, path) for path, _ in files}
    if len(sizes) == 1:
        return sizes.pop()
    least, most = (f"{width}x{height}" for width, height in (min(sizes), max(sizes)))
    raise UserError(
        f"the images have sizes from {least} to {most} pixels; give the side that all are resized to, size= "
        "(--image-size), or train on crops of the images as they are: ImageFiles (--crops)"
    )


def _read_size(pillow: ModuleType, path: Path) -> tuple[int, int]:
    """Return (width, height)."""
    try:
        with open_image(pillow, path) as image:
            width, height = image.size
    except Exception as error:  # decoders raise many types on corrupt files
        raise _unreadable(path, error) from error
    return width, height


def _read_split(pillow: ModuleType, files: Sequence[tuple[Path, int]], width: int, height: int) -> Split:
    images = torch.empty(len(files), 3, height, width, dtype=torch.uint8)
    for target, (path, _) in zip(images, files, strict=True):
        target.copy_(_read_image(pillow, path, width, height))
    return Split(images, torch.tensor([label for _, label in files]))


def _read_image(pillow: ModuleType, path: Path, width: int, height: int) -> torch.Tensor:
    """Return the image as uint8 [3, height, width]."""
    try:
        with open_image(pillow, path) as image:
            check_depth(image)
            rgb = image.convert("RGB").resize((width, height), pillow.Resampling.BILINEAR)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # decoders raise many types on corrupt files
        raise _unreadable(path, error) from error
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: not an image that Pillow can read: {error}")
