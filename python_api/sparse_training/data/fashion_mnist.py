"""Fashion-MNIST from its IDX files, plain or gzipped.

An IDX file is a header of two zero bytes, a type code, the number of dimensions and each dimension
as a big-endian 32-bit integer, then the elements in row-major order.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from sparse_training.data.splits import ImageData, Split, missing_set
from sparse_training.errors import UserError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FOLDERS = ("", "fashion-mnist", "FashionMNIST/raw")  # the last is where torchvision puts them
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
UINT8 = 0x08
CHUNK = 1 << 20
MAX_BYTES = 1 << 30  # of a file's elements: the published training images have 47 MB


def load(roots: Sequence[Path]) -> ImageData:
    """Load Fashion-MNIST from the first of ``roots`` that holds it.

    Args:
        roots: folders to search, in order.

    Returns:
        The training and test split, with the class names and the channel statistics.

    Raises:
        UserError: it is in none of them, or a file is missing or corrupt.
    """
    folder = _find(roots)
    return ImageData.from_splits(
        "fashion-mnist",
        _read_split(folder, "train"),
        _read_split(folder, "t10k"),
        classes=CLASSES,
        source=f"Fashion-MNIST, {folder}",
    )


def read_idx(path: Path, item: tuple[int, ...]) -> torch.Tensor:
    """Read an IDX file of bytes, gzipped or not; its first bytes decide, not its name.

    Args:
        path: the file.
        item: shape that each of its items must have.

    Returns:
        Tensor uint8 of shape ``[N, *item]``, N at least 1.

    Raises:
        UserError: a file that cannot be read, is not of this kind, is truncated or too long.
    """
    try:
        with path.open("rb") as file:
            gzipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if not gzipped:
                return _parse(file, path, item)
            with gzip.open(file) as stream:
                return _parse(stream, path, item)
    except EOFError:
        raise UserError(f"{path}: truncated: the gzip stream has no end") from None
    except (OSError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _parse(stream: BinaryIO | gzip.GzipFile, path: Path, item: tuple[int, ...]) -> torch.Tensor:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise UserError(f"{path}: not an IDX file: it must begin with two zero bytes, got {magic[:2]!r}")
    if magic[2] != UINT8:
        raise UserError(f"{path}: the type code must be 0x{UINT8:02x} (uint8), got 0x{magic[2]:02x}")
    if magic[3] != 1 + len(item):
        raise UserError(f"{path}: the file must have {1 + len(item)} dimensions, got {magic[3]}")
    header = stream.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise UserError(f"{path}: truncated: the header ends after {4 + len(header)} bytes")
    shape = struct.unpack(f">{magic[3]}I", header)
    if shape[0] == 0 or shape[1:] != item:
        expected = ", ".join(map(str, ("N > 0", *item)))
        raise UserError(f"{path}: the shape must be [{expected}], got {list(shape)}")

    size = math.prod(shape)
    if size > MAX_BYTES:  # a small gzip file may hold them all
        raise UserError(f"{path}: {list(shape)} needs {size} bytes, got a limit of {MAX_BYTES}")
    # In pieces: what a corrupt header announces must not be allocated before it is there.
    body = bytearray()
    while len(body) <= size and (chunk := stream.read(CHUNK)):
        body += chunk
    if len(body) != size:
        fault = "truncated" if len(body) < size else "too long"
        length = len(body) if len(body) < size else "more"
        raise UserError(f"{path}: {fault}: {list(shape)} needs {size} bytes, got {length}")
    return torch.frombuffer(body, dtype=torch.uint8).reshape(shape)


def _find(roots: Sequence[Path]) -> Path:
    for root in roots:
        for folder in FOLDERS:
            if _with_suffix(root / folder, "train-images-idx3-ubyte") is not None:
                return root / folder
    raise missing_set(
        "fashion-mnist",
        "train-images-idx3-ubyte[.gz]",
        [root / folder for root in roots for folder in FOLDERS],
        "get it with apt install dataset-fashion-mnist or from https://github.com/zalandoresearch/fashion-mnist",
    )


def _with_suffix(folder: Path, name: str) -> Path | None:
    """Return the path of the file itself, else of its gzipped form, else None."""
    paths = (folder / name, folder / f"{name}.gz")
    return next((path for path in paths if path.is_file()), None)


def _read_split(folder: Path, prefix: str) -> Split:
    images_path = _existing(folder, f"{prefix}-images-idx3-ubyte")
    labels_path = _existing(folder, f"{prefix}-labels-idx1-ubyte")
    images = read_idx(images_path, (28, 28)).unsqueeze(1)
    labels = read_idx(labels_path, ()).long()
    if len(labels) != len(images):
        raise UserError(f"{labels_path}: {len(images)} images need as many labels, got {len(labels)}")
    if (largest := int(labels.max())) >= len(CLASSES):
        raise UserError(f"{labels_path}: labels must be 0 to {len(CLASSES) - 1}, got {largest}")
    return Split(images, labels)


def _existing(folder: Path, name: str) -> Path:
    path = _with_suffix(folder, name)
    if path is None:
        raise UserError(f"{folder / name}[.gz] is missing, and other Fashion-MNIST files are there")
    return path
