"""The folder of a comparison or a study: its settings, its calibration, and a file for each finished run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_training import files
from sparse_training.errors import UserError
from sparse_training.training.checkpoint import load_checkpoint, save_checkpoint
from sparse_training.training.clock import Costs

SETTINGS, CALIBRATION, RUNS = "settings.json", "calibration.json", "runs"

LONGEST = 240  # bytes of a name: file systems take 255, suffixes among them

Counts = dict[str, Tensor]  # a number for each training row, by name


class Store:
    """What is kept between interruptions; without a folder nothing is.

    Raises:
        UserError: the folder holds something made with other settings, or anything without ``resume``.
    """

    def __init__(
        self, folder: Path | None, settings: Mapping[str, Any], resume: bool, kind: str = "comparison"
    ) -> None:
        self.folder = folder
        if folder is None:
            return
        path = folder / SETTINGS
        if path.exists():
            if not resume:
                raise UserError(f"{folder} holds a {kind} already: resume it, or choose another folder")
            made = files.read_json(path)
            if differing := [name for name in settings if made.get(name) != settings[name]]:
                said = ", ".join(f"{name} {made.get(name)} is now {settings[name]}" for name in differing)
                raise UserError(f"{folder} was made with other settings: {said}")
        else:
            (folder / RUNS).mkdir(parents=True, exist_ok=True)
            files.write_json(path, settings)

    def costs(self) -> Costs | None:
        if self.folder is None or not (self.folder / CALIBRATION).exists():
            return None
        return Costs.from_dict(files.read_json(self.folder / CALIBRATION))

    def keep_costs(self, costs: Costs) -> Costs:
        if self.folder is not None:
            files.write_json(self.folder / CALIBRATION, costs.to_dict())
        return costs

    def run(self, name: str) -> tuple[dict[str, Any], Counts] | None:
        """A finished run and its counts by row; None if it is still to be done."""
        if self.folder is None or not (path := self.path(name)).exists():
            return None
        counts = path.with_suffix(".counts")
        return files.read_json(path), load_checkpoint(counts) if counts.exists() else {}

    def keep_run(
        self, name: str, run: dict[str, Any], counts: Mapping[str, Tensor | None]
    ) -> tuple[dict[str, Any], Counts]:
        """File a run; its JSON comes last, for that is what says that it is finished."""
        known = {kind: count for kind, count in counts.items() if count is not None}
        if self.folder is not None:
            path = self.path(name)
            if known:
                save_checkpoint(path.with_suffix(".counts"), known)
            files.write_json(path, run)
        return run, known

    def path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / RUNS / f"{file_name(name)}.json"

    def checkpoints(self, name: str) -> Path:
        """The folder of a run's checkpoints, while it is in progress."""
        return self.path(name).with_suffix("")


def file_name(name: str) -> str:
    """What a run's files are called: its name; or where no file can be, as with the slashes of a scorer's file, what
    can be read of it and a digest."""
    readable = name.replace("/", "_")
    if readable == name and len(name.encode()) <= LONGEST:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{readable.encode()[: LONGEST - 17].decode(errors='ignore')}~{digest}"
