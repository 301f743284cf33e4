"""What a run does, as TensorBoard's scalars: a ``progress=`` of ``SparseTrainer.fit``."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch

from sparse_training.errors import UserError
from sparse_training.training.log import Status

EVERY = 50  # steps


class TensorBoard:
    """Writes loss, accuracy, rate, threshold, learning rate and seconds of the clock, by step.

        with TensorBoard("runs/one", trainer.optimizer) as board:
            trainer.fit(loader, steps=1000, evaluate=test, progress=board)

    Args:
        folder: where the event files go.
        optimizer: whose learning rate is written; None for none.
        every: steps between two points, for reading the controller waits for the device; evaluations are
            written whenever there is one.

    Raises:
        UserError: the package tensorboard is not installed.
    """

    def __init__(self, folder: str | Path, optimizer: torch.optim.Optimizer | None = None, every: int = EVERY) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"tensorboard cannot be used ({error}): pip install 'sparse-kernels[tensorboard]'"
            ) from None
        self.writer = SummaryWriter(str(folder))
        self.optimizer, self.every = optimizer, every
        self._evaluated = -1.0

    def __call__(self, status: Status) -> None:
        values: dict[str, float] = {}
        if status.step % self.every == 0 or status.progress >= 1.0:
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
        self.writer.close()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
