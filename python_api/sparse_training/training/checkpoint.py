"""Checkpoint files: with a digest, written atomically, the previous one kept under another name, one run a folder."""

from __future__ import annotations

import copy
import hashlib
import io
import os
import pickle
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.utils import _pytree as pytree

from sparse_training.errors import UserError, one_line
from sparse_training.files import SEAL, SEALED, _write

if sys.platform != "win32":
    import fcntl


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint; the one it replaces is kept as ``<name>.prev``, unless it is damaged.

    The new one is read back before either of the others is touched, so that one whole checkpoint is there at any time,
    and a damaged one never takes the place of a good previous one. The state is written straight to the disk, so that
    a table of 100 million scores is not held in memory twice.

    Args:
        path: the checkpoint's file.
        state: plain containers, numbers, strings and tensors.

    Raises:
        UserError: the file cannot be written, or reads back otherwise; the checkpoints before are still there.
    """

    def fill(file: BinaryIO) -> None:
        hashed = _Hashed(file)
        file.write(SEAL + hashed.hexdigest() + b"\n")
        torch.save(_plain(dict(state)), hashed)  # type: ignore[arg-type]  # torch.save calls write and flush alone
        if hashed.failed is not None:
            raise hashed.failed
        file.seek(len(SEAL))
        file.write(hashed.hexdigest())

    def rotate(written: Path) -> None:
        if not _is_whole(written):
            raise OSError("what was written reads back otherwise")
        if _is_whole(path):
            os.replace(path, previous_of(path))  # after a crash before the next step this one is loaded

    _write(path, fill, rotate)


def _plain(value: Any) -> Any:
    """Return a state with Python's numbers in place of NumPy's, which ``torch.load`` does not read without code."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        plain = copy.copy(value)  # the state of a module has attributes, too
        plain.update({name: _plain(part) for name, part in value.items()})
        return plain
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def check_readable(state: Any, name: str) -> None:
    """Refuse a state that ``load_checkpoint`` would not read, whose tensors are left out of the trial.

    Args:
        state: part of what is to be saved.
        name: its name, for the message.

    Raises:
        UserError: it holds other objects than tensors, numbers, strings and plain containers.
    """
    trial = io.BytesIO()
    try:
        torch.save(pytree.tree_map_only(torch.Tensor, lambda tensor: torch.empty(0), _plain(state)), trial)
        trial.seek(0)
        torch.load(trial, weights_only=True)
    except Exception as error:  # of pickle, or of whatever an object's own functions raise
        plain = (torch.Tensor, bool, int, float, complex, str, bytes, type(None))
        others = {type(leaf).__name__ for leaf in pytree.tree_leaves(state) if type(leaf) not in plain}
        raise UserError(
            f"`checkpoint` cannot be written: the state of the {name} has more than tensors and plain "
            f"values, {', '.join(sorted(others)) or one_line(error)}, and could not be read again"
        ) from error


def _is_whole(path: Path) -> bool:
    """Tell whether a file is there with the digest that its header says."""
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            return _matches(file)
    except OSError:
        return False


def _matches(file: BinaryIO) -> bool:
    """Tell whether an open file has the digest that its header says."""
    header, digest = file.read(SEALED), hashlib.sha256()
    while part := file.read(1 << 20):
        digest.update(part)
    return header == SEAL + digest.hexdigest().encode() + b"\n"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder of checkpoints for this process alone; whatever ends the process gives it back.

    The lock is on the folder itself and leaves no file in it. Where a file system has no locks, there is none.

    Args:
        folder: the folder, which must exist.

    Raises:
        UserError: another run holds it.
    """
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{folder} is in use by another run; wait for its end, or choose another folder") from None
    except OSError:  # a network's file system may lock no folders
        pass
    _held.add(descriptor)
    try:
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


_held: set[int] = set()


def _let_go() -> None:
    """Give up a parent's locks in its child, such as a DataLoader's worker, which may live on when the parent dies."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


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
    return read_checkpoint(path, device)[0]


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Any], str]:
    """Read a checkpoint as ``load_checkpoint`` does, and return the digest of the file that was read too."""
    try:
        return _read(path, device)
    except UserError as error:
        previous = previous_of(path)
        if not previous.exists():
            raise
        read = _read(previous, device)
        warnings.warn(f"{error}; the previous one, {previous.name}, is used", stacklevel=3)
        return read


def previous_of(path: Path) -> Path:
    """Return the path of the checkpoint before the one at ``path``."""
    return path.with_name(path.name + ".prev")


def _read(path: Path, device: torch.device | str) -> tuple[dict[str, Any], str]:
    if path.exists() and not path.is_file():  # opening a FIFO or a device may never return
        raise UserError(f"{path}: a checkpoint must be a regular file")
    try:
        with open(path, "rb") as file:
            if not _matches(file):
                file.seek(0)
                header = file.read(len(SEAL))
                fault = "its digest does not match" if header.startswith(SEAL[:24]) else "its header is another"
                raise UserError(f"{path} is damaged or not a checkpoint: {fault}")
            file.seek(len(SEAL))
            digest = file.read(SEALED - len(SEAL)).decode().strip()
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
    except UserError:
        raise
    except Exception as error:  # torch.load raises nearly anything on what torch.save has not written
        raise UserError(f"{path} holds nothing that torch.save writes, and is not loaded: {one_line(error)}") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} must hold a mapping, got a {type(state).__name__}; it is no checkpoint")
    return state, digest
