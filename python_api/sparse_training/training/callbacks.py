"""Callbacks of a run: evaluation, progress displays, requests to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from sparse_training.selection.policies.base import Policy
from sparse_training.training.log import Status

Evaluation = Iterable[Any] | Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True)
class Callbacks:
    """Functions that a run calls.

    Attributes:
        evaluate: data to evaluate on, or a function of the model that returns named numbers; None for no evaluation.
            Default None.
        evaluations: number of evaluations in a run, evenly spaced, the last one at its end. Default 20.
        progress: called after every step with the run's status. Default None.
        stop: called after every step; once it returns true, the run saves its checkpoint and returns. Default None.
    """

    evaluate: Evaluation | None = None
    evaluations: int = 20
    progress: Callable[[Status], None] | None = None
    stop: Callable[[], bool] | None = None


class RateControl(Protocol):
    """Steers the rate of the sparse steps by what the run has spent; see ``profiling.budget_controller``."""

    unit: str

    def before(self, policy: Policy, spent: float) -> None:
        """Set the policy's rate for the next sparse step; ``spent`` is the run's cost so far."""

    def after(self, spent: float) -> None:
        """Record the run's cost after that step."""

    def warnings(self) -> list[str]:
        """Return sentences for the run's log."""

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers for a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""


class EnergyRecord(Protocol):
    """Energy of a run's measured stretches; see ``profiling.energy``."""

    joules: float | None

    @property
    def source(self) -> str:
        """Name of the meter, or "no meter"."""

    def start(self) -> None:
        """Begin a stretch."""

    def stop(self) -> None:
        """End a stretch."""

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers for a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
