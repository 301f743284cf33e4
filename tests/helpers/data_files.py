"""Files of data sets, made small."""

from __future__ import annotations

import multiprocessing
import struct
import traceback
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparse_training.data.load import load_data
from sparse_training.data.splits import ImageData
from sparse_training.errors import UserError


def refuses(call: Callable[..., Any], *arguments: Any, **keywords: Any) -> str:
    """The one-line message of the UserError that the call must raise."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


def refused_by_a_child(*arguments: Any) -> str:
    """The message with which ``load_data`` refuses, in a process that may crash or hang without harm."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)

    def load() -> None:
        try:
            load_data(*arguments)
            theirs.send("no error")
        except UserError as error:
            theirs.send(str(error))
        except BaseException:
            theirs.send(traceback.format_exc())

    process = context.Process(target=load)
    process.start()
    process.join(20)
    hangs = process.exitcode is None
    process.kill()
    process.join()
    assert not hangs, "it never returns"
    assert process.exitcode == 0, f"it died of {process.exitcode}"
    message: str = mine.recv()
    assert "\n" not in message
    return message


def check_consistent(data: ImageData) -> None:
    for split in (data.train, data.test):
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        assert tuple(split.images.shape[1:]) == data.shape
        assert len(split) == len(split.images) == len(split.labels) > 0
        assert split.labels.min() >= 0
        assert split.labels.max() < len(data.classes)
    scaled = data.train.images.double() / 255
    assert data.mean == pytest.approx(scaled.mean(dim=(0, 2, 3)).tolist())
    assert data.std == pytest.approx(scaled.std(dim=(0, 2, 3), correction=0).tolist())


# --- fashion-mnist ----------------------------------------------------------------------------


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def fashion_files(rows: int = 5) -> dict[str, bytes]:
    generator = np.random.default_rng(0)
    files = {}
    for prefix, count in (("train", rows), ("t10k", rows - 2)):
        images = generator.integers(0, 256, (count, 28, 28))
        files[f"{prefix}-images-idx3-ubyte"] = idx_bytes(images)
        files[f"{prefix}-labels-idx1-ubyte"] = idx_bytes(np.arange(count))
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def peak_bytes(call: Callable[..., Any]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# --- cifar10 ----------------------------------------------------------------------------------


def py2(value: Any) -> bytes:
    """Encode a value as Python 2's cPickle did at protocol 2; bytes stand for its str."""
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        if 0 <= value < 256:
            return b"K" + bytes([value])
        return b"M" + struct.pack("<H", value) if 0 <= value < 65536 else b"J" + struct.pack("<i", value)
    if value is None:
        return b"N"
    if isinstance(value, bytes):
        if len(value) < 256:
            return b"U" + bytes([len(value)]) + value
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, list):
        return b"](" + b"".join(map(py2, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(py2, value)) + b"t"
    if isinstance(value, dict):
        return b"}(" + b"".join(py2(key) + py2(item) for key, item in value.items()) + b"u"
    assert isinstance(value, Raw)
    return value.code


class Raw:
    """Opcodes to put in as they are."""

    def __init__(self, code: bytes) -> None:
        self.code = code


def call(function: bytes, *arguments: Any) -> bytes:
    """Opcodes that call `function`, given as module, newline and name."""
    return b"c" + function + b"\n" + py2(arguments) + b"R"


# --- imagefolder ------------------------------------------------------------------------------


def save_image(path: Path, color: Any, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> None:
    pillow = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    pillow.new(mode, size, color).save(path)
