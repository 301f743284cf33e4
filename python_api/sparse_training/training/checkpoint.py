"""Checkpoint files: sealed with a digest, written atomically, the previous one kept beside."""

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
_HEADER = len(MAGIC) + 64 + 1  # the digest in hexadecimal, a line's end


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint; the one it replaces is kept beside it as ``<name>.prev``.

    It goes straight to the disk: a table of 100 million scores is not held in memory twice.

    Raises:
        UserError: it cannot be written; the one before is still there, under either name.
    """

    def fill(file: BinaryIO) -> None:
        hashed = _Hashed(file)
        file.write(MAGIC + hashed.hexdigest() + b"\n")
        torch.save(dict(state), hashed)  # type: ignore[arg-type]  # it writes and flushes, no more
        if hashed.failed is not None:
            raise hashed.failed
        file.seek(len(MAGIC))
        file.write(hashed.hexdigest())

    if path.exists():
        os.replace(path, previous_of(path))  # a crash before the next line leaves this for ``load``
    _write(path, fill)


class _Hashed:
    """A file to write to that keeps the digest of what was written, and the first failure to write it.

    ``torch.save`` would make another exception of it, which no longer says that the disk is full.
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
    """Read a checkpoint; where it is damaged, the previous one with a warning.

    Raises:
        UserError: there is none, or neither it nor the previous one is whole.
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
    """Where the checkpoint before the one at ``path`` is kept."""
    return path.with_name(path.name + ".prev")


def _read(path: Path, device: torch.device | str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            header = file.read(_HEADER)
            digest = hashlib.sha256()
            while part := file.read(1 << 20):
                digest.update(part)
            if header != MAGIC + digest.hexdigest().encode() + b"\n":
                ours = header.startswith(MAGIC[:24])
                wanted = "all of what was written" if ours else "a checkpoint of this format"
                raise UserError(f"{path} is damaged or not a checkpoint: wanted {wanted}")
            file.seek(_HEADER)
            xla = torch.device(device).type == "xla"  # which PyTorch cannot read to
            state: dict[str, Any] = torch.load(file, map_location="cpu" if xla else device, weights_only=True)
            if xla:
                state = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), state)
    except FileNotFoundError:
        raise UserError(f"{path}: no checkpoint there") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds more than tensors and plain containers: it is not read") from None
    return state
