"""State of a run: saved in a checkpoint, restored to continue the run bit for bit."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_training.data.loader import Loader
from sparse_training.errors import UserError, one_line
from sparse_training.files import make_folder
from sparse_training.generators import rng_state, set_rng_state
from sparse_training.training.callbacks import Callbacks, EnergyRecord, RateControl
from sparse_training.training.checkpoint import (
    check_readable,
    locked,
    previous_of,
    read_checkpoint,
    save_checkpoint,
)
from sparse_training.training.clock import Clock
from sparse_training.training.distributed import Ranks, is_sharded
from sparse_training.training.log import TrainingLog
from sparse_training.training.resharding import check_complete, reshard
from sparse_training.training.run_settings import compare_models, compare_settings, former_amount, renamed
from sparse_training.training.step import TrainingStep
from sparse_training.user_code import explained

CHECKPOINT = "checkpoint.pt"
SHARED = ("model", "update", "clock", "energy", "others")
OWN = ("settings", "policy", "loader", "operations", "spending", "history", "rng", "buffers")


class RunState:
    """Parts of a run that a checkpoint holds.

    Args:
        trainer: the model with its policy and optimizer.
        loader: the training data.
        settings: values, by name, that must agree for a run to be the continuation of another.
        clock: the run's clock.
        energy: the run's energy.
        folder: folder of ``checkpoint.pt``; None for no checkpoints.
        callbacks: the run's callbacks.

    Attributes:
        log: counts of the run, from 0.
        former_amount: budget of the checkpoint's run, where this run goes beyond it; None where they are equal.
        rate_control: sets the rate of the sparse steps; None for the policy's own rate.
        extra_steps: steps that the run amounts to beyond those in the log, whose first ones may have been of another
            number of processes.
        path: path of the checkpoint; None for no checkpoints.
    """

    def __init__(
        self,
        trainer: TrainingStep,
        loader: Loader,
        *,
        settings: dict[str, Any],
        clock: Clock,
        energy: EnergyRecord,
        folder: str | Path | None,
        callbacks: Callbacks,
    ) -> None:
        if folder is not None and is_sharded(trainer.model):
            raise UserError(
                "`checkpoint` cannot be written of a model that FSDP shards; save it by torch.distributed.checkpoint"
            )
        if folder is not None:
            loader.check_resumable()
        self.trainer, self.loader, self.settings, self.callbacks = trainer, loader, settings, callbacks
        self.log, self.clock, self.energy = TrainingLog(), clock, energy
        self.rate_control: RateControl | None = None
        self.former_amount: float | None = None
        self.extra_steps = 0.0
        self.path = None if folder is None else Path(folder) / CHECKPOINT

    def save(self) -> None:
        """Write the checkpoint, if there is a folder; all ranks call it, and the first one writes."""
        if self.path is None:
            return
        ranks = self.trainer.ranks
        own = ranks.all(self._own())
        if ranks.rank == 0:
            save_checkpoint(self.path, {**self._shared(), **own[0], "others": own[1:]})

    def restore(self) -> Mapping[str, Any]:
        """Read the checkpoint and restore its state, except the rate control's.

        Returns:
            This rank's part of the checkpoint; its "spending" is the rate control's state.

        Raises:
            UserError: a damaged file, or a run with other settings.
        """
        assert self.path is not None
        trainer = self.trainer
        state, digest = read_checkpoint(self.path, trainer.device)
        trainer.ranks.agree({"the digest of the checkpoint": digest[:16]})
        of_ranks = self._of_ranks(state)
        own, saved = self._own_part(state, of_ranks)
        self.former_amount = former_amount(saved, self.settings)
        compare_models(state["model"], trainer.model.state_dict())  # first: other settings follow from another model
        compare_settings(
            saved if self.former_amount is None else {**saved, "budget": self.settings["budget"]}, self.settings
        )
        resharded = len(of_ranks) != trainer.ranks.size
        if resharded:  # first, because it may refuse
            self.loader.load_rank_states(own["loader"]["of ranks"], own["loader"]["batches"])
        self._restore("update", trainer.update, state)
        if (gradients := own.get("gradients")) is not None:
            trainer.update.load_gradients(gradients)
        trainer.model.load_state_dict(state["model"])
        self._restore("clock", self.clock, state)
        for buffer, value in zip(self._buffers() if own["buffers"] else (), own["buffers"], strict=True):
            buffer.copy_(value)
        self._restore("policy", trainer.policy, own)
        if (loss := self._stateful_loss()) is not None and own.get("loss") is not None:  # absent before version 0.2
            self._restore("loss", loss, own)
        if not resharded:
            self._restore("loader", self.loader, own)
        self._restore("energy", self.energy, state)
        self._restore("operations", trainer.operations, own)
        vars(self.log).update(own["history"], interrupted=False, stopped=None)
        self._restore("callbacks", self.callbacks, {"callbacks": {}, **state})
        set_rng_state(own["rng"], trainer.device)
        return own

    def _own_part(
        self, state: Mapping[str, Any], of_ranks: Sequence[Mapping[str, Any]]
    ) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Return this rank's part of the checkpoint, and the settings that it was made with."""
        ranks, self.extra_steps = self.trainer.ranks, float(state.get("extra_steps", 0.0))
        if len(of_ranks) == ranks.size:
            return of_ranks[ranks.rank], renamed(of_ranks[ranks.rank]["settings"])
        check_complete(state["update"], len(of_ranks))
        parts = [{**part, "settings": renamed(part["settings"])} for part in of_ranks]
        resumed = reshard(
            parts, trainer=self.trainer, loader=self.loader, settings=self.settings, extra_steps=self.extra_steps
        )
        self.extra_steps = resumed.extra_steps
        return resumed.own, resumed.settings

    def _of_ranks(self, state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Return the part of the checkpoint that each rank wrote, if it is that of a run."""
        of_ranks = [state, *state["others"]] if isinstance(state.get("others"), list) else [state]
        for part, names in ((state, SHARED), *((own, OWN) for own in of_ranks)):
            if missing := [name for name in names if not isinstance(part, Mapping) or name not in part]:
                raise UserError(f"{self.path} is no checkpoint of a training run: it has no {', '.join(missing)}")
        return of_ranks

    def _restore(self, name: str, target: Any, state: Mapping[str, Any]) -> None:
        """Restore one part of the run from the checkpoint."""
        try:
            target.load_state_dict(state[name])
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{self.path} does not fit this run: its {name} says {one_line(error)}") from error

    def _shared(self) -> dict[str, Any]:
        """Return the state that is equal on all ranks, or that all take from the first."""
        return {
            "model": self.trainer.model.state_dict(),
            "update": self.trainer.update.state_dict(),
            "clock": self.clock.state_dict(),
            "energy": self.energy.state_dict(),
            "callbacks": self.callbacks.state_dict(),
            "extra_steps": self.extra_steps,
        }

    def _own(self) -> dict[str, Any]:
        """Return the state of this rank."""
        trainer = self.trainer
        return {
            "settings": self.settings,
            "policy": trainer.policy.state_dict(),
            "loader": self.loader.state_dict(),
            "operations": trainer.operations.state_dict(),
            "spending": None if self.rate_control is None else self.rate_control.state_dict(),
            "history": self.log.state_dict(),
            "rng": rng_state(trainer.device),
            "gradients": None if trainer.ranks.rank == 0 else trainer.update.own_gradients(),
            "loss": None if (loss := self._stateful_loss()) is None else loss.state_dict(),
            "buffers": [] if trainer.ranks.rank == 0 else [buffer.detach() for buffer in self._buffers()],
        }

    def _stateful_loss(self) -> nn.Module | None:
        """Return the loss, if it is a module that is no part of the model; what it counts is over each rank's rows."""
        loss = self.trainer.criterion.loss
        inside = any(module is loss for module in self.trainer.model.modules())
        return loss if isinstance(loss, nn.Module) and not inside else None

    def check_savable(self) -> None:
        """Refuse a state that no checkpoint could be read with again; nothing is written.

        Raises:
            UserError: a part of it holds other objects than tensors and plain containers.
        """
        if self.path is not None:
            with explained(lambda: "`checkpoint` cannot be written"):
                parts = {**self._shared(), **self._own()}
                parts |= parts.pop("update")
            for name, part in parts.items():
                check_readable(part, name)

    def _buffers(self) -> list[Tensor]:
        """Return the buffers of the model and its average: running statistics are over each rank's own rows."""
        ema = self.trainer.update.ema
        models: list[torch.nn.Module] = [self.trainer.model] if ema is None else [self.trainer.model, ema]
        return [buffer for model in models for buffer in model.buffers()]


class CheckpointFolder:
    """The folder of a run's checkpoints, held while the run lasts so that no other run writes to it.

    The first rank holds it for all; where it cannot, all of them raise.

    Args:
        folder: the folder, made by ``make`` if it is not there; None for no checkpoints.
        ranks: the processes of the run.
        resume: True to allow a checkpoint in the folder.

    Attributes:
        resumes: True where the folder holds a checkpoint, or the one before it.

    Raises:
        UserError: a checkpoint without ``resume``, or a folder in use.
    """

    def __init__(self, folder: str | Path | None, ranks: Ranks, *, resume: bool) -> None:
        if not isinstance(folder, str | os.PathLike | None):
            raise UserError(f"`checkpoint` must be the path of a folder, or None, got {folder!r:.60}")
        self.path = None if folder is None else Path(folder)
        self.ranks, self.resume, self.resumes = ranks, resume, False
        self._lock = ExitStack()
        self._held = False
        self._made: list[Path] = []  # folders, the innermost first

    def __enter__(self) -> CheckpointFolder:
        if self.path is not None:
            self.resumes = self._enter()
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()
        for folder in self._made:  # of a run that was refused in its first step
            with contextlib.suppress(OSError, ValueError):  # not empty, or no name of a folder
                folder.rmdir()

    def make(self) -> None:
        """Make the folder, if it was not there before."""
        if self.path is not None:
            with contextlib.suppress(OSError, ValueError):  # which ``make_folder`` explains
                self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            make_folder(self.path, CHECKPOINT)
            if self._enter() and not self.resumes:  # another run began after this one
                raise UserError(f"{self.path / CHECKPOINT} has just been written by another run")

    def _enter(self) -> bool:
        """Hold the folder, if it is there; tell whether it has a checkpoint. All ranks raise the same."""
        assert self.path is not None
        refusal, path = "", self.path / CHECKPOINT
        exists = False
        try:
            exists = path.exists() or previous_of(path).exists()
            if self.ranks.rank == 0 and not self._held and self.path.is_dir():
                self._lock.enter_context(locked(self.path))
                self._held = True
        except UserError as error:
            refusal = str(error)
        except (OSError, ValueError) as error:  # a name that is too long, a loop of links, a NUL character
            refusal = f"{self.path} cannot be a folder of checkpoints: {getattr(error, 'strerror', None) or error}"
        seen = self.ranks.all((refusal, exists))
        refusal, found = seen[0]
        blind = [rank for rank, (_, sees) in enumerate(seen) if sees != found]
        if not refusal and blind:
            there, absent = (0, blind[0]) if found else (blind[0], 0)
            refusal = f"rank {there} sees {path} and rank {absent} does not; give all of them one folder"
        if not refusal and found and not self.resume:
            refusal = f"{path} exists already; resume it, or choose another folder"
        if refusal:
            self._lock.close()
            raise UserError(refusal)
        return bool(found)
