"""Trainer of any module on the rows that a policy selects, for a given budget."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from sparse_training.announcements import announce
from sparse_training.arguments import check_integer
from sparse_training.callbacks.display import usual_callbacks
from sparse_training.criterion import Criterion, Loss
from sparse_training.data.loader import Loader
from sparse_training.data.numbered import NumberedLoader
from sparse_training.data.row_numbers import unnumbered_reason
from sparse_training.data.stream import StreamLoader
from sparse_training.errors import UserError
from sparse_training.gate.gate import Gate
from sparse_training.gate.significance import Significance
from sparse_training.profiling.budget_controller import BudgetController
from sparse_training.profiling.calibration import Stopped, calibrate
from sparse_training.profiling.energy import Energy, Meter, find_meter
from sparse_training.rank_failures import together
from sparse_training.selection.policies.base import Policy
from sparse_training.selection.policies.gate import GatePolicy
from sparse_training.selection.policies.infobatch import InfoBatchPolicy
from sparse_training.selection.registry import DEFAULT_POLICY, check_rate_is_used, make_policy
from sparse_training.selection.scorers.base import Scorer
from sparse_training.training.callbacks import Callback, Callbacks, Evaluation
from sparse_training.training.checks import check_run, check_trains, left_out
from sparse_training.training.clock import Clock
from sparse_training.training.distributed import Ranks
from sparse_training.training.flops import Operations
from sparse_training.training.log import Status, TrainingLog
from sparse_training.training.loop import RunLength, TrainingLoop
from sparse_training.training.modes import recorded_gradients, training_mode
from sparse_training.training.run_settings import agree_on_run, made_with, run_settings
from sparse_training.training.schedule import LR_WARMUP, Schedule
from sparse_training.training.settings import TrainerSettings
from sparse_training.training.state import CheckpointFolder, RunState
from sparse_training.training.step import OptimizerFactory, TrainingStep


class SparseTrainer(TrainingStep):
    """Trains a model on the rows that a policy selects; a row is a sample, or a token or pixel of one.

    Where torch.distributed is initialised (``torchrun``), its processes train one model: each on its part of the
    data, with the gradient of all their rows together. BatchNorm alone uses one process's rows. A process whose rows
    are all left out still takes part in the step.

    Example:
        >>> trainer = SparseTrainer(model, policy="infobatch")
        >>> log = trainer.fit(loader, epochs=10, evaluate=test_loader)
        >>> trainer.evaluate(test_loader)
        {'accuracy': 0.91, 'loss': 0.28}

    Args:
        model: any module. A tuple or list of inputs is unpacked into it, a mapping is passed by keyword. With several
            processes it is wrapped in DistributedDataParallel, unless it is already or ``fully_shard`` was applied to
            it; evaluation and checkpoints are of the model itself. A sharded one has no checkpoints here and no
            average of weights.
        loss: maps (logits, targets) to one loss per row, such as ``nn.CrossEntropyLoss(reduction="none")``; or a
            ``Criterion``, which says more: what targets mean, and which of them do not count. A module's own state is
            saved, and is in evaluation mode but for the losses that are trained on. Integer targets are
            taken for classes where the loss is PyTorch's own for classes, or a ``Criterion`` says so. Default:
            cross-entropy.
        granularity: "sample": the policy selects samples, by the mean over a sample's tokens or pixels where it has
            several; rows left out are in neither the forward nor the backward of the step. "token": it selects tokens
            or pixels of the training forward's own logits, by one threshold for all samples; the loss and its
            gradient are computed for those alone, the rest of the model runs as in a dense step, and times are raw
            seconds. Default: the criterion's, "sample".
        optimizer: an optimizer, or a factory called with (parameters, lr=lr). One with ``train()`` and ``eval()``, as
            schedule-free ones have, is in training mode in steps alone. Default: AdamW.
        lr: learning rate of an optimizer made here, above 0; None for a ``functools.partial``'s own, or 1e-3. Refused
            beside an optimizer that is made. Default None.
        schedule: learning rate by progress through the budget: "cosine", "constant", or a callable that maps progress
            in [0, 1] to a factor of ``lr``. Or a scheduler of ``torch.optim.lr_scheduler`` over ``optimizer``, which
            is stepped after every optimizer step and saved in checkpoints. With "constant" and ``lr_warmup=0`` a
            callback may set the rate; beside others that is refused. Default "cosine".
        lr_warmup: fraction of the run over which the learning rate rises to ``schedule``'s, in [0, 1]; a callable or a
            scheduler rises by itself. Default 0.02.
        dense_start: fraction of the run that trains on every row at the start. Default 0.05.
        dense_end: fraction of the run that trains on every row at the end. Default 0.125.
        policy: a name in ``POLICIES``, a ``Policy``, or a ``Gate``; "gate@early:3" names a policy and its scorer, and
            "adaptive+denoise" a policy and its switch. A gate scores targets that are not class indices by the loss
            itself. Default: "infobatch", whose expected gradient is that of all rows. It goes by each row's last loss,
            or by the losses of the batch where a scorer is given and for granularity "token". Data whose rows have no
            numbers, such as an iterable of batches, are then trained on whole, with a warning; by its name it refuses
            them.
        scorer: source of the scores that the policy selects by: "self", "self:SCALE", "early:LAYER", "proxy",
            "proxy:MODEL", "reference:FILE", "history", or a ``Scorer``. Default: the policy's own, the model itself
            for a gate.
        significance: a ``Significance``, or the name of one, such as "vision", for ``policy="gate"`` alone. Default:
            the gate's own.
        rate: fraction of rows to keep in the sparse phase, in (0, 1], for a policy that is named and has one. Default
            0.1.
        seed: seed of the policy's own generators, mixed with the process's rank; global generators are left to the
            caller. Default 0.
        device: PyTorch device to train on, such as "cuda:0". Default: the model's.
        settings: precision, accumulation and other settings of the step. Default: ``TrainerSettings()``.

    Raises:
        UserError: an argument out of range or without effect, or a loss that reduces over rows.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Loss | Criterion | None = None,
        granularity: str | None = None,
        optimizer: OptimizerFactory | torch.optim.Optimizer | None = None,
        lr: float | None = None,
        schedule: str | Callable[[float], float] | LRScheduler = "cosine",
        lr_warmup: float = LR_WARMUP,
        dense_start: float = 0.05,
        dense_end: float = 0.125,
        policy: str | Policy | Gate | None = None,
        scorer: str | Scorer | None = None,
        significance: Significance | str | None = None,
        rate: float | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        settings: TrainerSettings | None = None,
    ) -> None:
        ranks = Ranks()
        with together(ranks.all):
            if not isinstance(loss, Criterion):
                loss = Criterion(loss, granularity=granularity or "sample")
            elif granularity not in (None, loss.granularity):
                raise UserError(
                    f"`granularity` is {granularity!r} and the criterion's is {loss.granularity!r}; give one"
                )
            if settings is not None and not isinstance(settings, TrainerSettings):
                raise UserError(f"`settings` must be TrainerSettings, got {type(settings).__name__}")
            self._by_default = policy is None
            policy = DEFAULT_POLICY if policy is None else policy
            check_rate_is_used(policy, rate)
            options = None if significance is None else {"significance": significance}
            self.schedule = Schedule(dense_start, dense_end, schedule, lr_warmup)
            self.seed = check_integer("seed", seed)
            super().__init__(
                model,
                criterion=loss,
                policy=make_policy(policy, rate=rate, seed=self.seed, loss=loss, scorer=scorer, options=options),
                optimizer=optimizer,
                lr=lr,
                settings=settings or TrainerSettings(),
                device=device,
                ranks=ranks,
            )
            self._set_scheduler(self.schedule.scheduler)
            self._made_with = made_with(self, self.schedule)

    def fit(
        self,
        train: Iterable[Any],
        *,
        epochs: float | None = None,
        steps: int | None = None,
        rows: int | None = None,
        seconds: float | None = None,
        evaluate: Evaluation | None = None,
        evaluations: int = 20,
        clock: Clock | None = None,
        cost_budget: tuple[float, str] | None = None,
        meter: Meter | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_interval: int | None = None,
        resume: bool = False,
        callbacks: Sequence[Callback] = (),
        progress: bool | Callable[[Status], None] = True,
        stop: Callable[[], bool] | None = None,
    ) -> TrainingLog:
        """Train for a budget. Give exactly one of ``epochs``, ``steps``, ``rows`` and ``seconds``.

        Args:
            train: a ResidentLoader, a DataLoader, or any iterable of batches. Of a map-style DataLoader a policy that
                goes by past losses reads the rows alone that it chooses: in the order of the DataLoader's own sampler,
                by its own workers and collate function. With several processes each has its part, in as many batches
                as the others: a ResidentLoader splits the data itself, a DataLoader needs a DistributedSampler.
            epochs: number of passes over the data, which must have a length; above 0.
            steps: number of batches, above 0.
            rows: number of rows in the batches, trained on or not, over all processes; above 0.
            seconds: seconds of the clock, above 0. With several processes the first one's clock counts.
            evaluate: data to evaluate on, or a function of the model that returns named numbers. The clock stands
                still meanwhile. Default: no evaluation.
            evaluations: number of evaluations, evenly spaced, the last one at the end. Default 20.
            clock: the run's clock. Default: one calibrated here where seconds count, on one process; else raw seconds,
                as for rows that a DataLoader reads by number, which is said.
            cost_budget: cost of the whole run and its unit: (2e15, "flops") or (60.0, "seconds") of the clock; the
                rate of the sparse phase follows what is left. Needs ``steps`` or ``epochs``, and one process.
                Default: no such budget, and a fixed rate.
            meter: energy meter; evaluation is not measured. Default: the counters that can be read here, on one
                process.
            checkpoint: folder of ``checkpoint.pt``, written when stopped and at the end. With several processes the
                first one writes it, and all read it. Default: no checkpoints.
            checkpoint_interval: number of steps between further checkpoints. Default: no further ones.
            resume: True to continue the folder's checkpoint bit for bit, and to start a new run if there is none. A
                larger budget of the same kind extends the checkpoint's run; the log warns where the result differs
                from a run of that length. Default False.
            callbacks: followers of the run, such as ``EarlyStopping``; see ``sparse_training.callbacks``. Default:
                none but those that write messages and progress.
            progress: True for a progress line where standard error is a terminal or a notebook, False for none; or a
                function, called after every step with the run's ``Status``. Default True.
            stop: called after every step, and while the clock is calibrated; once it returns true, on any process, the
                run writes its checkpoint and returns. Default: not called.

        Returns:
            The run's log, its counts over all processes.

        Raises:
            UserError: no budget or several, a checkpoint in the folder without ``resume``, a folder that another run
                is using, a checkpoint made with other settings, or a batch or loss of the wrong shape. With several
                processes also ``rank_failures.SharedError``: they were given different things, or another one failed.
        """
        with together(self.ranks.all):  # not a decorator, whose frame warnings would name in place of the caller's
            check_run(
                evaluations=evaluations, checkpoint=checkpoint, checkpoint_interval=checkpoint_interval, resume=resume,
                stop=stop, callbacks=callbacks, cost_budget=cost_budget, meter=meter,
            )  # fmt: skip
            check_trains(self.model, self.optimizer, self.criterion)
            outside = left_out(self.model, self.optimizer)
            if self.update.scheduler is None:
                self.rates.begin()
            followers = Callbacks([*usual_callbacks(progress), *callbacks])
            if evaluate is not None and not callable(evaluate):
                self.loader(evaluate)  # refuses what is no data
            loader = self._training_loader(train)
            length = RunLength.of(loader, epochs=epochs, steps=steps, rows=rows, seconds=seconds)
            settings = run_settings(
                self, self.schedule, loader, made_with=self._made_with,
                seed=self.seed, budget=f"{length.amount} {length.kind}", epochs=epochs, cost_budget=str(cost_budget),
            )  # fmt: skip
            agree_on_run(
                self, settings, loader, followers,
                stop=stop is not None, evaluate=evaluate is not None and not callable(evaluate),
                checkpoint=checkpoint is not None, checkpoint_interval=checkpoint_interval, resume=resume,
            )  # fmt: skip
            held = CheckpointFolder(checkpoint, self.ranks, resume=resume)
            training, still = self.modes.during(training=True), self.criterion.learning(learns=False)
            with recorded_gradients(), training_mode(self.model, self.parallel), training, still, held as folder:
                try:
                    state = self._run_state(
                        loader, length, settings, clock=clock, cost_budget=cost_budget, meter=meter, folder=checkpoint,
                        resumes=folder.resumes, callbacks=followers, stop=stop,
                    )  # fmt: skip
                except Stopped:  # in the calibration: nothing has begun
                    return TrainingLog(interrupted=True)
                said = (getattr(self.policy, "every_row", None), outside)
                state.log.notes += [note for note in said if note is not None and note not in state.log.notes]
                folder.make()
                loop = TrainingLoop(
                    state, length, self.schedule, evaluate=evaluate, evaluations=evaluations, stop=stop,
                    checkpoint_interval=checkpoint_interval,
                )  # fmt: skip
                return loop.run()

    def _training_loader(self, train: Iterable[Any]) -> Loader:
        """Return the data as a Loader whose rows have numbers, where the policy asks for rows by number."""
        loader, policy = self.loader(train), self.policy
        if isinstance(policy, InfoBatchPolicy):
            policy.every_row = None
        if loader.size is not None or not policy.needs_numbers or self.criterion.granularity == "token":
            return loader
        reason: str | None = f"a {type(loader).__name__} does not number its rows"
        if type(loader) is StreamLoader:
            reason = unnumbered_reason(loader.source, loader.targets, processes=self.ranks.size)
            if reason is None:
                if isinstance(policy, GatePolicy) and policy.gate.process_group is not None:
                    # A process whose batch has no row draws the next one, where the others do not.
                    raise UserError(
                        f"the policy {policy.name} with the scorer {policy.scorer.name} and one threshold for all "
                        "processes cannot choose a DataLoader's rows before they are loaded; use a ResidentLoader, or "
                        "a Gate of your own with process_group=None"
                    )
                source = cast("DataLoader[Any]", loader.source)
                return NumberedLoader(source, inputs=loader.inputs, targets=loader.targets, device=loader.device)
        if not (self._by_default and isinstance(policy, InfoBatchPolicy)):
            raise UserError(
                f"the policy {policy.name} asks for rows by their number, and {reason}; use data held in memory "
                '(ResidentLoader), a map-style DataLoader, or policy="dense"'
            )
        policy.every_row = f"every row is trained on, because {reason}"
        warnings.warn(f'{policy.every_row}; policy="dense" says that this is meant', stacklevel=3)
        return loader

    def _set_scheduler(self, scheduler: LRScheduler | None) -> None:
        if scheduler is None:
            inner = getattr(self.optimizer, "optimizer", self.optimizer)  # of Accelerate's wrapper
            if hasattr(inner.step, "_wrapped_by_lr_sched"):
                raise UserError("the optimizer has a learning-rate scheduler; give it as `schedule`, which is stepped")
        elif scheduler.optimizer is not self.optimizer:
            raise UserError("`schedule` must be a scheduler of the trainer's own optimizer; give that as `optimizer`")
        self.update.scheduler = scheduler

    def _run_state(
        self,
        loader: Loader,
        length: RunLength,
        settings: dict[str, Any],
        *,
        clock: Clock | None,
        cost_budget: tuple[float, str] | None,
        meter: Meter | None,
        folder: str | Path | None,
        resumes: bool,
        callbacks: Callbacks,
        stop: Callable[[], bool] | None,
    ) -> RunState:
        """Make the state of a new run, or restore that of the checkpoint in the folder."""
        self.operations = Operations()
        self.update.reset()
        if self.criterion.granularity == "token":
            self.policy.prepare(None)
        else:
            labels = loader.labels if self.criterion.classes else None
            self.policy.prepare(loader.size, labels, loader.duplicate_counts)
        in_seconds = length.kind == "seconds" or (cost_budget is not None and cost_budget[1] == "seconds")
        state = RunState(
            self,
            loader,
            settings=settings,
            clock=self._clock(clock, loader, calibrated=in_seconds and not resumes, stop=stop),
            # With several processes each would read the processor of all and its own GPU.
            energy=Energy(meter or (find_meter(self.device) if self.ranks.alone else None)),
            folder=folder,
            callbacks=callbacks,
        )
        saved = state.restore() if resumes else None
        if cost_budget is not None:
            state.rate_control = self._budget_controller(cost_budget, length, loader, state.clock)
            if saved is not None:
                state.rate_control.load_state_dict(saved["spending"])
        return state

    def _clock(
        self, clock: Clock | None, loader: Loader, *, calibrated: bool, stop: Callable[[], bool] | None
    ) -> Clock:
        tokens = self.criterion.granularity == "token"
        if clock is not None:
            if not hasattr(clock, "costs"):
                raise UserError(f"`clock` must be a Clock, or None, got {clock!r}")
            if clock.costs is not None and tokens:
                raise UserError(
                    'a calibrated clock cannot be used with granularity="token"; use Clock(), of raw seconds'
                )
            return clock
        # Several processes would slow each other down while they are timed.
        # Rows that workers read beside the training cost none of its time that could be timed here.
        timed = calibrated and not tokens and self.ranks.alone
        if timed and isinstance(loader, NumberedLoader):
            announce("seconds of this run are raw seconds: rows that a DataLoader's workers read cannot be calibrated")
            timed = False
        return Clock(calibrate(self, loader, stop=stop) if timed else None)

    def _budget_controller(
        self, cost_budget: tuple[float, str], length: RunLength, loader: Loader, clock: Clock
    ) -> BudgetController:
        total, unit = cost_budget
        if length.kind != "steps":
            raise UserError(f"`cost_budget` needs a run of steps or epochs, got one of {length.kind}")
        if not self.ranks.alone:
            raise UserError(f"`cost_budget` needs one process, got {self.ranks.size}")
        return BudgetController(
            self, self.schedule, loader, total=total, unit=unit, steps=int(length.amount), costs=clock.costs
        )
