"""Files that are whole or absent, and JSON in them."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sparse_training.errors import UserError


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of one.

    Raises:
        UserError: it cannot be written, for want of space or otherwise; the old one is still there.
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
