"""Clock of a run: calibrated, or raw seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from sparse_training.devices import synchronize
from sparse_training.errors import UserError

STAGES = ("load", "score", "select", "train")
Curve = tuple[tuple[int, ...], tuple[float, ...]]  # rows ascending, median seconds of each


@dataclass(frozen=True)
class Costs:
    """Median seconds of each stage of a step, by the number of rows that the stage works on.

    Loading n rows and training on them is the same work for all policies, so all share those curves; scoring and
    selecting are measured for each policy. Between measured row counts the cost is interpolated linearly.

    Attributes:
        shared: curves of the stages "load" and "train".
        own: for each policy's name, curves of the stages "score" and "select", and of "observe" where the policy
            keeps losses or its scorer is trained.
        rounds: number of timed rounds that the medians are of.
    """

    shared: dict[str, Curve]
    own: dict[str, dict[str, Curve]]
    rounds: int
    _steps: dict[Any, dict[str, float]] = field(default_factory=dict, compare=False, repr=False)

    def step(
        self, policy: str, loaded: int, trained: int, offered: int | None = None, observer: str | None = None
    ) -> dict[str, float]:
        """Return the seconds of each stage of a step.

        Args:
            policy: name of the step's policy.
            loaded: rows loaded and scored.
            trained: rows trained on.
            offered: rows that the policy chose from before loading; choosing reads all of them. Default: ``loaded``.
            observer: name of the policy that keeps the losses (counted in "select"), which may be another than the
                step's in a dense phase. Default: ``policy``.

        Returns:
            Seconds by the stages "load", "score", "select" and "train", and their "total".

        Raises:
            UserError: a policy that was not calibrated.
        """
        offered, observer = loaded if offered is None else offered, observer or policy
        key = (policy, loaded, trained, offered, observer)
        if key not in self._steps:
            for name in (policy, observer):
                if name not in self.own:
                    raise UserError(
                        f"the clock has no costs for the policy {name!r}: it was calibrated for {', '.join(self.own)}"
                    )
            rows = {"load": loaded, "score": loaded, "select": offered, "train": trained}
            curves = {**self.shared, **self.own[policy]}
            cost = {stage: _interpolate(curves[stage], rows[stage]) for stage in STAGES}
            cost["select"] += self.observe_seconds(observer, trained)
            self._steps[key] = {**cost, "total": sum(cost.values())}
        return self._steps[key]

    def reaches(self, rows: int) -> bool:
        """Tell whether training on that many rows, or more, was timed; ``step`` does not extrapolate beyond."""
        return rows <= max(self.shared["train"][0])

    def observe_seconds(self, policy: str, trained: int) -> float:
        """Return the seconds, per step, that keeping the losses of the trained rows and training a scorer take."""
        curves = self.own[policy]
        return _interpolate(curves["observe"], trained) if "observe" in curves else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers for a checkpoint or JSON; ``from_dict`` is the inverse, bit for bit."""
        return {"shared": self.shared, "own": self.own, "rounds": self.rounds}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Costs:
        """Restore ``to_dict``.

        Raises:
            ValueError: curves that are missing or are none; LookupError or TypeError where it is no such state at all.
        """

        def curves(lists: Mapping[str, Any], stages: tuple[str, ...]) -> dict[str, Curve]:
            found = {stage: (tuple(rows), tuple(seconds)) for stage, (rows, seconds) in lists.items()}
            for stage in (*stages, *found):
                rows, seconds = found[stage]
                if not rows or len(rows) != len(seconds) or any(before >= after for before, after in pairwise(rows)):
                    raise ValueError(f"{stage} must have a time for each of ascending numbers of rows")
                if not all(math.isfinite(second) and second >= 0.0 for second in seconds):
                    raise ValueError(f"{stage} must have finite times of at least 0 seconds")
            return found

        own = {policy: curves(lists, ("score", "select")) for policy, lists in state["own"].items()}
        return cls(curves(state["shared"], ("load", "train")), own, int(state["rounds"]))


class Clock:
    """Seconds of a run: calibrated where ``costs`` are given, else raw.

    Raw time counts between ``start`` and ``stop`` alone, so that evaluation is left out.

    Args:
        costs: measured seconds of each kind of step; None for raw seconds. Default None.

    Attributes:
        costs: as given, or restored from a checkpoint.
        raw_seconds: raw seconds of the finished stretches.
    """

    def __init__(self, costs: Costs | None = None) -> None:
        self.costs = costs
        self.raw_seconds = 0.0
        self._charged = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds of the run so far."""
        if self.costs is not None:
            return self._charged
        running = time.perf_counter() - self._started if self._started is not None else 0.0
        return self.raw_seconds + running

    def charge(
        self, policy: str, loaded: int, trained: int, offered: int | None = None, observer: str | None = None
    ) -> None:
        """Advance a calibrated clock by one step; raw seconds advance by themselves.

        Args:
            policy: name of the step's policy.
            loaded: rows loaded and scored.
            trained: rows trained on.
            offered: rows that the policy chose from before loading. Default: ``loaded``.
            observer: name of the policy that keeps the losses. Default: ``policy``.
        """
        if self.costs is not None:
            self._charged += self.costs.step(policy, loaded, trained, offered, observer)["total"]

    def start(self) -> None:
        """Begin a stretch of raw time."""
        self._started = time.perf_counter()

    def stop(self, device: torch.device) -> None:
        """End a stretch of raw time, after the device has finished its work."""
        if self._started is not None:
            synchronize(device)
            self.raw_seconds += time.perf_counter() - self._started
            self._started = None

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds and costs, for a checkpoint."""
        costs = None if self.costs is None else self.costs.to_dict()
        return {"costs": costs, "charged": self._charged, "raw_seconds": self.raw_seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``; the checkpoint's costs replace this clock's."""
        self.costs = None if state["costs"] is None else Costs.from_dict(state["costs"])
        self._charged, self.raw_seconds = float(state["charged"]), float(state["raw_seconds"])


def _interpolate(curve: Curve, rows: int) -> float:
    return float(np.interp(rows, *curve)) if rows else 0.0
