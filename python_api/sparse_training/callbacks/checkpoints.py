"""The best model, and the last checkpoints of a run."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparse_training import files
from sparse_training.arguments import check_integer
from sparse_training.callbacks.monitor import Monitor
from sparse_training.errors import UserError
from sparse_training.training.callbacks import Callback, Run
from sparse_training.training.distributed import is_sharded


class BestModel(Callback):
    """Keeps the weights of the best evaluation in a file that ``torch.load`` reads.

    Give ``fit`` a validation split to evaluate on: the test accuracy of a model that was chosen by the test set is too
    high. Where weights are averaged, the average is what is kept.

    Example:
        >>> best = BestModel("best.pt", "accuracy")
        >>> trainer.fit(loader, epochs=10, evaluate=validation, callbacks=[best])
        >>> model.load_state_dict(torch.load("best.pt"))

    Args:
        path: file of the model's ``state_dict()``, replaced whenever an evaluation is better. Its folder must exist
            when the run begins.
        monitor: number of the evaluation to go by, such as "loss" or "accuracy". Default "loss".
        mode: "min" or "max", where the name does not tell. Default: "min" for losses and errors, "max" for
            accuracies and scores.
        restore: True to give the model these weights at the end of the run. Checkpoints hold the run's last weights
            all the same. Default False.

    Attributes:
        best: best value so far; None before the first evaluation.
        step: its step.

    Raises:
        UserError: a direction that is unknown.
    """

    passive = True

    def __init__(
        self, path: str | Path, monitor: str = "loss", *, mode: str | None = None, restore: bool = False
    ) -> None:
        self.path, self.restore = Path(path), restore
        self.monitor = Monitor(monitor, mode, 0.0, owner="BestModel")

    @property
    def best(self) -> float | None:
        """Best value so far; None before the first evaluation."""
        return self.monitor.best

    @property
    def step(self) -> int:
        """Step of the best value."""
        return self.monitor.step

    def on_fit_start(self, run: Run) -> None:
        """Refuse what cannot be kept."""
        self.monitor.check(run)
        if is_sharded(run.trainer.model):
            raise UserError("BestModel cannot keep a model that FSDP shards; save it by torch.distributed.checkpoint")
        if not self.path.parent.is_dir() or self.path.is_dir():
            raise UserError(f"BestModel(`path`) must be a file in a folder that exists, got {self.path}")
        if run.log.steps == 0:
            self.monitor.best = None

    def on_evaluation_end(self, run: Run) -> None:
        """Write the weights, if they are the best."""
        if self.monitor.improved(run) and run.first:
            files.write_torch(self.path, run.trainer.update.evaluated.state_dict())

    def on_fit_end(self, run: Run) -> None:
        """Give the model the best weights, where that was asked for."""
        if self.restore and not run.log.interrupted and self.best is not None:
            weights = torch.load(self.path, map_location="cpu", weights_only=True)
            run.trainer.update.evaluated.load_state_dict(weights)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and its step."""
        return self.monitor.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self.monitor.load_state_dict(state)


class KeepLast(Callback):
    """Keeps the last checkpoints of a run beside the newest, as ``checkpoint-<step>.pt``.

    Needs ``fit(checkpoint=, checkpoint_interval=)``. To go on from one of them, give it the name ``checkpoint.pt`` in
    a folder of its own.

    Args:
        count: number of checkpoints to keep, the newest among them, at least 1.

    Raises:
        UserError: a count out of range.
    """

    passive = True

    def __init__(self, count: int) -> None:
        self.count = check_integer("count", count, 1)

    def on_fit_start(self, run: Run) -> None:
        """Refuse a run without checkpoints."""
        if run.checkpoint is None:
            raise UserError("KeepLast needs checkpoints: give `checkpoint` to fit")

    def on_checkpoint_saved(self, run: Run) -> None:
        """Keep the checkpoint under its step's name, and remove the oldest."""
        assert run.checkpoint is not None
        if not run.first:
            return
        path = run.checkpoint
        kept = path.with_name(f"{path.stem}-{run.log.steps}{path.suffix}")
        kept.unlink(missing_ok=True)
        try:
            os.link(path, kept)  # checkpoints are replaced, never written into
        except OSError:
            shutil.copyfile(path, kept)
        steps = {}
        for other in path.parent.glob(f"{path.stem}-*{path.suffix}"):
            with contextlib.suppress(ValueError):
                steps[int(other.stem.removeprefix(f"{path.stem}-"))] = other
        for step in sorted(steps)[: -self.count]:
            steps[step].unlink()
