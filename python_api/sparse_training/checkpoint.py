"""Files that are whole or absent: checkpoints, and the small JSON files of a run's folder.

A checkpoint is one line (format and SHA-256 of the rest) before what ``torch.save`` wrote of tensors
and plain containers. It is read with ``weights_only=True``, so that it cannot run code, and the digest
is checked first, for PyTorch's own reader does not notice a damaged tensor.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.utils import _pytree as pytree

from sparse_training.errors import UserError

MAGIC = b"sparse-training checkpoint 1 "
_HEADER = len(MAGIC) + 64 + 1  # the digest in hexadecimal, a line's end


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of one.

    Raises:
        UserError: it cannot be written, for want of space or otherwise; the old one is still there.
    """
    _write(path, lambda file: file.write(data))


def _write(path: Path, fill: Callable[[BinaryIO], Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk, a limit: what was there stays, and half a file is not left to fill it
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    if hasattr(os, "O_DIRECTORY"):  # POSIX: the new name must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_torch(path: Path, value: Any) -> None:
    """What ``torch.save`` makes of a value, atomically."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_atomic(path, buffer.getvalue())


def write_json(path: Path, value: Any) -> None:
    """A value as indented JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None


def save(path: Path, state: Mapping[str, Any]) -> None:
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


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
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


def rng_state(device: torch.device) -> dict[str, Any]:
    """The states of every global generator that training may draw from, as plain containers."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "xla":
        state["xla"] = sys.modules["torch_xla"].core.xla_model.get_rng_state(str(device))
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (kind, keys.tolist(), *rest)
    return state


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Inverse of ``rng_state``; generators that were not saved stay as they are."""
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    if "xla" in state and device.type == "xla":
        sys.modules["torch_xla"].core.xla_model.set_rng_state(int(state["xla"]), str(device))
    if "numpy" in state and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(state["numpy"])
