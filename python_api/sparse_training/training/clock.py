"""The clock of a run: calibrated, or raw seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sparse_training.devices import synchronize
from sparse_training.errors import UserError

STAGES = ("load", "score", "select", "train")
Curve = tuple[tuple[int, ...], tuple[float, ...]]  # rows ascending, median seconds of each


@dataclass(frozen=True)
class Costs:
    """Median seconds of each stage of a step by the number of rows that it works on.

    To load or to train on n rows is the same work whoever chose them, so all arms share those curves;
    scoring and selecting are each arm's own. Between measured row counts cost is linear.
    """

    shared: dict[str, Curve]  # "load" and "train"
    own: dict[str, dict[str, Curve]]  # arm -> "score", "select" and, where there is anything, "observe"
    rounds: int
    _known: dict[Any, dict[str, float]] = field(default_factory=dict, compare=False, repr=False)

    def step(
        self, arm: str, loaded: int, trained: int, offered: int | None = None, observer: str | None = None
    ) -> dict[str, float]:
        """Seconds of each stage, and their "total", of a step of that arm.

        Args:
            offered: rows before the arm chose which to load, for choosing goes through all of them; by
                default as many as were loaded.
            observer: the arm that keeps the losses (in "select"), also of the steps that are not its own, such
                as those of a warm-up; by default the step's arm.

        Raises:
            UserError: an arm was not calibrated.
        """
        offered, observer = loaded if offered is None else offered, observer or arm
        key = (arm, loaded, trained, offered, observer)
        if key not in self._known:
            for name in (arm, observer):
                if name not in self.own:
                    raise UserError(
                        f"the clock has no costs for the policy {name!r}: it was calibrated for {', '.join(self.own)}"
                    )
            rows = {"load": loaded, "score": loaded, "select": offered, "train": trained}
            curves = {**self.shared, **self.own[arm]}
            cost = {stage: _interpolate(curves[stage], rows[stage]) for stage in STAGES}
            cost["select"] += self.beside(observer, trained)
            self._known[key] = {**cost, "total": sum(cost.values())}
        return self._known[key]

    def reaches(self, rows: int) -> bool:
        """Whether training on so many rows was timed, or on more; beyond, ``step`` takes the most that was."""
        return rows <= max(self.shared["train"][0])

    def beside(self, arm: str, trained: int) -> float:
        """Seconds, in each step, of keeping the losses of the rows trained on and of training a scorer on them."""
        return _interpolate(self.own[arm]["observe"], trained) if "observe" in self.own[arm] else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain containers for a checkpoint or JSON; ``from_dict`` is its inverse, bit for bit."""
        return {"shared": self.shared, "own": self.own, "rounds": self.rounds}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Costs:
        def curves(found: Mapping[str, Any]) -> dict[str, Curve]:
            return {stage: (tuple(rows), tuple(seconds)) for stage, (rows, seconds) in found.items()}

        own = {arm: curves(found) for arm, found in state["own"].items()}
        return cls(curves(state["shared"]), own, int(state["rounds"]))


class Clock:
    """Seconds of a run: calibrated where ``costs`` are given, raw otherwise.

    ``start`` and ``stop`` enclose what counts as raw time, so that evaluation does not.
    """

    def __init__(self, costs: Costs | None = None) -> None:
        self.costs = costs
        self.raw_seconds = 0.0
        self._charged = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        if self.costs is not None:
            return self._charged
        running = time.perf_counter() - self._started if self._started is not None else 0.0
        return self.raw_seconds + running

    def charge(
        self, arm: str, loaded: int, trained: int, offered: int | None = None, observer: str | None = None
    ) -> None:
        """Advance by one step of that arm which loaded (and scored) and trained on so many rows: ``Costs.step``."""
        if self.costs is not None:
            self._charged += self.costs.step(arm, loaded, trained, offered, observer)["total"]

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self, device: torch.device) -> None:
        """End a stretch of raw time, once the device has done what was asked of it."""
        if self._started is not None:
            synchronize(device)
            self.raw_seconds += time.perf_counter() - self._started
            self._started = None

    def state_dict(self) -> dict[str, Any]:
        costs = None if self.costs is None else self.costs.to_dict()
        return {"costs": costs, "charged": self._charged, "raw_seconds": self.raw_seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.costs = None if state["costs"] is None else Costs.from_dict(state["costs"])
        self._charged, self.raw_seconds = float(state["charged"]), float(state["raw_seconds"])


def _interpolate(curve: Curve, rows: int) -> float:
    return float(np.interp(rows, *curve)) if rows else 0.0
