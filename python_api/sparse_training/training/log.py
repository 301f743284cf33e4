"""What a run did, and where it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sparse_training.selection.policies.base import Policy
from sparse_training.training.schedule import PHASES

TRACED = ("rate", "threshold", "mass")  # a policy may not know the last


@dataclass
class TrainingLog:
    """What a run did. Counts that the device makes stay there until ``to_dict`` reads them."""

    steps: int = 0  # batches gone through, with or without an optimiser step
    rows_seen: int | Tensor = 0
    rows_trained: int | Tensor = 0
    offered: int | Tensor = 0  # rows of the sparse phase, and how many of them were kept
    kept: int | Tensor = 0
    phases: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    evals: list[dict[str, float]] = field(default_factory=list)
    trace: list[tuple[Any, ...]] = field(default_factory=list)  # step, and what the policy's ``trace`` said of it
    seconds: float = 0.0
    raw_seconds: float = 0.0
    joules: float | None = None  # measured, without evaluation; None where there is no meter
    meter: str = "no meter"
    operations: dict[str, float] = field(default_factory=dict)  # counted: "score" and "train"
    warnings: list[str] = field(default_factory=list)
    interrupted: bool = False
    selected: Tensor | None = None  # int32 [rows of the data set]: times kept in the sparse phase,
    seen: Tensor | None = None  # and times scored (None if not), where the loader knows rows by number

    @property
    def rate(self) -> float | None:
        """Rows kept of rows offered in the sparse phase; None before it."""
        offered = int(self.offered)
        return int(self.kept) / offered if offered else None

    def together(self, others: Sequence[TrainingLog]) -> None:
        """Counts of all ranks of a run instead of this one's; rank r of n numbers rows r, r + n, ... from 0."""
        for name in ("rows_seen", "rows_trained", "offered", "kept"):
            setattr(self, name, sum(int(getattr(each, name)) for each in others))
        kinds = dict.fromkeys(kind for each in others for kind in each.operations)
        self.operations = {kind: sum(each.operations.get(kind, 0.0) for each in others) for kind in kinds}
        for name in ("selected", "seen"):
            parts = [part for each in others if (part := getattr(each, name)) is not None]
            if len(parts) == len(others):
                all_rows = parts[0].new_zeros(sum(map(len, parts)))
                for rank, part in enumerate(parts):
                    all_rows[rank :: len(parts)] = part
                setattr(self, name, all_rows)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; waits for the device."""
        return {
            "seconds": self.seconds,
            "raw_seconds": self.raw_seconds,
            "steps": self.steps,
            "rows_seen": int(self.rows_seen),
            "rows_trained": int(self.rows_trained),
            "rate": self.rate,
            "phases": dict(self.phases),
            "evals": list(self.evals),
            "trace": [
                {"step": step, **{name: float(value) for name, value in zip(TRACED, values, strict=False)}}
                for step, *values in self.trace
            ],
            "joules": {"measured": self.joules, "by": self.meter},
            "flops": {"counted": sum(self.operations.values()), **self.operations},
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class Status:
    """Where a run is, for a progress display."""

    progress: float  # of the budget, 0 to 1
    phase: str
    step: int
    seconds: float
    evaluation: Mapping[str, float] | None  # the latest
    policy: Policy  # of the step just done; reading what its ``trace`` gives waits for the device
