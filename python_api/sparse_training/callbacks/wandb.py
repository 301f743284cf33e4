"""A run's numbers for Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparse_training.callbacks.scalars import INTERVAL, ScalarLogger
from sparse_training.errors import UserError
from sparse_training.training.callbacks import Run


class WeightsAndBiases(ScalarLogger):
    """Logs a run's numbers and settings by the library ``wandb``: see ``ScalarLogger``.

    A run that is resumed from a checkpoint goes on under its own identifier. Without a network: ``mode="offline"`` or
    the environment variable ``WANDB_MODE``.

    Example:
        >>> trainer.fit(loader, epochs=10, callbacks=[WeightsAndBiases(project="digits", mode="offline")])

    Args:
        interval: steps between two points, at least 1. Default 50.
        **init: arguments of ``wandb.init``, such as ``project``, ``name``, ``dir`` or ``mode``. ``config`` is added to
            the run's own settings.

    Raises:
        UserError: the package wandb is not installed, or an interval out of range.
    """

    def __init__(self, interval: int = INTERVAL, **init: Any) -> None:
        super().__init__(interval)
        try:
            import wandb
        except ImportError as error:
            raise UserError(f"wandb cannot be used ({error}): pip install wandb") from None
        self._init, self.init = wandb.init, init
        self._identifier: str | None = None
        self._run: Any = None

    def open(self, run: Run) -> None:
        """Begin a run, or go on with the one of the checkpoint."""
        arguments = dict(self.init)
        if run.log.steps and self._identifier is not None:
            arguments = {"id": self._identifier, "resume": "allow", **arguments}
        few = {name: value for name, value in run.settings.items() if name not in ("model", "model_options")}
        arguments["config"] = {**few, **arguments.get("config", {})}
        self._run = self._init(**arguments)
        self._identifier = str(self._run.id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers."""
        self._run.log(dict(values), step=step)

    def close(self, error: BaseException | None) -> None:
        """Finish the run, as failed where an exception ended the training."""
        self._run.finish(exit_code=0 if error is None else 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the run's identifier."""
        return {} if self._identifier is None else {"identifier": self._identifier}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self._identifier = str(state["identifier"])
