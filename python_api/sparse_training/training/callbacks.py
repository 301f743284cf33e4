"""Callbacks of a run: the events that they follow, and what they see of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from sparse_training.errors import UserError
from sparse_training.selection.policies.base import Policy
from sparse_training.training.log import Status, TrainingLog
from sparse_training.training.step import TrainingStep

Evaluation = Iterable[Any] | Callable[[nn.Module], Mapping[str, float]]


@dataclass
class Run:
    """A run, as its callbacks see it.

    Attributes:
        trainer: the trainer, with ``model``, ``optimizer`` and ``policy``; ``update.evaluated`` is the model that is
            evaluated, the average of the weights where there is one.
        log: the run's counts so far; those of this process alone until the end.
        status: status after the latest step.
        settings: settings of the run by name, such as "policy", "lr" and "budget", as plain values.
        steps: number of steps of the whole run; None where its budget is of rows or seconds.
        checkpoint: path of the checkpoint; None for a run without.
        evaluates: True where the run has something to evaluate on.
        first: True on the first of the processes that train together, which alone writes files.
        stopped: why a callback ended the run; None while none has.
    """

    trainer: TrainingStep
    log: TrainingLog
    status: Status
    settings: Mapping[str, Any]
    steps: int | None
    checkpoint: Path | None
    evaluates: bool
    first: bool
    stopped: str | None = None

    def stop(self, reason: str) -> None:
        """End the run after this event, with an evaluation and a checkpoint, as if its budget were spent.

        Args:
            reason: why, for the log.
        """
        self.stopped = self.stopped or reason


class Callback:
    """Follows a run; subclass it and override the events that matter.

    Events are called on every process, in the order of the callbacks. What a callback raises ends the run; checkpoints
    that are written stay as they are.

    Example:
        >>> class Watch(Callback):
        ...     def on_evaluation_end(self, run):
        ...         print(run.status.step, run.status.evaluation)
        >>> trainer.fit(loader, epochs=10, evaluate=validation, callbacks=[Watch()])
    """

    passive = False  # True for a class that never calls ``run.stop``: where all are, processes need not agree on an end

    def on_fit_start(self, run: Run) -> None:
        """Called once before the first step; a run that is resumed is restored already."""

    def on_step_end(self, run: Run) -> None:
        """Called after every step, and after the evaluation that is due then."""

    def on_evaluation_end(self, run: Run) -> None:
        """Called after every evaluation, whose numbers are in ``run.status.evaluation``; the clock stands still."""

    def on_checkpoint_saved(self, run: Run) -> None:
        """Called after every checkpoint, which is at ``run.checkpoint``."""

    def on_fit_end(self, run: Run) -> None:
        """Called once after the last checkpoint; ``run.log.interrupted`` tells whether the run can be resumed."""

    def on_exception(self, run: Run, error: BaseException) -> None:
        """Called in place of ``on_fit_end`` where an exception ends the run, KeyboardInterrupt among them."""

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``; not called where the checkpoint has no state of this callback."""


class Callbacks:
    """The callbacks of a run, called in order.

    Args:
        callbacks: the callbacks; those of one class are told apart by their order.

    Raises:
        UserError: something that is no ``Callback``.
    """

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        given: tuple[Any, ...] = tuple(callbacks)
        for callback in given:
            if not isinstance(callback, Callback):
                name = getattr(callback, "__name__", type(callback).__name__)
                hint = f"; make it: {name}(...)" if isinstance(callback, type) else ""
                raise UserError(f"`callbacks` must be objects of subclasses of Callback, got {name}{hint}")
        self._all: tuple[Callback, ...] = given

    @property
    def deciding(self) -> list[str]:
        """Names of those that may end the run, which every process must have."""
        return [key for key, callback in self._keyed() if not callback.passive]

    def call(self, event: str, run: Run) -> None:
        """Call an event of each."""
        for callback in self._all:
            getattr(callback, event)(run)

    def call_all(self, event: str, *arguments: Any) -> None:
        """Call an event of each, of the later ones too where an earlier one raises."""
        with ExitStack() as stack:
            for callback in reversed(self._all):
                stack.callback(getattr(callback, event), *arguments)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each that has one, by its class."""
        return {key: state for key, callback in self._keyed() if (state := callback.state_dict())}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Restore ``state_dict``; a callback without a state begins afresh."""
        for key, callback in self._keyed():
            if key in states:
                callback.load_state_dict(states[key])

    def _keyed(self) -> Iterator[tuple[str, Callback]]:
        numbers: Counter[str] = Counter()
        for callback in self._all:
            name = type(callback).__qualname__
            numbers[name] += 1
            yield f"{name}:{numbers[name]}", callback


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
