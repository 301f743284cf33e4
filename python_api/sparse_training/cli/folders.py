"""Folders of runs, and the preparation that every command which trains needs."""

from __future__ import annotations

import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

import sparse_kernels
from sparse_kernels import keep_freed_memory
from sparse_training import devices, files
from sparse_training.errors import UserError
from sparse_training.ranks import launched

OPTIONS = "options.json"
# Names in options.json of version 0.1.0.
_FORMER_NAMES = {
    "anneal": "dense_end",
    "arms": "methods",
    "checkpoint_every": "checkpoint_interval",
    "policies": "methods",
    "warmup": "dense_start",
}


def new_folder(out: str | None, command: str) -> Path:
    """Choose the folder of a new run; it is not made yet.

    Args:
        out: folder that the user named; None for one under runs/, named by the time.
        command: name of the command, which the default ends with.

    Raises:
        UserError: it exists and is not an empty folder.
    """
    folder = Path(out) if out is not None else Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{command}"
    # A run that was killed before it began may leave half a file of its options.
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {OPTIONS + ".tmp"}):
        raise UserError(
            f"{folder} exists and is not empty; name a new folder, or continue it with: sparse-train resume {folder}"
        )
    return folder


def choose_folder(out: str | None, command: str, resume: bool) -> tuple[Path, bool]:
    """Choose the folder of an experiment.

    Args:
        out: folder that the user named, or None.
        command: name of the command.
        resume: True to go on with what ``out`` holds.

    Returns:
        The folder, and True where there is something to resume in it.

    Raises:
        UserError: ``resume`` without ``out``, or a folder in use.
    """
    if resume and out is None:
        raise UserError("--resume needs --out, the folder to go on with")
    if resume and out is not None and Path(out).exists():
        return Path(out), True
    return new_folder(out, command), False


def write_options(folder: Path, options: dict[str, Any]) -> None:
    """Make the folder of a run, and write down how to repeat it."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / OPTIONS, options)


def read_options(folder: Path) -> dict[str, Any]:
    """Read the options that a run was made with, under today's names.

    Raises:
        UserError: none there, or something else.
    """
    found = files.read_json_object(folder / OPTIONS)
    return {_FORMER_NAMES.get(name, name): value for name, value in found.items()}


def print_resume(folder: Path) -> None:
    """Say how a stopped run is continued."""
    print(f"stopped; to go on: {resume_line(folder)}", file=sys.stderr)


def resume_line(folder: Path) -> str:
    """Return the command line that continues a run, with the flag that a module:factory needs."""
    options = read_options(folder)
    scorers = " ".join(str(options.get(name)) for name in ("policy", "scorer", "methods"))
    code = ":" in str(options.get("model")) or re.search(r"proxy:[\w.]+:", scorers)
    return f"sparse-train resume {'--trust-code ' if code else ''}{shlex.quote(str(folder))}"


def refuse_torchrun(command: str) -> None:
    """Refuse several processes for a command that times steps.

    Raises:
        UserError: torchrun started more than one.
    """
    if launched()[1] > 1:
        raise UserError(f"{command} needs one process, got {launched()[1]}: they would time one another")


def prepare(options: dict[str, Any]) -> torch.device:
    """Set the threads and find the device.

    Args:
        options: of the command; whatever a name in them can get wrong is found here.

    Raises:
        UserError: no such device or backend here, or dense phases that leave no sparse phase.
    """
    keep_freed_memory()
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    sparse_kernels.compact(torch.ones(1, dtype=torch.bool))  # refuses a backend that is not there
    if options.get("dense_start", 0.0) + options.get("dense_end", 0.0) > 1.0:
        raise UserError(
            f"--dense-start {options['dense_start']} and --dense-end {options['dense_end']} add up to more than 1"
        )
    return devices.find(options["device"])
