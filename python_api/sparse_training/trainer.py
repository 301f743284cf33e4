"""The trainer: any module, any batch structure, any per-sample loss, on the rows a policy keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from sparse_training import checkpoint as files
from sparse_training import devices
from sparse_training.clock import Clock, calibrate
from sparse_training.criterion import Criterion, Loss
from sparse_training.energy import Energy, Meter, Operations, find_meter
from sparse_training.errors import UserError
from sparse_training.gate import Gate
from sparse_training.loader import Batch, Choice, Loader, Offer, StreamLoader
from sparse_training.policies import GatePolicy, Kept, Policy, make_policy
from sparse_training.ranks import Ranks
from sparse_training.record import History, Status
from sparse_training.schedules import Schedule
from sparse_training.scoring import PRECISIONS, Scorer, Scores, SelfScorer, evaluation_statistics, forward
from sparse_training.spending import Spending
from sparse_training.update import Update

CHECKPOINT = "checkpoint.pt"
TRACE_POINTS = 500

OptimizerFactory = Callable[..., torch.optim.Optimizer]


class Learned(NamedTuple):
    """What the model made of rows, before it learned from them; without gradient."""

    losses: Tensor  # [n]
    logits: Any  # what the model gave


class SparseTrainer:
    """Trains a model on the rows that a policy keeps.

    Where torch.distributed is initialised (``torchrun``), its processes train one model: each on its part of the
    data, with the gradient of all their rows together, as one process with batches as large would have it, but for
    what a model does across the rows of a batch (BatchNorm). A process whose rows are all left out takes part.

    Args:
        model: any module; a tuple or list of inputs is unpacked into it, a mapping by keyword. Of several
            processes it is wrapped in DistributedDataParallel, if it is not already; evaluation and checkpoints
            are of the model itself.
        loss: maps (logits, targets) to one loss a row; see ``Criterion``, for tokens and pixels too.
        rows: "samples": the policy keeps samples, by the mean over a sample's tokens or pixels where it has
            several; what is left out is not in the backward, nor in the forward of the step. "elements": it keeps
            tokens or pixels of the training forward's own logits, by one threshold for all samples. That wants no
            scoring pass and is worth it for what is learnt; the loss and its gradient in the logits are computed
            for the elements kept alone, but the rest of the model runs as for a dense step. Rows are elements in
            the history, and seconds raw.
        class_dim: of the logits of tokens or pixels, 1 or -1, where shapes leave that open.
        optimizer: None for AdamW, a factory called with (parameters, lr=lr), or an optimiser.
        policy: a name in POLICIES, a Policy, or a Gate; policy@scorer, such as "gate@early:3", names both. A gate
            scores targets that are not class indices by the loss itself. None for adaptive, or for gate where a
            scorer is given.
        scorer: what the policy judges rows by: self, self:SCALE, early:LAYER, proxy, proxy:MODEL, reference:FILE,
            history, or a Scorer. None for the policy's own, the model itself for a gate.
        rate: fraction of rows to keep in the sparse phase, in (0, 1].
        warmup, anneal: fractions of the run trained densely at its start and end.
        lr: learning rate, for an optimiser made here.
        schedule: "cosine", "constant", or a callable that gives the learning rate's factor, by progress through
            the budget: of steps, rows or seconds.
        accumulate: batches whose rows make one optimiser step.
        clip_norm: largest gradient norm, None for no clipping.
        ema: decay of an average of the weights, 0.999 say, which is what is evaluated; None for none.
        precision: of the scoring pass: auto, float32, bfloat16 or float16.
        amp: of training: None for the model's own, bfloat16, or float16 (with a gradient scaler).
        compile: ``torch.compile`` the model, once for all numbers of rows; or the name of a backend of its.
        device: None for where the model is.
        seed: of the policy's own generators, with the process's rank; global ones are left to the caller.
        channels_last: memory format of convolutional weights; None for yes where there are any.
        inputs, targets: how to take them from a batch that is not (inputs, targets) or a mapping.

    Raises:
        UserError: an argument out of range, or a loss that reduces.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Loss | None = None,
        rows: str = "samples",
        class_dim: int | None = None,
        optimizer: OptimizerFactory | torch.optim.Optimizer | None = None,
        policy: str | Policy | Gate | None = None,
        scorer: str | Scorer | None = None,
        rate: float = 0.1,
        warmup: float = 0.05,
        anneal: float = 0.125,
        lr: float = 1e-3,
        schedule: str | Callable[[float], float] = "cosine",
        accumulate: int = 1,
        clip_norm: float | None = None,
        ema: float | None = None,
        precision: str = "auto",
        amp: str | None = None,
        compile: bool | str = False,
        device: torch.device | str | None = None,
        seed: int = 0,
        channels_last: bool | None = None,
        inputs: Callable[[Any], Any] | None = None,
        targets: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.criterion = Criterion(loss, rows=rows, class_dim=class_dim)
        if not lr > 0.0:
            raise UserError(f"lr {lr}: wanted more than 0")
        if amp is not None and amp not in PRECISIONS:
            raise UserError(f"amp {amp!r}: wanted None, {', '.join(PRECISIONS)}")
        self.schedule = Schedule(warmup, anneal, schedule)
        if policy is None:
            policy = "adaptive" if scorer is None else "gate"
        self.policy = make_policy(policy, rate=rate, seed=seed, loss=self.criterion.loss, scorer=scorer)
        if rows == "elements" and self.policy.scored_by is not None and type(self.policy.scorer) is not SelfScorer:
            raise UserError(
                f'scorer {self.policy.scorer.name} with rows="elements": wanted none, for the training '
                "forward's own logits are what is judged"
            )
        self.dense = Policy()
        self.device = devices.find(device) if device is not None else _device_of(model)
        self.ranks = Ranks()
        wrapped = model if isinstance(model, DistributedDataParallel) else None
        if isinstance(model, DistributedDataParallel):
            model = model.module
        self.model: nn.Module = model.to(self.device)
        if channels_last is None:
            channels_last = any(isinstance(module, nn.Conv2d) for module in model.modules())
        if channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.precision = precision
        self.attach(self.policy)
        self.amp = PRECISIONS[amp] if amp is not None else None
        self.seed = seed
        self._extract = {"inputs": inputs, "targets": targets}
        self.optimizer = self._make_optimizer(optimizer, lr)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.update = Update(
            self.model, self.optimizer,
            device=self.device, amp=self.amp, clip_norm=clip_norm, accumulate=accumulate, ema=ema, ranks=self.ranks,
        )  # fmt: skip
        self.operations = Operations()
        self.spending: Spending | None = None
        # What is trained through: not scored with, for a scoring pass has no gradient to average.
        self.parallel = wrapped or (self.model if self.ranks.alone else DistributedDataParallel(self.model))
        self.compiled = compile
        self.compile()
        self._checked = False

    def compile(self) -> None:
        """Compile the model where that was asked for; also after a copy, for copies are not compiled."""
        if self.compiled:
            model, backend = self.model, "inductor" if self.compiled is True else self.compiled

            def call(*arguments: Any, **named: Any) -> Any:
                return model._call_impl(*arguments, **named)  # type: ignore[no-untyped-call]

            # Module.compile() in our own function: of PyTorch's own containers that one compiles nothing. Static
            # shapes would be compiled anew for every number of rows.
            model._compiled_call_impl = torch.compile(call, dynamic=True, backend=backend)

    def _make_optimizer(
        self, optimizer: OptimizerFactory | torch.optim.Optimizer | None, lr: float
    ) -> torch.optim.Optimizer:
        if isinstance(optimizer, torch.optim.Optimizer):
            return optimizer
        if optimizer is not None:
            return optimizer(self.model.parameters(), lr=lr)
        # One pass over the parameters: a quarter of the unfused step's time on a CPU.
        if self.device.type == "xla":  # with its count of steps on the device, whatever skips a step can undo that too
            return torch.optim.AdamW(self.model.parameters(), lr=lr, capturable=True)
        fused = self.device.type in ("cpu", "cuda")
        return torch.optim.AdamW(self.model.parameters(), lr=lr, fused=fused)

    def attach(self, policy: Policy) -> Policy:
        """The policy on the trainer's device, its scorer told of the trainer's model and loss."""
        policy.to(self.device)
        policy.scorer.attach(self.model, self.criterion, device=self.device, precision=self.precision)
        return policy

    @property
    def scorer(self) -> Scorer:
        """What the policy judges rows by."""
        return self.policy.scorer

    # --- one step -------------------------------------------------------------------------------

    def step(self, policy: Policy, loader: Loader, item: Any) -> tuple[Batch, Kept]:
        """Load, score, select and train on one item of the loader."""
        if self.criterion.rows == "elements":
            samples = loader.load(item)
            with self.operations.of("train", samples.rows):
                return self._step_on_elements(policy, samples)
        batch = loader.load(item, policy.choose(loader.offer(item)))
        if not self._checked:
            self.check(batch)
        with self.operations.of("score", batch.rows, policy.name):
            kept = policy.select(policy.score(batch), batch)
        with self.operations.of("train", kept.targets.shape[0]):
            self.report(self.policy, batch, kept, self.learn(kept))
        return batch, kept

    def _step_on_elements(self, policy: Policy, samples: Batch) -> tuple[Batch, Kept]:
        """One forward of all samples; their logits, one row an element, are the batch that the policy sees."""
        if not self._checked:
            self.check(samples)
        if samples.rows == 0 and not self.ranks.alone:
            inputs, targets = nothing_like((samples.inputs, samples.targets))
            samples = samples._replace(inputs=inputs, targets=targets.fill_(self.criterion.ignore_index))
        with self._statistics(samples.rows), self._autocast():
            rows = self.criterion.elements(forward(self.parallel, samples.inputs), samples.targets)
            counts = rows[1] != self.criterion.ignore_index
            loader = StreamLoader((), device=self.device)
            if (policy.scored_by is None and not policy.before_loading) or isinstance(policy, GatePolicy):
                batch = loader.load(rows)._replace(weight=counts.float(), counted=counts.sum())
            else:  # it chooses, or ranks, among what counts
                offer = Offer(counts.nonzero().squeeze(1).cpu(), 0)
                batch = loader.load(rows, policy.choose(offer) or Choice(offer.ids))._replace(offered=len(offer.ids))
            scores = None
            if policy.scored_by is not None and not policy.before_loading:
                scores = Scores(batch.targets, self.criterion, logits=batch.inputs.detach())
            kept = policy.select(scores, batch)
            if self.update.nothing_in(kept) and self.ranks.alone:
                self.update.skip()
                return batch, kept
            self.update.share(kept)
            losses = self.criterion(kept.inputs, kept.targets)
        self.update.add(losses, kept)
        return batch, kept

    def report(self, policy: Policy, batch: Batch, kept: Kept, learned: Learned | None) -> None:
        """Tell a policy what training made of the rows, where they have numbers, and train what learns beside."""
        if learned is not None or not self.ranks.alone:  # what learns beside is one for all ranks
            policy.scorer.learn(kept)
        if learned is not None and batch.ids is not None:
            policy.observe(batch.ids if kept.positions is None else batch.ids[kept.positions], *learned)

    def learn(self, kept: Kept) -> Learned | None:
        """Train on the kept rows, and what the model made of them; None if there are none."""
        if nothing := self.update.nothing_in(kept):
            if self.ranks.alone:
                self.update.skip()
                return None
            # The other ranks wait for a backward pass. Not of a row of the batch: it may be empty, or not finite.
            inputs, targets = nothing_like((kept.inputs, kept.targets))
            kept = Kept(inputs, targets, 0, None, torch.zeros(1, device=self.device), 0)
        self.update.share(kept)
        with self._statistics(kept.targets.shape[0]), self._autocast(), self.scorer.watch():
            logits = forward(self.parallel, kept.inputs)
            losses = self.criterion(logits, kept.targets)
        self.update.add(losses, kept)
        if nothing:
            return None
        return Learned(losses.detach(), pytree.tree_map_only(Tensor, Tensor.detach, logits))

    def _statistics(self, rows: int) -> AbstractContextManager[None]:
        """The variance of one row is 0, or an error: BatchNorm uses its running statistics for it."""
        return evaluation_statistics(self.model, _BatchNorm) if rows == 1 else nullcontext()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)

    def check(self, batch: Batch) -> None:
        """Try the model and the loss on a batch; nothing of the model or the generators changes.

        Raises:
            UserError: a tensor whose dim 0 does not count the rows, or a loss not of shape [B].
        """
        for tensor in pytree.tree_leaves(batch.inputs):
            if isinstance(tensor, Tensor) and tensor.shape[:1] != (batch.rows,):
                raise UserError(
                    f"an input of shape {list(tensor.shape)} beside {batch.rows} targets: "
                    "wanted the same number of rows in dim 0"
                )
        with torch.no_grad(), evaluation_statistics(self.model), self._autocast():
            logits, targets = forward(self.model, batch.inputs), batch.targets
            if self.criterion.rows == "elements":
                self.criterion(*self.criterion.elements(logits, targets))
            else:
                self.criterion(logits, targets)
        if self.criterion.rows == "samples":
            self.scorer.build(batch, logits)
        self._checked = True

    def head(self, batch: Batch, rows: int) -> Kept:
        """The first rows of a batch, to train on."""
        parts = (batch.inputs, batch.targets, batch.weight)
        inputs, targets, weight = pytree.tree_map_only(Tensor, lambda tensor: tensor[:rows], parts)
        positions = None if rows == batch.rows else torch.arange(rows, device=batch.targets.device)
        return Kept(inputs, targets, rows, positions, weight, rows)

    def set_learning_rate(self, factor: float) -> None:
        """Each group's learning rate as a multiple of its first one."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(group["initial_lr"] * factor)
            else:
                group["lr"] = group["initial_lr"] * factor
        self.scorer.set_learning_rate(factor)

    # --- evaluation -----------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, data: Iterable[Any]) -> dict[str, float]:
        """Mean loss of a row, and accuracy where targets are classes, over one pass; nothing is changed.

        With an average of the weights, of that. Of several processes, over what all of them go through.
        """
        loader, model = self.loader(data), self.update.evaluated
        total = torch.zeros(4, dtype=torch.float64, device=self.device)  # losses, rows, right, elements
        classes = False
        with torch.random.fork_rng(devices=[]), evaluation_statistics(model):
            for item in loader:
                batch = loader.load(item)
                logits, targets = forward(model, batch.inputs), batch.targets
                rows: int | Tensor = batch.rows
                if self.criterion.rows == "elements":
                    logits, targets = self.criterion.elements(logits, targets)
                    counts = targets != self.criterion.ignore_index
                    logits, targets, rows = logits[counts], targets[counts], counts.sum()
                total[0] += self.criterion(logits, targets).sum()
                total[1] += rows
                if (found := self.criterion.right(logits, targets)) is not None:
                    classes = True
                    total[2] += found[0]
                    total[3] += found[1]
                devices.end_step(self.device)
        loss, rows, right, elements = self.ranks.sum_later(total)().tolist()
        accuracy = {"accuracy": right / max(elements, 1)} if classes or elements else {}
        return {**accuracy, "loss": loss / max(rows, 1)}

    def loader(self, data: Iterable[Any]) -> Loader:
        """The data as a Loader: as it is, or wrapped as a stream of batches."""
        if isinstance(data, Loader):
            return data
        return StreamLoader(data, device=self.device, **self._extract)

    # --- a run ----------------------------------------------------------------------------------

    def fit(
        self,
        train: Iterable[Any],
        *,
        epochs: float | None = None,
        steps: int | None = None,
        rows: int | None = None,
        seconds: float | None = None,
        evaluate: Iterable[Any] | Callable[[nn.Module], Mapping[str, float]] | None = None,
        evaluations: int = 20,
        clock: Clock | None = None,
        within: tuple[float, str] | None = None,
        meter: Meter | None = None,
        checkpoint: str | Path | None = None,
        every: int | None = None,
        resume: bool = False,
        progress: Callable[[Status], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> History:
        """Train for a budget: exactly one of epochs, steps, rows or seconds.

        Args:
            train: a ResidentLoader, a DataLoader, or any iterable of batches. Of several processes each has its
                part, in as many batches as the others: a ResidentLoader sees to it, to a DataLoader belongs a
                DistributedSampler.
            steps: batches. rows: that the batches hold, trained on or not, in all processes.
            seconds: of the clock; without a clock given, one is calibrated first. Of several processes the first
                one's clock counts, and without one given it is of raw seconds.
            evaluate: data, or a function of the model; done so many ``evaluations`` times a run,
                evenly spaced, the last at its end. Evaluation is not charged to the clock.
            within: what all of the run's steps are to take, with its unit: (2e15, "flops") or (60.0, "seconds") of the
                clock; the rate of the sparse phase follows what is left of it. Wants a budget of steps or epochs, and
                one process.
            meter: of joules; by default what can be read here, see ``energy``; of several processes none. Evaluation
                is not in them.
            checkpoint: folder for checkpoint.pt, written after ``every`` so many steps, when
                stopped, and at the end. Of several processes the first one writes it, and all read it.
            resume: go on from the folder's checkpoint, bit for bit; start if there is none.
            progress: called after every step.
            stop: asked after every step; once true, of any process, the run writes its checkpoint and returns.

        Returns:
            Counts of rows are of all processes.

        Raises:
            UserError: no budget or two, a checkpoint in the folder and no ``resume``, or one made
                with other settings; a batch or loss of the wrong shape.
        """
        loader = self.loader(train)
        kind, budget = self._budget(loader, epochs=epochs, steps=steps, rows=rows, seconds=seconds)
        settings = {**self._settings(loader, kind, budget), "within": str(within)}
        path = None if checkpoint is None else Path(checkpoint) / CHECKPOINT
        previous = path is not None and (path.exists() or files.previous_of(path).exists())
        if previous and not resume:
            raise UserError(f"{path} is there already: resume it, or choose another folder")
        history, self.operations = History(), Operations()
        state = None
        # Of several processes each would read the processor of all and a GPU of its own.
        energy = Energy(meter or (find_meter(self.device) if self.ranks.alone else None))
        elements = self.criterion.rows == "elements"
        if elements:
            self.policy.prepare(None)
        else:
            self.policy.prepare(loader.size, loader.labels, loader.copies)
        if path is not None and previous:
            clock = clock or Clock()
            state = files.load(path, self.device)
            self._restore(state, settings, loader, history, clock, energy)
        elif clock is None:
            # Processes would time one another.
            timed = kind == "seconds" or (within is not None and within[1] == "seconds")
            clock = Clock(calibrate(self, loader) if timed and not elements and self.ranks.alone else None)
        elif clock.costs is not None and elements:
            raise UserError('a calibrated clock with rows="elements": wanted Clock(), of raw seconds')
        self.spending = None
        if within is not None:
            if kind != "steps":
                raise UserError(f"within {within[0]:g} {within[1]} and a budget of {kind}: wanted steps or epochs")
            if not self.ranks.alone:
                raise UserError(f"within {within[0]:g} {within[1]} and several processes: wanted one")
            self.spending = Spending(self, loader, *within, steps=int(budget), costs=clock.costs)
            if state is not None:
                self.spending.load_state_dict(state["spending"])
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

        def done() -> float:
            if kind == "rows":
                return self.ranks.total(int(history.rows_seen)) / budget
            return (self.ranks.first(clock.seconds) if kind == "seconds" else history.steps) / budget

        def save() -> None:
            if path is None:
                return
            own = self.ranks.all(self._own_state(settings, loader, history))
            if self.ranks.rank == 0:
                files.save(path, {**self._state(clock, energy), **own[0], "others": own[1:]})

        def pause() -> None:
            clock.stop(self.device)
            energy.stop()

        def go_on() -> None:
            energy.start()
            clock.start()

        def spent() -> float:
            return clock.seconds if within and within[1] == "seconds" else sum(self.operations.total.values())

        items = _endless(loader)
        latest = history.evals[-1] if history.evals else None
        go_on()
        fraction = done()
        while fraction < 1.0:
            phase = self.schedule.phase(fraction) if self.policy.phased else "sparse"
            self.set_learning_rate(self.schedule.factor(fraction))
            policy = self.policy if phase == "sparse" else self.dense
            policy.at(fraction)
            policy.watched = phase == "sparse" and fraction * TRACE_POINTS >= len(history.trace)
            steered = self.spending if phase == "sparse" else None
            if steered is not None:
                steered.before(policy, spent())
            batch, kept = self.step(policy, loader, next(items))
            clock.charge(policy.name, batch.rows, kept.targets.shape[0], batch.offered, observer=self.policy.name)
            if steered is not None:
                steered.after(spent())
            self._record(history, phase, loader, batch, kept)
            fraction = done()
            if fraction >= 1.0:
                self.update.step()  # of what was accumulated
            devices.end_step(self.device)
            if policy.watched and (point := policy.trace()) is not None:
                history.trace.append((history.steps, *point))
            due = int(min(fraction, 1.0) * evaluations) > len(history.evals)
            if evaluate is not None and (due or fraction >= 1.0):
                pause()
                latest = self._evaluation(evaluate, history, clock)
                go_on()
            if progress is not None:
                progress(Status(fraction, phase, history.steps, clock.seconds, latest, policy))
            stopped = stop is not None and self.ranks.total(stop()) > 0
            history.interrupted = stopped and fraction < 1.0
            if history.interrupted:
                break
            if every and history.steps % every == 0 and fraction < 1.0:
                pause()
                save()
                go_on()
        pause()
        history.seconds, history.raw_seconds = clock.seconds, clock.raw_seconds
        history.joules, history.meter, history.operations = energy.joules, energy.source, self.operations.total
        save()
        if not self.ranks.alone:
            history.together(self.ranks.all(history))
        if not history.interrupted:
            history.warnings = self.policy.warnings(history.rate)
            if self.spending is not None:
                history.warnings += self.spending.warnings()
        return history

    def _evaluation(
        self,
        evaluate: Iterable[Any] | Callable[[nn.Module], Mapping[str, float]],
        history: History,
        clock: Clock,
    ) -> dict[str, float]:
        if callable(evaluate) and not isinstance(evaluate, Loader):
            model = self.update.evaluated
            with evaluation_statistics(model):
                found = {name: float(value) for name, value in evaluate(model).items()}
        else:
            found = self.evaluate(evaluate)
        history.evals.append({"seconds": clock.seconds, "step": history.steps, **found})
        return history.evals[-1]

    def _record(self, history: History, phase: str, loader: Loader, batch: Batch, kept: Kept) -> None:
        history.steps += 1
        history.phases[phase] += 1
        offered = batch.offered if batch.counted is None else batch.counted
        history.rows_seen += offered
        history.rows_trained += kept.rows
        if phase != "sparse" or self.policy.name == self.dense.name:
            return
        history.offered += offered
        history.kept += kept.rows
        if batch.ids is None or loader.size is None:
            return
        zeros = torch.zeros(loader.size if history.selected is None else 0, dtype=torch.int32, device=self.device)
        one = torch.ones_like(batch.ids, dtype=torch.int32)
        if kept.positions is None:
            if self.policy.before_loading:
                history.selected = zeros if history.selected is None else history.selected
                history.selected.index_add_(0, batch.ids, one)
            return
        if history.selected is None or history.seen is None:
            history.selected, history.seen = zeros, zeros.clone()
        history.seen.index_add_(0, batch.ids, one)
        valid = one[: len(kept.positions)] if kept.weight is None else (kept.weight > 0).int()
        history.selected.index_add_(0, batch.ids[kept.positions], valid)

    @staticmethod
    def _budget(loader: Loader, **given: float | None) -> tuple[str, float]:
        named = {name: amount for name, amount in given.items() if amount is not None}
        if len(named) != 1:
            raise UserError(f"{' and '.join(named) or 'no'} budget given: wanted one of {', '.join(given)}")
        ((kind, amount),) = named.items()
        if not 0.0 < amount < float("inf"):
            raise UserError(f"{kind} {amount}: wanted more than 0")
        if kind != "epochs":
            return kind, amount
        batches = loader.batches()
        if batches is None:
            raise UserError("epochs of data without a length: wanted steps= or seconds=")
        return "steps", max(1, round(amount * batches))

    # --- checkpoints ----------------------------------------------------------------------------

    def _settings(self, loader: Loader, kind: str, budget: float) -> dict[str, Any]:
        """What must agree for a run to be the continuation of another."""
        schedule = self.schedule
        return {
            "budget": f"{budget} {kind}",
            "policy": self.policy.name,
            "rate": self.policy.rate,
            "seed": self.seed,
            "warmup": schedule.warmup,
            "anneal": schedule.anneal,
            "schedule": schedule.name,
            "lr": [float(group["initial_lr"]) for group in self.optimizer.param_groups],
            "optimizer": type(self.optimizer).__name__,
            "clip_norm": self.update.clip_norm,
            "accumulate": self.update.accumulate,
            "ema": self.update.decay,
            "kept": self.criterion.rows,
            "scorer": str(self.scorer),
            "precision": str(self.scorer.dtype),
            "amp": str(self.amp),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "batches": loader.batches(),
            "batch_size": getattr(loader, "batch_size", None),
            "rows": loader.size,
        }

    def _state(self, clock: Clock, energy: Energy) -> dict[str, Any]:
        """What is the same on every rank, or the first one's for all."""
        return {
            "model": self.model.state_dict(),
            "update": self.update.state_dict(),
            "clock": clock.state_dict(),
            "energy": energy.state_dict(),
        }

    def _own_state(self, settings: dict[str, Any], loader: Loader, history: History) -> dict[str, Any]:
        """What is each rank's own."""
        return {
            "settings": settings,
            "policy": self.policy.state_dict(),
            "loader": loader.state_dict(),
            "operations": self.operations.state_dict(),
            "spending": None if self.spending is None else self.spending.state_dict(),
            "history": history.state_dict(),
            "rng": files.rng_state(self.device),
            "buffers": [] if self.ranks.rank == 0 else [buffer.detach() for buffer in self._buffers()],
        }

    def _buffers(self) -> list[Tensor]:
        """Of the model and its average: running statistics are of each rank's own rows."""
        models = [self.model] if self.update.ema is None else [self.model, self.update.ema]
        return [buffer for model in models for buffer in model.buffers()]

    def _restore(
        self,
        state: Mapping[str, Any],
        settings: dict[str, Any],
        loader: Loader,
        history: History,
        clock: Clock,
        energy: Energy,
    ) -> None:
        of_ranks = [state, *state["others"]]
        if len(of_ranks) != self.ranks.size:
            raise UserError(f"the checkpoint is of {len(of_ranks)} processes: wanted as many, not {self.ranks.size}")
        own = of_ranks[self.ranks.rank]
        saved = own["settings"]
        if differing := [name for name, value in settings.items() if saved.get(name) != value]:
            said = ", ".join(f"{name} {saved.get(name)} is now {settings[name]}" for name in differing)
            raise UserError(f"the checkpoint was made with other settings: {said}")
        self.model.load_state_dict(state["model"])
        self.update.load_state_dict(state["update"])
        clock.load_state_dict(state["clock"])
        for buffer, value in zip(self._buffers() if own["buffers"] else (), own["buffers"], strict=True):
            buffer.copy_(value)
        self.policy.load_state_dict(own["policy"])
        loader.load_state_dict(own["loader"])
        energy.load_state_dict(state["energy"])
        self.operations.load_state_dict(own["operations"])
        vars(history).update(own["history"], interrupted=False)
        files.set_rng_state(own["rng"], self.device)


def nothing_like(tree: Any) -> Any:
    """One row of zeros for every tensor's rows."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.new_zeros((1, *tensor.shape[1:])), tree)


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return parameter.device if parameter is not None else torch.device("cpu")


def _endless(loader: Loader) -> Iterator[Any]:
    while True:
        yield from loader
