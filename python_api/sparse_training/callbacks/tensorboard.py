"""A run's numbers for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_training.callbacks.scalars import INTERVAL, ScalarLogger
from sparse_training.errors import UserError
from sparse_training.training.callbacks import Run


class TensorBoard(ScalarLogger):
    """Writes a run's numbers as TensorBoard's scalars: see ``ScalarLogger``.

    Example:
        >>> trainer.fit(loader, steps=1000, evaluate=validation, callbacks=[TensorBoard("runs/one")])

    Args:
        folder: folder of the event files, made if missing. Steps that a resumed run takes again are drawn once.
        interval: steps between two points, at least 1. Default 50.

    Raises:
        UserError: the package tensorboard is not installed, or an interval out of range.
    """

    def __init__(self, folder: str | Path, interval: int = INTERVAL) -> None:
        super().__init__(interval)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"tensorboard cannot be used ({error}): pip install 'sparse-kernels[tensorboard]'"
            ) from None
        self.folder, self._make = str(folder), SummaryWriter
        self._writer: Any = None

    def open(self, run: Run) -> None:
        """Open the event file."""
        self._writer = self._make(self.folder, purge_step=run.log.steps + 1 if run.log.steps else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, error: BaseException | None) -> None:
        """Write what is buffered and close the file."""
        self._writer.close()
