"""A run's scalars for TensorBoard, written by a ``progress=`` callback of ``SparseTrainer.fit``."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch

from sparse_training.errors import UserError
from sparse_training.training.log import Status

INTERVAL = 50  # steps


class TensorBoard:
    """Writes loss, accuracy, rate, threshold, learning rate and seconds of the clock, by step.

    Example:
        >>> with TensorBoard("runs/one", trainer.optimizer) as board:
        ...     trainer.fit(loader, steps=1000, evaluate=test, progress=board)

    Args:
        folder: folder of the event files.
        optimizer: optimizer whose learning rate is written; None for no learning rate. Default None.
        interval: steps between two points; reading the controller waits for the device. Every evaluation is
            written. Default 50.

    Raises:
        UserError: the package tensorboard is not installed.
    """

    def __init__(
        self, folder: str | Path, optimizer: torch.optim.Optimizer | None = None, interval: int = INTERVAL
    ) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"tensorboard cannot be used ({error}): pip install 'sparse-kernels[tensorboard]'"
            ) from None
        self.writer = SummaryWriter(str(folder))
        self.optimizer, self.interval = optimizer, interval
        self._evaluated = -1.0

    def __call__(self, status: Status) -> None:
        """Write the scalars of a step, where they are due."""
        values: dict[str, float] = {}
        if status.step % self.interval == 0 or status.progress >= 1.0:
            values["clock/seconds"] = status.seconds
            if self.optimizer is not None:
                values["train/learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
            if (trace := status.policy.trace()) is not None:
                values |= {"gate/rate": float(trace[0]), "gate/threshold": float(trace[1])}
        if status.evaluation is not None and status.evaluation["seconds"] != self._evaluated:
            self._evaluated = status.evaluation["seconds"]
            values |= {
                f"test/{name}": value for name, value in status.evaluation.items() if name not in ("seconds", "step")
            }
        for name, value in values.items():
            self.writer.add_scalar(name, value, status.step)

    def close(self) -> None:
        """Write what is buffered and close the files."""
        self.writer.close()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
