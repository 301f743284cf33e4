"""Verdicts of the self-check, kept in the user's cache folder: one file for each device and set of versions.

Environment:
    SPARSE_KERNELS_CACHE: the folder, in place of the platform's own for caches.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from sparse_kernels._version import __version__

FORMAT = 1
AGREED = ""  # a verdict is the reason against a kernel; this is the verdict of one that agreed
_PACKAGE = Path(__file__).parents[1]


def folder() -> Path | None:
    """Return the folder of the verdicts, which need not exist; None if the user has no home."""
    given = os.environ.get("SPARSE_KERNELS_CACHE")
    if given:
        return Path(given)
    try:
        home = Path.home()
    except RuntimeError:
        return None
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
        base = base if base.is_absolute() else home / ".cache"  # a relative one is invalid
    return base / "sparse_kernels"


@functools.cache
def driver() -> str:
    """Return the version of the NVIDIA driver, or ``unknown``."""
    for name in ("libnvidia-ml.so.1", "nvml.dll"):
        with contextlib.suppress(OSError, AttributeError):
            nvml = ctypes.CDLL(name)
            text = ctypes.create_string_buffer(96)
            if nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(96)) == 0:
                return text.value.decode(errors="replace")
    return "unknown"


@functools.cache
def sources() -> str:
    """Return a digest of the kernels and of their self-check: what is edited is checked anew."""
    digest = hashlib.sha256()
    for path in sorted(
        [*_PACKAGE.glob("backends/**/*.py"), *_PACKAGE.glob("self_check/*.py"), *_PACKAGE.glob("_cuda*")]
    ):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _triton_version() -> str:
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "none"


@functools.cache
def surroundings(device: torch.device) -> dict[str, str]:
    """Return all that a verdict depends on.

    Args:
        device: a GPU; a CPU stands for Triton's interpreter.
    """
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else "interpreter",
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if gpu else "none",
        "driver": driver() if gpu else "none",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda or torch.version.hip),
        "triton": _triton_version(),
        "sparse_kernels": __version__,
        "sources": sources(),
    }


def path(device: torch.device) -> Path | None:
    """Return the device's file; None if there is no folder for it.

    Args:
        device: as in :func:`surroundings`.
    """
    where = folder()
    if where is None:
        return None
    digest = hashlib.sha256(json.dumps(surroundings(device)).encode()).hexdigest()[:24]
    return where / f"{digest}.json"


def load(device: torch.device) -> dict[str, str]:
    """Return the kept verdicts by their parts; empty if there is no file, or a damaged one.

    Args:
        device: as in :func:`surroundings`.
    """
    file = path(device)
    try:
        record: Any = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
        if record["format"] != FORMAT or record["surroundings"] != surroundings(device):
            return {}
        verdicts = dict(record["verdicts"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return verdicts if all(isinstance(reason, str) for reason in verdicts.values()) else {}


def save(device: torch.device, found: dict[str, str]) -> bool:
    """Add verdicts to the file, whole or not at all; return False if it cannot be written.

    Args:
        device: as in :func:`surroundings`.
        found: verdicts by their parts.
    """
    file = path(device)
    if file is None:
        return False
    record = {
        "format": FORMAT,
        "surroundings": surroundings(device),
        "verdicts": {**load(device), **found},
    }
    temporary = ""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".tmp")
        with open(handle, "w", encoding="utf-8") as stream:
            json.dump(record, stream, indent=1)
        os.replace(temporary, file)
    except OSError:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        return False
    return True
