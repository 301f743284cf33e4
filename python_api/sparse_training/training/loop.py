"""The loop of a run: steps until the budget is spent, with evaluation, checkpoints and callbacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from sparse_training import devices
from sparse_training.announcements import announce
from sparse_training.arguments import check_positive
from sparse_training.data.loader import Loader
from sparse_training.errors import UserError
from sparse_training.evaluation import evaluation_statistics
from sparse_training.selection.policies.base import Policy
from sparse_training.selection.types import Batch, SelectedBatch
from sparse_training.training.callbacks import Evaluation, Run
from sparse_training.training.log import Status, TrainingLog
from sparse_training.training.schedule import Schedule
from sparse_training.training.state import RunState
from sparse_training.user_code import explained, name_of

TRACE_POINTS = 500


class RunLength(NamedTuple):
    """Length of a run.

    Attributes:
        kind: "steps", "rows" or "seconds".
        amount: number of them, above 0.
    """

    kind: str
    amount: float

    @classmethod
    def of(cls, loader: Loader, **budgets: float | None) -> RunLength:
        """Make the length from the one budget that is not None.

        Args:
            loader: the training data, whose number of batches turns epochs into steps.
            **budgets: budgets by name: epochs, steps, rows and seconds, each a number or None.

        Returns:
            The length, in "steps", "rows" or "seconds".

        Raises:
            UserError: no budget or several, one that is not above 0, or epochs of data of unknown length.
        """
        named = {name: amount for name, amount in budgets.items() if amount is not None}
        if len(named) != 1:
            raise UserError(f"give exactly one of {', '.join(budgets)}, got {' and '.join(named) or 'none'}")
        ((kind, amount),) = named.items()
        check_positive(kind, amount)
        if kind in ("steps", "rows") and not float(amount).is_integer():
            raise UserError(f"`{kind}` must be a whole number, got {amount}")
        if kind != "epochs":
            return cls(kind, amount)
        batches = loader.batches()
        if batches is None:
            raise UserError("`epochs` needs training data with a length; use steps= or seconds=")
        return cls("steps", max(1, round(amount * batches)))


class TrainingLoop:
    """Takes steps until a run's length is reached, or a callback ends it.

    Args:
        state: the run's parts, which its checkpoint holds.
        length: when the run ends.
        schedule: phases and learning rate by progress.
        evaluate: data to evaluate on, or a function of the model; None for no evaluation.
        evaluations: number of evaluations in a run, evenly spaced, the last one at its end.
        stop: asked after every step; once it returns true, the run saves its checkpoint and returns. None for never.
        checkpoint_interval: number of steps between checkpoints; None for one at the end alone.
    """

    def __init__(
        self,
        state: RunState,
        length: RunLength,
        schedule: Schedule,
        *,
        evaluate: Evaluation | None,
        evaluations: int,
        stop: Callable[[], bool] | None,
        checkpoint_interval: int | None,
    ) -> None:
        self.state, self.trainer, self.log = state, state.trainer, state.log
        self.clock, self.energy, self.callbacks = state.clock, state.energy, state.callbacks
        self.length, self.schedule, self.stop = length, schedule, stop
        self.evaluate, self.evaluations = evaluate, evaluations
        self.rate_control, self.checkpoint_interval = state.rate_control, checkpoint_interval
        self.notes = self._extend()
        self.seen = Run(
            trainer=self.trainer,
            log=self.log,
            status=self._status(self._progress(), self.trainer.policy),
            settings=state.settings,
            steps=round(length.amount - state.extra_steps) if length.kind == "steps" else None,
            checkpoint=state.path,
            evaluates=evaluate is not None,
            first=self.trainer.ranks.rank == 0,
        )

    def run(self) -> TrainingLog:
        """Train until the run's length is reached, a callback ends the run, or a stop is requested.

        Returns:
            The log, its counts over all ranks.
        """
        try:
            self.callbacks.call("on_fit_start", self.seen)
            self._train()
            log = self._finish()
            self.trainer.modes.set(training=False)  # before a callback gives the model other weights
            self.callbacks.call("on_fit_end", self.seen)
        except BaseException as error:
            self.callbacks.call_all("on_exception", self.seen, error)
            raise
        return log

    def _train(self) -> None:
        items = _endless(self.state.loader)
        self.state.check_savable()
        self._start()
        progress, first = self._progress(), True
        while progress < 1.0 and not self._ended():
            progress = self._step(items, progress)
            if first:  # the optimizer has a state now
                self.state.check_savable()
                first = False
            if progress < 1.0 and self._stop_requested():
                self.log.interrupted = True
                break
            interval = self.checkpoint_interval
            if interval and self.log.steps % interval == 0 and progress < 1.0:
                self._pause()
                self._save()
                self._start()
        self._pause()
        if self.seen.stopped is not None and not self.log.interrupted:
            self.log.stopped = self.seen.stopped
            if self.evaluate is not None and self._evaluated_at() != self.log.steps:
                self.trainer.update.step()
                self._evaluate()

    def _step(self, items: Iterator[Any], before: float) -> float:
        """Take one step and call what is due after it; return the progress."""
        trainer, log, clock = self.trainer, self.log, self.clock
        phase = self.schedule.phase(before) if trainer.policy.phased else "sparse"
        trainer.set_learning_rate(self.schedule.factor(before))
        policy = trainer.policy if phase == "sparse" else trainer.dense
        policy.set_progress(before)
        policy.watched = phase == "sparse" and before * TRACE_POINTS >= len(log.trace)
        control = self.rate_control if phase == "sparse" else None
        if control is not None:
            control.before(policy, self._spent())
        loader = self.state.loader
        loader.draw_by(policy.choose)
        batch, kept = trainer.step(policy, loader, next(items))
        clock.charge(policy.name, batch.rows, kept.targets.shape[0], batch.offered, observer=trainer.policy.name)
        if control is not None:
            control.after(self._spent())
        self._count(phase, batch, kept)
        for sentence in trainer.policy.take_news():
            if sentence not in log.notes:  # as after a checkpoint
                log.notes.append(sentence)
                if self.seen.first:
                    announce(sentence)
        progress = self._progress()
        if progress >= 1.0:
            trainer.update.step()  # an incomplete accumulation still counts
        devices.end_step(trainer.device)
        if policy.watched and (point := policy.trace()) is not None:
            log.trace.append((log.steps, *point))
        self.seen.status = self._status(progress, policy, phase)
        due = int(min(progress, 1.0) * self.evaluations) > int(before * self.evaluations)
        if self.evaluate is not None and (due or progress >= 1.0):
            self._pause()
            self._evaluate()
            self._start()
        self.callbacks.call("on_step_end", self.seen)
        return progress

    def _status(self, progress: float, policy: Policy, phase: str | None = None) -> Status:
        return Status(
            progress=progress,
            phase=phase or self.schedule.phase(progress),
            step=self.log.steps,
            seconds=self.clock.seconds,
            evaluation=self.log.evals[-1] if self.log.evals else None,
            policy=policy,
            loss=self.trainer.update.loss,
            epoch=self.state.loader.epoch,
            notes=tuple(self.log.notes),
        )

    def _extend(self) -> list[str]:
        """Prepare to go on beyond the budget of the checkpoint's run; say where that is not one longer run."""
        former, trainer = self.state.former_amount, self.trainer
        if former is None:
            return []
        self.log.trace = self.log.trace[:: math.ceil(self.length.amount / former)]
        done, phased = self._progress(), trainer.policy.phased and trainer.policy.name != trainer.dense.name
        differs = self.schedule.differs(done * self.length.amount / former, done, phased=phased)
        cut = self.log.steps % trainer.update.accumulate  # the shorter run's last optimizer step had fewer batches
        if not (differs or cut or type(trainer.policy).set_progress is not Policy.set_progress):
            return []
        return [
            f"the run was extended from {former:g} to {self.length.amount:g} {self.length.kind}: its beginning "
            "followed the schedule of the shorter run, so the whole differs from a run of this length"
        ]

    def _progress(self) -> float:
        """Return the part of the run that is done, from 0; equal on all ranks."""
        kind, amount = self.length
        ranks = self.trainer.ranks
        if kind == "rows":
            return ranks.total(int(self.log.rows_seen)) / amount
        if kind == "seconds":
            return ranks.first(self.clock.seconds) / amount
        return (self.log.steps + self.state.extra_steps) / amount

    def _spent(self) -> float:
        """Return the cost of the run so far, in the rate control's unit."""
        in_seconds = self.rate_control is not None and self.rate_control.unit == "seconds"
        return self.clock.seconds if in_seconds else sum(self.trainer.operations.total.values())

    def _stop_requested(self) -> bool:
        return self.stop is not None and self.trainer.ranks.total(bool(self.stop())) > 0

    def _ended(self) -> bool:
        """Tell whether a callback ended the run, on any rank."""
        if not self.callbacks.deciding:
            return False
        ended = self.trainer.ranks.total(self.seen.stopped is not None) > 0
        if ended:
            self.seen.stop("a callback of another process ended it")
        return ended

    def _start(self) -> None:
        self.energy.start()
        self.clock.start()

    def _pause(self) -> None:
        self.clock.stop(self.trainer.device)
        self.energy.stop()

    def _evaluate(self) -> None:
        with self.trainer.modes.during(training=False):
            self._evaluate_and_tell()

    def _evaluate_and_tell(self) -> None:
        evaluate, trainer = self.evaluate, self.trainer
        if callable(evaluate) and not isinstance(evaluate, Loader):
            model = trainer.update.evaluated
            said = f"`evaluate`, {name_of(evaluate)}, must return numbers by name"
            with evaluation_statistics(model), explained(lambda: said):
                numbers = {name: float(value) for name, value in evaluate(model).items()}
        else:
            assert evaluate is not None
            numbers = trainer.evaluate(evaluate)
        if "loss" in numbers:
            trainer.policy.observe_validation(numbers["loss"])
        self.log.evals.append({"seconds": self.clock.seconds, "step": self.log.steps, **numbers})
        self.seen.status = replace(self.seen.status, evaluation=self.log.evals[-1])
        self.callbacks.call("on_evaluation_end", self.seen)

    def _evaluated_at(self) -> float | None:
        """Return the step of the latest evaluation."""
        return self.log.evals[-1]["step"] if self.log.evals else None

    def _save(self) -> None:
        self.state.save()
        if self.state.path is not None:
            self.callbacks.call("on_checkpoint_saved", self.seen)

    def _count(self, phase: str, batch: Batch, kept: SelectedBatch) -> None:
        """Add a step's rows to the log; waits for no device."""
        log, policy = self.log, self.trainer.policy
        log.steps += 1
        log.phases[phase] += 1
        offered = batch.offered if batch.counted is None else batch.counted
        log.rows_seen += offered
        log.rows_trained += kept.rows
        log.invalid += self.trainer.update.take_invalid()
        if phase != "sparse" or policy.name == self.trainer.dense.name:
            return
        log.offered += offered
        log.kept += kept.rows
        size = self.state.loader.size
        if batch.ids is None or size is None:
            return
        zeros = torch.zeros(size if log.selected is None else 0, dtype=torch.int32, device=self.trainer.device)
        one = torch.ones_like(batch.ids, dtype=torch.int32)
        if kept.positions is None:
            if policy.before_loading:
                log.selected = zeros if log.selected is None else log.selected
                log.selected.index_add_(0, batch.ids, one)
            return
        if log.selected is None or log.seen is None:
            log.selected, log.seen = zeros, zeros.clone()
        log.seen.index_add_(0, batch.ids, one)
        valid = one[: len(kept.positions)] if kept.weight is None else (kept.weight > 0).int()
        log.selected.index_add_(0, batch.ids[kept.positions], valid)

    def _finish(self) -> TrainingLog:
        log, trainer, energy = self.log, self.trainer, self.energy
        log.seconds, log.raw_seconds = self.clock.seconds, self.clock.raw_seconds
        log.joules, log.meter, log.operations = energy.joules, energy.source, trainer.operations.total
        self._save()
        if not trainer.ranks.alone:
            log.merge_ranks(trainer.ranks.all(log), divided=self.state.loader.divided)
        if not log.interrupted:
            invalid = int(log.invalid)
            several = "batches" if invalid > 1 else "batch"
            lost = [f"{invalid} {several} of {log.steps} had a loss that is not finite and were not learned from"]
            log.warnings = [*self.notes, *trainer.policy.warnings(log.rate)]
            if self.rate_control is not None:
                log.warnings += self.rate_control.warnings()
            log.warnings += lost if invalid else []
            if int(log.rows_seen) == 0:
                log.warnings.append("no row was trained on: every batch was empty, or every target was one to ignore")
        return log


def _endless(loader: Loader) -> Iterator[Any]:
    while True:
        yield from loader
