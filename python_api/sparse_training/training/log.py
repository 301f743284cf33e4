"""Log of a run, and its status while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_training.selection.policies.base import Policy
from sparse_training.training.schedule import PHASES

TRACED = ("rate", "threshold", "mass")  # mass: share of the gradient norm kept, where the policy measures it


def evaluation_numbers(evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the numbers of an evaluation by name, without its "seconds" and "step"; none for None."""
    return {name: value for name, value in (evaluation or {}).items() if name not in ("seconds", "step")}


def in_words(numbers: Mapping[str, float]) -> list[str]:
    """Write each number with its name: an accuracy in percent, others with four digits."""
    return [f"{name} {value:.2%}" if name == "accuracy" else f"{name} {value:.4g}" for name, value in numbers.items()]


@dataclass
class TrainingLog:
    """Counts, evaluations and costs of a run; counts made on the device stay there until ``to_dict`` reads them.

    Attributes:
        steps: number of batches, with or without an optimizer step.
        rows_seen: rows of those batches.
        rows_trained: rows trained on.
        offered: rows of the sparse phase.
        kept: rows of the sparse phase that the policy kept.
        invalid: batches whose loss was not finite, which were not learned from.
        phases: steps of each phase.
        evals: results of the evaluations, each with its "seconds" and "step".
        trace: tuples of a step and the policy's ``trace`` after it, at most 500.
        seconds: seconds of the run's clock, without evaluation.
        raw_seconds: raw seconds, without evaluation.
        joules: energy measured, without evaluation; None where it was not measured.
        meter: name of the energy meter, or "no meter".
        operations: floating-point operations counted, by kind: "score" and "train".
        warnings: sentences for the reader of the results.
        notes: sentences on what the policy began to do to the training, in order.
        interrupted: True where the run was stopped before its end, to be resumed.
        stopped: why a callback ended the run; None where its budget was spent.
        selected: int32 [rows of the data set], how often each row was kept in the sparse phase; None where the loader
            does not know rows by index.
        seen: int32 [rows of the data set], how often each row was scored in it; None where nothing was scored.
    """

    steps: int = 0
    rows_seen: int | Tensor = 0
    rows_trained: int | Tensor = 0
    offered: int | Tensor = 0
    kept: int | Tensor = 0
    invalid: int | Tensor = 0
    phases: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    evals: list[dict[str, float]] = field(default_factory=list)
    trace: list[tuple[Any, ...]] = field(default_factory=list)
    seconds: float = 0.0
    raw_seconds: float = 0.0
    joules: float | None = None
    meter: str = "no meter"
    operations: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False
    stopped: str | None = None
    selected: Tensor | None = None
    seen: Tensor | None = None

    @property
    def rate(self) -> float | None:
        """Fraction of the sparse phase's rows that were kept; None before that phase."""
        offered = int(self.offered)
        return int(self.kept) / offered if offered else None

    def merge_ranks(self, logs: Sequence[TrainingLog], *, divided: bool) -> None:
        """Replace this rank's counts by those of all ranks.

        Args:
            logs: the logs of all ranks in order, this one's included.
            divided: True where rank r of n numbers the rows r, r + n, ... from 0; False where all number all rows.
        """
        for name in ("rows_seen", "rows_trained", "offered", "kept"):
            setattr(self, name, sum(int(getattr(log, name)) for log in logs))
        kinds = dict.fromkeys(kind for log in logs for kind in log.operations)
        self.operations = {kind: sum(log.operations.get(kind, 0.0) for log in logs) for kind in kinds}
        for name in ("selected", "seen"):
            parts = [part for log in logs if (part := getattr(log, name)) is not None]
            if len(parts) == len(logs) and not divided:
                setattr(self, name, torch.stack(parts).sum(0, dtype=torch.int32))
            elif len(parts) == len(logs):
                all_rows = parts[0].new_zeros(sum(map(len, parts)))
                for rank, part in enumerate(parts):
                    all_rows[rank :: len(parts)] = part
                setattr(self, name, all_rows)

    def state_dict(self) -> dict[str, Any]:
        """Return all fields, for a checkpoint."""
        return dict(vars(self))

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON; waits for the device."""
        return {
            "seconds": self.seconds,
            "raw_seconds": self.raw_seconds,
            "steps": self.steps,
            "rows_seen": int(self.rows_seen),
            "rows_trained": int(self.rows_trained),
            "rate": self.rate,
            "invalid_batches": int(self.invalid),
            "phases": dict(self.phases),
            "evals": list(self.evals),
            "trace": [
                {"step": step, **{name: float(value) for name, value in zip(TRACED, values, strict=False)}}
                for step, *values in self.trace
            ],
            "joules": {"measured": self.joules, "by": self.meter},
            "flops": {"counted": sum(self.operations.values()), **self.operations},
            "stopped": self.stopped,
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Status:
    """Status of a run after a step, for a progress display.

    Attributes:
        progress: part of the run that is done, in [0, 1].
        phase: phase of the step: "warmup" (dense start), "sparse" or "anneal" (dense end).
        step: number of steps done.
        seconds: seconds of the run's clock.
        evaluation: result of the latest evaluation; None before the first.
        policy: policy of the step; reading the values of its ``trace`` waits for the device.
        loss: mean loss of the rows that the latest batch was trained on, on the device, where reading it waits; with
            several processes of this one's rows. None before the first batch with rows. Default None.
        epoch: number of the pass over the data, from 0. Default 0.
        notes: sentences on what the policy has begun to do to the training, or why it trains on every row, in order.
            Default none.
    """

    progress: float
    phase: str
    step: int
    seconds: float
    evaluation: Mapping[str, float] | None
    policy: Policy
    loss: Tensor | None = None
    epoch: int = 0
    notes: tuple[str, ...] = ()
