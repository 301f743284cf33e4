"""Checkpoint files: with a digest, written atomically, the previous one kept under another name."""

from __future__ import annotations

import hashlib
import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.utils import _pytree as pytree

from sparse_training.errors import UserError
from sparse_training.files import _write

MAGIC = b"sparse-training checkpoint 1 "
_HEADER = len(MAGIC) + 64 + 1  # the digest in hexadecimal and a newline


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint; the one it replaces is kept as ``<name>.prev``.

    The state is written straight to the disk, so that a table of 100 million scores is not held in memory twice.

    Args:
        path: the checkpoint's file.
        state: plain containers, numbers, strings and tensors.

    Raises:
        UserError: the file cannot be written; the previous checkpoint is still there, under either name.
    """

    def fill(file: BinaryIO) -> None:
        hashed = _Hashed(file)
        file.write(MAGIC + hashed.hexdigest() + b"\n")
        torch.save(dict(state), hashed)  # type: ignore[arg-type]  # torch.save calls write and flush alone
        if hashed.failed is not None:
            raise hashed.failed
        file.seek(len(MAGIC))
        file.write(hashed.hexdigest())

    if path.exists():
        os.replace(path, previous_of(path))  # after a crash before the next line this one is loaded
    _write(path, fill)


class _Hashed:
    """Wraps a file: keeps the digest of the bytes written, and the first failure to write them.

    ``torch.save`` would raise another exception in its place, which no longer says that the disk is full.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.failed: OSError | None = None

    def write(self, data: Any) -> int:
        if self.failed is None:
            try:
                self.digest.update(data)
                return self.file.write(data)
            except OSError as error:
                self.failed = error
        return len(data)

    def flush(self) -> None:
        if self.failed is None:
            try:
                self.file.flush()
            except OSError as error:
                self.failed = error

    def hexdigest(self) -> bytes:
        return self.digest.hexdigest().encode()


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint; where it is damaged, read the previous one and warn.

    Args:
        path: the checkpoint's file.
        device: device that its tensors are moved to. Default "cpu".

    Returns:
        The state that ``save_checkpoint`` was given.

    Raises:
        UserError: no checkpoint there, or both it and the previous one are damaged.
    """
    try:
        return _read(path, device)
    except UserError as error:
        previous = previous_of(path)
        if not previous.exists():
            raise
        state = _read(previous, device)
        warnings.warn(f"{error}; the previous one, {previous.name}, is used", stacklevel=2)
        return state


def previous_of(path: Path) -> Path:
    """Return the path of the checkpoint before the one at ``path``."""
    return path.with_name(path.name + ".prev")


def _read(path: Path, device: torch.device | str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            header = file.read(_HEADER)
            digest = hashlib.sha256()
            while part := file.read(1 << 20):
                digest.update(part)
            if header != MAGIC + digest.hexdigest().encode() + b"\n":
                fault = "its digest does not match" if header.startswith(MAGIC[:24]) else "its header is another"
                raise UserError(f"{path} is damaged or not a checkpoint: {fault}")
            file.seek(_HEADER)
            xla = torch.device(device).type == "xla"  # torch.load cannot map to it
            state: dict[str, Any] = torch.load(file, map_location="cpu" if xla else device, weights_only=True)
            if xla:
                state = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), state)
    except FileNotFoundError:
        raise UserError(f"{path}: no checkpoint there") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds more than tensors and plain containers, and is not loaded") from None
    return state
