"""A folder of images for each class, read row by row."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_training.data.image_rows import ImageRows
from sparse_training.data.imagefolder import class_folders, image_names
from sparse_training.errors import UserError


class ImageFiles(ImageRows):
    """The images of ``root/<class>/*.jpg`` (or .png, ...), each read and decoded when its row is asked for.

    The rows are sorted by class and file name. Files and folders whose names begin with a dot, and files without the
    suffix of an image, are ignored. Names take a few dozen bytes a row, in arrays that workers share.

    Args:
        root: folder of the class folders.
        transform: maps Pillow's image of mode RGB to a tensor; see ``ImageRows``.
        classes: names of the classes, for a validation set whose labels must be the training set's. Default: the
            class folders, sorted by name.
        seed: seed of random transforms. Default 0.
        on_error: "count" (the default) names and counts an image that cannot be decoded, and gives it the label -100;
            "retry" tries it again whenever its row is asked for; "raise" makes it an error.

    Raises:
        UserError: no such folder, no images, a folder that is none of ``classes``, or no Pillow.

    Example:
        >>> train = ImageFiles("imagenet/train", RandomCropAndFlip(224))
        >>> test = ImageFiles("imagenet/val", CenterCrop(224), classes=train.classes)
        >>> loader = DataLoader(train, batch_size=256, shuffle=True, num_workers=8)
    """

    def __init__(
        self,
        root: str | Path,
        transform: Callable[[Any], Tensor],
        *,
        classes: Sequence[str] | None = None,
        seed: int = 0,
        on_error: str = "count",
    ) -> None:
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise UserError(f"`root` must be a folder of class folders, got {self.root}")
        found = class_folders(self.root)
        classes = found if classes is None else list(classes)
        if unknown := [name for name in found if name not in classes]:
            raise UserError(f"{self.root / unknown[0]}: no such class among the {len(classes)} of `classes`")
        labels, names = list[int](), list[bytes]()
        for label, name in enumerate(classes):
            files = image_names(self.root / name) if name in found else []
            names += [os.fsencode(os.path.join(name, file)) for file in files]
            labels += [label] * len(files)
        if not names:
            raise UserError(f"{self.root}: no images in its class folders")
        super().__init__(torch.tensor(labels), names, classes, transform, seed=seed, on_error=on_error)

    def name(self, row: int) -> str:
        """Return the path of a row's file."""
        return os.path.join(str(self.root), super().name(row))

    def read(self, row: int) -> bytes:
        """Read a row's file."""
        with open(os.path.join(os.fsencode(self.root), self._names[row]), "rb") as file:
            return file.read()
