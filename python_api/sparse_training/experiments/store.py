"""Folder of an experiment: its settings, its calibration, and a file for each finished run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_training import files
from sparse_training.errors import UserError
from sparse_training.training.checkpoint import load_checkpoint, save_checkpoint
from sparse_training.training.clock import Costs
from sparse_training.training.optimizers import DEFAULT_OPTIMIZER
from sparse_training.training.schedule import LR_WARMUP
from sparse_training.training.state import CHECKPOINT

SETTINGS, CALIBRATION, RUNS = "settings.json", "calibration.json", "runs"

# What runs were made with before settings named it; None need not be here.
UNRECORDED = {"optimizer": DEFAULT_OPTIMIZER, "schedule": "cosine", "lr_warmup": LR_WARMUP}

# Entries without which a run's file is something else.
OF_A_RUN = ("arm", "seed", "accuracy", "seconds", "steps", "rows_trained", "evals", "trace", "warnings")

LONGEST = 240  # bytes of a file name without suffixes: file systems take 255

Counts = dict[str, Tensor]  # a number for each training row, by kind


class Store:
    """Finished runs and calibration, kept in a folder between interruptions, or in memory.

    Args:
        folder: folder to keep everything in, made when there is something to keep; None for memory.
        settings: what must agree with the settings that the folder was made with, by name.
        resume: True to continue what the folder holds.
        kind: kind of experiment, in messages.

    Raises:
        UserError: the folder was made with other settings, or holds an experiment and ``resume`` is False.
    """

    def __init__(
        self, folder: Path | None, settings: Mapping[str, Any], resume: bool, kind: str = "comparison"
    ) -> None:
        self.folder, self.settings = folder, settings
        self._costs: dict[str, Costs] = {}
        self._runs: dict[str, tuple[dict[str, Any], Counts]] = {}
        self._weights: dict[str, dict[str, Any]] = {}
        if folder is None:
            return
        path = folder / SETTINGS
        if path.exists():
            if not resume:
                raise UserError(f"{folder} holds a {kind} already; resume it, or choose another folder")
            made = {**UNRECORDED, **files.read_json_object(path)}
            if differing := [name for name in settings if made.get(name) != settings[name]]:
                said = ", ".join(f"{name} {made.get(name)} is now {settings[name]}" for name in differing)
                raise UserError(f"{folder} was made with other settings: {said}")

    def _make(self) -> None:
        """Make the folder, if it is not there."""
        if self.folder is not None and not (self.folder / SETTINGS).exists():
            (self.folder / RUNS).mkdir(parents=True, exist_ok=True)
            files.write_json(self.folder / SETTINGS, self.settings)

    def costs(self, bench: str = "") -> Costs | None:
        """The clock's costs on a bench; None before they are measured."""
        path = None if self.folder is None else self.folder / _calibration(bench)
        if path is None or not path.exists():
            return self._costs.get(bench)
        try:
            return Costs.from_dict(files.read_json_object(path))
        except UserError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{path} is no calibration of a clock: {type(error).__name__} {error}") from None

    def has_costs(self, bench: str = "") -> bool:
        """True where the costs of a bench are known."""
        return self.costs(bench) is not None

    def keep_costs(self, costs: Costs, bench: str = "") -> Costs:
        """Keep the clock's costs on a bench and return them."""
        self._make()
        self._costs[bench] = costs
        if self.folder is not None:
            files.write_json(self.folder / _calibration(bench), costs.to_dict())
        return costs

    def has_run(self, name: str) -> bool:
        """True where the run of that name is finished."""
        return name in self._runs if self.folder is None else self.path(name).exists()

    def run(self, name: str) -> tuple[dict[str, Any], Counts] | None:
        """A finished run and its counts by row; None if it is still to be done."""
        if self.folder is None:
            return self._runs.get(name)
        path = self.path(name)
        if not path.exists():
            return None
        run, counts = files.read_json_object(path), path.with_suffix(".counts")
        if missing := [entry for entry in OF_A_RUN if entry not in run]:
            raise UserError(f"{path} is no run of an experiment: it has no {missing[0]!r}")
        return run, load_checkpoint(counts) if counts.exists() else {}

    def keep_run(self, name: str, run: dict[str, Any], counts: Counts) -> None:
        """Keep a finished run."""
        if self.folder is None:
            self._runs[name] = run, counts
            return
        self._make()
        path = self.path(name)
        if counts:
            save_checkpoint(path.with_suffix(".counts"), counts)
        files.write_json(path, run)  # last: it marks the run as finished

    def weights(self, name: str, device: torch.device) -> dict[str, Any] | None:
        """Weights kept under a name; None for none."""
        if self.folder is None:
            return self._weights.get(name)
        path = self.folder / RUNS / f"{name}.pt"
        return load_checkpoint(path, device) if path.exists() else None

    def keep_weights(self, name: str, weights: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """Keep weights under a name, and return them as they are read back."""
        if self.folder is None:
            self._weights[name] = weights
            return weights
        self._make()
        path = self.folder / RUNS / f"{name}.pt"
        save_checkpoint(path, weights)
        return load_checkpoint(path, device)

    def path(self, name: str) -> Path:
        """File of a run."""
        assert self.folder is not None
        return self.folder / RUNS / f"{file_name(name)}.json"

    def checkpoints(self, name: str) -> Path | None:
        """Folder of a run's checkpoints while it is in progress; None in memory."""
        return None if self.folder is None else self.path(name).with_suffix("")

    def clear_checkpoints(self, name: str) -> None:
        """Remove the checkpoints of a finished run."""
        folder = self.checkpoints(name)
        if folder is None or not folder.is_dir():
            return
        for path in folder.glob(f"{CHECKPOINT}*"):
            path.unlink()
        folder.rmdir()


def _calibration(bench: str) -> str:
    """File of a bench's costs."""
    return f"calibration-{bench}.json" if bench else CALIBRATION


def file_name(name: str) -> str:
    """File name of a run: its own name, or a readable part and a digest where that cannot be a file's name.

    Slashes (of a scorer's file) and names that are too long cannot.
    """
    readable = name.replace("/", "_")
    if readable == name and len(name.encode()) <= LONGEST:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{readable.encode()[: LONGEST - 17].decode(errors='ignore')}~{digest}"
