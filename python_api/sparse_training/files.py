"""Atomic writes of files, and JSON files."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.utils import _pytree as pytree

from sparse_training.errors import UserError

LARGEST_JSON = 1 << 30  # bytes


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
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        before(temporary)
        os.replace(temporary, path)
    except OSError as error:  # a full disk or a limit: the old file stays, and the partial one is removed
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
