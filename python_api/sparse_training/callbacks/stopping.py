"""Early stopping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparse_training.arguments import check_integer
from sparse_training.callbacks.monitor import Monitor
from sparse_training.training.callbacks import Callback, Run


class EarlyStopping(Callback):
    """Ends a run whose evaluations no longer get better.

    Give ``fit`` a validation split to evaluate on: a run that ends by its test set has chosen by it. A run that ends
    early has no dense end; ``TrainingLog.stopped`` says why it ended.

    Example:
        >>> trainer.fit(loader, epochs=50, evaluate=validation, callbacks=[EarlyStopping("accuracy", patience=3)])

    Args:
        monitor: number of the evaluation to go by, such as "loss" or "accuracy". Default "loss".
        patience: evaluations in a row without a better one that end the run, at least 1. Default 3.
        mode: "min" or "max", where the name does not tell. Default: "min" for losses and errors, "max" for
            accuracies and scores.
        min_delta: smallest difference that counts as better, at least 0. Default 0.

    Raises:
        UserError: an argument out of range.
    """

    def __init__(
        self, monitor: str = "loss", patience: int = 3, *, mode: str | None = None, min_delta: float = 0.0
    ) -> None:
        self.monitor = Monitor(monitor, mode, min_delta, owner="EarlyStopping")
        self.patience, self.waited = check_integer("patience", patience, 1), 0

    def on_fit_start(self, run: Run) -> None:
        """Refuse a run without evaluation; end one that ended here before."""
        self.monitor.check(run)
        if run.log.steps == 0:
            self.monitor.best, self.waited = None, 0
        self._stop_if_due(run)

    def on_evaluation_end(self, run: Run) -> None:
        """Count the evaluations since the best."""
        self.waited = 0 if self.monitor.improved(run) else self.waited + 1
        self._stop_if_due(run)

    def _stop_if_due(self, run: Run) -> None:
        if self.waited >= self.patience and self.monitor.best is not None:
            name, best, step = self.monitor.name, self.monitor.best, self.monitor.step
            run.stop(f"{name} was best at step {step}, {best:.4g}, and not better in {self.waited} evaluations since")
        elif self.waited >= self.patience:
            run.stop(f"{self.monitor.name} was not a number in {self.waited} evaluations")

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and the evaluations since."""
        return {**self.monitor.state_dict(), "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self.monitor.load_state_dict(state)
        self.waited = int(state["waited"])
