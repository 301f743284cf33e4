"""Atomic writes of files, and JSON files."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.utils import _pytree as pytree

from sparse_training.errors import UserError, one_line

LARGEST_JSON = 1 << 30  # bytes
SEAL = b"sparse-training checkpoint 1 "  # first bytes of a checkpoint; a digest in hexadecimal and a newline follow
SEALED = len(SEAL) + 64 + 1  # bytes before its content


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part of one.

    Args:
        path: file to write or replace.
        data: its content.

    Raises:
        UserError: the file cannot be written, because the disk is full or for another reason; the old one is kept.
    """
    _write(path, lambda file: file.write(data))


def _write(path: Path, fill: Callable[[BinaryIO], Any], before: Callable[[Path], None] = lambda written: None) -> None:
    """Fill a file beside ``path``, call ``before`` with it once it is on the disk, and give it the name."""
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        before(temporary)
        os.replace(temporary, path)
    except BaseException as error:  # the old file stays, and the partial one is removed
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):  # a full disk or a limit
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
        raise
    if hasattr(os, "O_DIRECTORY"):  # POSIX: the new name must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def make_folder(folder: Path, name: str) -> None:
    """Make a folder if it is not there, and make sure that a file can be written into it.

    Args:
        folder: the folder.
        name: name of the file that is to be written there, which is left as it is.

    Raises:
        UserError: the folder cannot be made, or nothing can be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = _temporary(folder / name)
        with open(probe, "wb"):
            pass
        probe.unlink(missing_ok=True)  # another rank may have been faster
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        raise UserError(f"{folder} cannot be written to: {getattr(error, 'strerror', None) or error}") from None


def _temporary(path: Path) -> Path:
    """Return the file beside another in which that is written before it takes its name."""
    return path.with_name(path.name + ".tmp")


def write_torch(path: Path, value: Any) -> None:
    """Write a value atomically, as ``torch.save`` does.

    Args:
        path: file to write or replace.
        value: value that ``torch.save`` takes.

    Raises:
        UserError: the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_atomic(path, buffer.getvalue())


def read_torch(path: Path) -> Any:
    """Read a file that ``torch.save`` wrote, or a checkpoint of a run, onto the CPU; it can run no code.

    Args:
        path: file to read.

    Returns:
        The value.

    Raises:
        UserError: the file is missing, is not a regular one, or holds something else.
    """
    try:
        if not path.is_file():  # opening a FIFO or a device may never return
            raise UserError(f"{path}: no such file" if not path.exists() else f"{path} must be a regular file")
        with open(path, "rb") as file:
            file.seek(SEALED if file.read(len(SEAL)) == SEAL else 0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds more than tensors and plain containers, and is not loaded") from None
    except Exception as error:  # torch.load raises nearly anything on what torch.save has not written
        raise UserError(f"{path} holds nothing that torch.save writes, and is not loaded: {one_line(error)}") from None


def write_json(path: Path, value: Any) -> None:
    """Write a value atomically as indented JSON.

    Args:
        path: file to write or replace.
        value: value that ``json.dumps`` takes.

    Raises:
        UserError: the file cannot be written.
    """
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read the value in a JSON file.

    Args:
        path: file to read, of at most ``LARGEST_JSON`` bytes.

    Returns:
        The value.

    Raises:
        UserError: the file is missing, is not a regular one or too large, or is not JSON.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a FIFO or a device may never return
            raise UserError(f"{path}: a JSON file must be a regular file")
        if status.st_size > LARGEST_JSON:
            raise UserError(f"{path}: a JSON file must have at most {LARGEST_JSON} bytes, got {status.st_size}")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except UserError:  # a ValueError too
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object, of numbers that are finite.

    Args:
        path: file to read.

    Returns:
        Its entries.

    Raises:
        UserError: as of ``read_json``; or another value, or a number that is not finite.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(value).__name__}")
    for name, entry in value.items():
        for part in pytree.tree_leaves(entry):
            if isinstance(part, float) and not math.isfinite(part):
                raise UserError(f"{path}: {name} must be finite, got {part}")
    return value
