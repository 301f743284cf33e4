"""Images in WebDataset shards, read row by row."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparse_training.data.image_rows import ImageRows
from sparse_training.data.pillow import FORMATS
from sparse_training.errors import UserError

BLOCK = 512  # bytes of a tar file's header, and of what its sizes are rounded up to


class ImageShards(ImageRows):
    """Samples of WebDataset shards, each read and decoded when its row is asked for: others are not even read.

    A shard is a tar file in which consecutive files of one name are a sample, such as ``0001.jpg`` and ``0001.cls``.
    The class is a number in ``.cls``. The files' headers are read once, when this object is made; a row is then a
    place in a shard. The rows are in the shards' order.

    Args:
        shards: path of a shard, several in WebDataset's notation such as "train-{000..146}.tar", or a list of them.
        transform: maps Pillow's image of mode RGB to a tensor; see ``ImageRows``.
        classes: names of the classes. Default: "0", "1", ..., up to the largest label.
        seed: seed of random transforms. Default 0.
        on_error: "count" (the default) names and counts an image that cannot be decoded, and gives it the label -100;
            "retry" tries it again whenever its row is asked for; "raise" makes it an error.

    Raises:
        UserError: a shard that is missing, cut off, compressed or not on a disk, a sample without an image or class,
            or no webdataset or Pillow.

    Example:
        >>> data = ImageShards("imagenet-train-{0000..1281}.tar", RandomCropAndFlip(224))
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        transform: Callable[[Any], Tensor],
        *,
        classes: Sequence[str] | None = None,
        seed: int = 0,
        on_error: str = "count",
    ) -> None:
        self.shards = _expanded(shards)
        samples = [(number, sample) for number, path in enumerate(self.shards) for sample in _samples(path)]
        if not samples:
            raise UserError(f"{self.shards[0]}: no images in {len(self.shards)} shards")
        self._places = np.array([(number, sample.begin, sample.size) for number, sample in samples], dtype=np.int64)
        labels = torch.tensor([sample.label for _, sample in samples])
        most = int(labels.max()) + 1
        if classes is not None and len(classes) < most:
            raise UserError(f"`classes` must name all {most} classes of the shards, got {len(classes)}")
        names = [os.fsencode(sample.name) for _, sample in samples]
        classes = [str(label) for label in range(most)] if classes is None else classes
        super().__init__(labels, names, classes, transform, seed=seed, on_error=on_error)

    def name(self, row: int) -> str:
        """Return the shard of a row and the name of its file there."""
        return f"{self.shards[self._places[row, 0]]}: {super().name(row)}"

    def read(self, row: int) -> bytes:
        """Read a row's image, and no other byte of its shard."""
        number, begin, size = self._places[row].tolist()
        with open(self.shards[number], "rb", buffering=0) as file:
            encoded = os.pread(file.fileno(), size, begin)
        if len(encoded) < size:
            raise UserError(f"the shard ends after {len(encoded)} of its {size} bytes")
        return encoded


class _Sample(NamedTuple):
    """Place of a sample's image in its shard.

    Attributes:
        name: name of the image in the shard.
        begin: place of its first byte.
        size: number of bytes.
        label: class.
    """

    name: str
    begin: int
    size: int
    label: int


def _library() -> Any:
    try:
        from webdataset import shardlists, tariterators
    except ImportError as error:
        raise UserError("ImageShards needs webdataset: pip install 'sparse-kernels[shards]'") from error
    return shardlists, tariterators


def _expanded(shards: str | Path | Sequence[str | Path]) -> list[str]:
    """Return the paths of the shards."""
    given = [shards] if isinstance(shards, str | Path) else list(shards)
    paths = [path for each in given for path in _library()[0].expand_urls(str(each))]
    if not paths:
        raise UserError("`shards` must name at least one shard, got none")
    for place, path in enumerate(paths):
        if path.startswith("pipe:") or ("://" in path and not path.startswith("file://")):
            raise UserError(f"a shard must be a file on a disk, to be read from any place, got {path}; copy it first")
        paths[place] = os.path.expanduser(path.removeprefix("file://"))
    return paths


def _samples(path: str) -> list[_Sample]:
    """Read the headers of a shard.

    Raises:
        UserError: no whole tar file, or a sample without an image or a class.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such shard")
    split, found = _library()[1].base_plus_ext, dict[str, dict[str, Any]]()
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name, suffix = split(member.name)
                archive.members = []  # type: ignore[attr-defined]  # or it keeps an object for every file
                if not member.isreg() or name is None or member.name.startswith("__"):
                    continue
                sample = found.setdefault(name, {})
                kind = suffix.lower()
                if kind == "cls":
                    sample["label"] = _label(path, member, archive)
                elif f".{kind}" in FORMATS:
                    sample["image"] = {"name": member.name, "begin": member.offset_data, "size": member.size}
            end = archive.offset
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{path}: cut off, or no uncompressed tar file: {error}; make or fetch it again") from error
    with open(path, "rb") as file:  # tarfile takes a damaged header for the end
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK):
            raise UserError(f"{path}: cut off or damaged at byte {end}; make or fetch it again")
    for name, sample in found.items():
        if missing := [part for part in ("image", "label") if part not in sample]:
            files = "an image file" if missing[0] == "image" else "a .cls file with its class"
            raise UserError(f"{path}: each sample must have {files}, got none for {name}")
    return [_Sample(label=sample["label"], **sample["image"]) for sample in found.values()]


def _label(path: str, member: tarfile.TarInfo, archive: tarfile.TarFile) -> int:
    content = archive.extractfile(member)
    text = b"" if content is None else content.read()
    if not text.strip().isdigit():
        raise UserError(f"{path}: {member.name} must hold the number of a class, got {text[:20]!r}")
    return int(text)
