"""CIFAR-10 from its published "python version", read without running its pickles.

A pickle is a program: it may name any function and have it called. These are read by an unpickler that calls nothing.
It records each call as a ``_Record``, so that reading a file yields only plain data, and ``_array_bytes`` takes the
pixels from the records.
"""

from __future__ import annotations

import gzip
import pickle
import tarfile
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import torch

from sparse_training.data.splits import ImageData, Split, missing_set
from sparse_training.errors import UserError

FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST = "test_batch"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
MAX_BYTES = 64 << 20  # a published file has 31 MB
MAX_ARCHIVE_BYTES = 1 << 30  # unpacked; the published archive has 186 MB
KEY_TYPES = (bytes, str, int)


def load(roots: Sequence[Path]) -> ImageData:
    """Load CIFAR-10 from the first of ``roots`` that holds its folder or its tar.gz, or is one of them.

    Args:
        roots: folders, or the tar.gz, in the order of the search.

    Returns:
        The training and test split, with the class names and the channel statistics.

    Raises:
        UserError: it is in none of them, or a file is missing, corrupt or not the published one.
    """
    place = _find(roots)
    files = _read_archive(place) if place.is_file() else _read_folder(place)
    batches = {name: decode_batch(raw, f"{place}: {name}") for name, raw in files}
    for name in (*TRAIN, TEST):
        if name not in batches:
            raise UserError(f"{place}: CIFAR-10's {name} is missing")
    train = [batches[name] for name in TRAIN]
    return ImageData.from_splits(
        "cifar10",
        Split(
            torch.cat([batch.images for batch in train]),
            torch.cat([batch.labels for batch in train]),
        ),
        batches[TEST],
        classes=CLASSES,
        source=f"CIFAR-10, {place}",
    )


def decode_batch(raw: bytes, where: str) -> Split:
    """Decode one batch file.

    Args:
        raw: contents of the file: a pickled dict of b"data", uint8 [N, 3072], and b"labels", N integers.
        where: name of the file, for errors.

    Returns:
        Images uint8 [N, 3, 32, 32] and labels int64 [N].

    Raises:
        UserError: another kind of file, or one that names anything but NumPy's array and dtype.
    """
    try:
        content = _InertUnpickler(BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # a malformed pickle may raise nearly anything
        raise UserError(f"{where}: not one of CIFAR-10's pickles: {error}") from error
    if not isinstance(content, dict) or not {b"data", b"labels"} <= content.keys():
        raise UserError(f"{where}: must be a dict of b'data' and b'labels'")
    rows, pixels = _array_bytes(content[b"data"], where)
    labels = content[b"labels"]
    if not isinstance(labels, list) or len(labels) != rows:
        raise UserError(f"{where}: b'labels' must be a list of {rows} labels, one per image")
    if not all(type(label) is int and 0 <= label < len(CLASSES) for label in labels):
        raise UserError(f"{where}: labels must be integers from 0 to {len(CLASSES) - 1}")
    return Split(pixels.reshape(rows, *SHAPE), torch.tensor(labels))


class _Record:
    """A name in a pickle, with the arguments and the state that the pickle gives it.

    Calling it and setting its state, which is all that a pickle can do with it, only record.
    """

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...] | None = None) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None

    def __call__(self, *arguments: Any) -> _Record:
        return _Record(self.name, arguments)

    def __setstate__(self, state: Any) -> None:
        self.state = state


# The unpickler in Python: the one in C allocates a memo as long as the largest index in the file, so that five bytes
# can ask for 64 GB. These files are mostly one string, which costs little in either.
class _InertUnpickler(pickle._Unpickler):
    """Returns a ``_Record`` for the names that a pickled NumPy array needs and refuses all others.

    Keys are numbers and strings, and there are no sets: the hash of a tuple in a tuple in a tuple, and so on, overflows
    the interpreter's stack.
    """

    stack: list[Any]  # of the values since the last mark

    NAMES: ClassVar[dict[tuple[str, str], str]] = {
        ("numpy.core.multiarray", "_reconstruct"): "reconstruct",
        ("numpy._core.multiarray", "_reconstruct"): "reconstruct",
        ("numpy", "ndarray"): "ndarray",
        ("numpy", "dtype"): "dtype",
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.NAMES:
            raise pickle.UnpicklingError(f"it refers to {f'{module}.{name}'!r}")
        return _Record(self.NAMES[module, name])

    def load_setitem(self) -> None:
        self._check_keys(self.stack[-2:-1])
        super().load_setitem()  # type: ignore[misc]  # not in the stubs

    def load_setitems(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_setitems()  # type: ignore[misc]  # not in the stubs

    def load_dict(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_dict()  # type: ignore[misc]  # not in the stubs

    def load_set(self) -> None:
        raise pickle.UnpicklingError("it holds a set")

    @staticmethod
    def _check_keys(keys: Sequence[Any]) -> None:
        for key in keys:
            if not isinstance(key, KEY_TYPES):
                raise pickle.UnpicklingError(f"a key must be a number or a string, got a {type(key).__name__}")

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.EMPTY_SET[0]: load_set,
        pickle.ADDITEMS[0]: load_set,
        pickle.FROZENSET[0]: load_set,
    }


def _array_bytes(array: Any, where: str) -> tuple[int, torch.Tensor]:
    """Return the number of rows and the pixels, uint8 [rows, 3072], of an array as NumPy pickles it.

    NumPy writes reconstruct(ndarray, (0,), "b") with the state
    (version, shape, dtype(code, ...), is_fortran, bytes).
    """
    if not isinstance(array, _Record) or array.name != "reconstruct" or array.arguments is None:
        raise UserError(f"{where}: b'data' is not a NumPy array")
    match array.state:
        case (
            1,
            (int(rows), int(width)),
            _Record(name="dtype", arguments=(b"u1" | b"|u1" | "u1" | "|u1", *_)),
            bool(fortran),
            bytes(raw),
        ) if 0 < rows < 1 << 63 and width == PIXELS:
            pass
        case _:
            raise UserError(f"{where}: b'data' is not a uint8 array of shape [N, {PIXELS}]")
    if len(raw) != rows * PIXELS:
        raise UserError(f"{where}: truncated: {rows} images need {rows * PIXELS} pixels, got {len(raw)}")
    pixels = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return rows, pixels.reshape(PIXELS, rows).t() if fortran else pixels.reshape(rows, PIXELS)


def _find(roots: Sequence[Path]) -> Path:
    for root in roots:
        if root.is_file():
            return root
        for place in (root, root / FOLDER):
            if (place / TRAIN[0]).is_file():
                return place
        if (root / ARCHIVE).is_file():
            return root / ARCHIVE
    raise missing_set(
        "cifar10",
        f"{FOLDER} or {ARCHIVE}",
        roots,
        f"get {ARCHIVE} from https://www.cs.toronto.edu/~kriz/cifar.html",
    )


def _read_folder(folder: Path) -> Iterator[tuple[str, bytes]]:
    for name in (*TRAIN, TEST):
        path = folder / name
        if path.is_file():
            _check_size(path.stat().st_size, str(path))
            try:
                yield name, path.read_bytes()
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error}") from error


def _read_archive(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the batch files of the archive from memory; nothing is extracted to disk."""
    members = {f"{FOLDER}/{name}": name for name in (*TRAIN, TEST)}
    try:
        with gzip.open(path) as unpacked:
            stream = _BoundedStream(unpacked, str(path))
            with tarfile.open(fileobj=stream, mode="r:") as archive:  # type: ignore[call-overload]  # it calls no more
                for member in archive:
                    name = members.get(member.name)
                    if name is not None and member.isreg():
                        _check_size(member.size, f"{path}: {member.name}")
                        file = archive.extractfile(member)
                        assert file is not None  # as it is a regular file
                        yield name, file.read()
            while stream.read(1 << 20):  # gzip compares its checksum at the end
                pass
    except UserError:
        raise
    except Exception as error:  # a malformed archive may raise nearly anything
        raise UserError(f"{path}: corrupt or not a tar.gz file: {error}") from error


class _BoundedStream:
    """An unpacked archive: a few bytes of it may ask ``tarfile`` to read gigabytes into memory, as for a long name."""

    def __init__(self, stream: gzip.GzipFile, where: str) -> None:
        self.stream, self.where = stream, where

    def read(self, size: int) -> bytes:
        _check_size(size, f"{self.where}: a member or its name")
        self._check_end(self.stream.tell() + size)
        return self.stream.read(size)

    def seek(self, offset: int) -> int:
        self._check_end(offset)
        return self.stream.seek(offset)

    def tell(self) -> int:
        return self.stream.tell()

    def _check_end(self, end: int) -> None:
        if end > MAX_ARCHIVE_BYTES:
            raise UserError(f"{self.where}: the archive must have at most {MAX_ARCHIVE_BYTES} bytes unpacked, got more")


def _check_size(size: int, where: str) -> None:
    if size > MAX_BYTES:
        raise UserError(f"{where}: the file must have at most {MAX_BYTES} bytes, got {size}")
