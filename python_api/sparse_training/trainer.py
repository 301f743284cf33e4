"""The trainer: any module, any batch structure, any per-sample loss, on the rows a policy keeps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from sparse_training import checkpoint as files
from sparse_training.clock import Clock, calibrate
from sparse_training.errors import UserError
from sparse_training.gate import Gate
from sparse_training.loader import Batch, Loader, StreamLoader
from sparse_training.policies import Kept, Policy, make_policy
from sparse_training.schedules import PHASES, Schedule
from sparse_training.scoring import PRECISIONS, Scorer, evaluation_statistics, forward

CHECKPOINT = "checkpoint.pt"
TRACE_POINTS = 500

OptimizerFactory = Callable[..., torch.optim.Optimizer]


class Learned(NamedTuple):
    """What the model made of rows, before it learned from them; without gradient."""

    losses: Tensor  # [n]
    logits: Any  # what the model gave


@dataclass
class History:
    """What a run did. Counts that the device makes stay there until ``to_dict`` reads them."""

    steps: int = 0  # batches gone through, with or without an optimiser step
    rows_seen: int = 0
    rows_trained: int | Tensor = 0
    offered: int = 0  # rows of the sparse phase, and how many of them were kept
    kept: int | Tensor = 0
    phases: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    evals: list[dict[str, float]] = field(default_factory=list)
    trace: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)  # step, rate, threshold
    seconds: float = 0.0
    raw_seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    interrupted: bool = False
    selected: Tensor | None = None  # int32 [rows of the data set]: times kept in the sparse phase,
    seen: Tensor | None = None  # and times scored (None if not), where the loader knows rows by number

    @property
    def rate(self) -> float | None:
        """Rows kept of rows offered in the sparse phase; None before it."""
        return int(self.kept) / self.offered if self.offered else None

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; waits for the device."""
        return {
            "seconds": self.seconds,
            "raw_seconds": self.raw_seconds,
            "steps": self.steps,
            "rows_seen": self.rows_seen,
            "rows_trained": int(self.rows_trained),
            "rate": self.rate,
            "phases": dict(self.phases),
            "evals": list(self.evals),
            "trace": [
                {"step": step, "rate": float(rate), "threshold": float(threshold)}
                for step, rate, threshold in self.trace
            ],
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class Status:
    """Where a run is, for a progress display."""

    progress: float  # of the budget, 0 to 1
    phase: str
    step: int
    seconds: float
    evaluation: Mapping[str, float] | None  # the latest
    policy: Policy  # of the step just done; reading what its ``trace`` gives waits for the device


class SparseTrainer:
    """Trains a model on the rows that a policy keeps.

    Args:
        model: any module; a tuple or list of inputs is unpacked into it, a mapping by keyword.
        loss: maps (logits, targets) to one loss a row, shape [B].
        optimizer: None for AdamW, a factory called with (parameters, lr=lr), or an optimiser.
        policy: a name in POLICIES, a Policy, or a Gate; policy@scorer, such as "gate@early:3", names both.
        scorer: what the policy judges rows by: self, self:SCALE, early:LAYER, proxy, proxy:MODEL, reference:FILE,
            history, or a Scorer. None for the policy's own, the model itself for a gate.
        rate: fraction of rows to keep in the sparse phase, in (0, 1].
        warmup, anneal: fractions of the run trained densely at its start and end.
        lr: learning rate, for an optimiser made here.
        schedule: "cosine" or "constant", by progress through the budget.
        clip_norm: largest gradient norm, None for no clipping.
        precision: of the scoring pass: auto, float32, bfloat16 or float16.
        amp: of training: None for the model's own, bfloat16, or float16 (with a gradient scaler).
        device: None for where the model is.
        seed: of the policy's own generators; global ones are left to the caller.
        channels_last: memory format of convolutional weights; None for yes where there are any.
        inputs, targets: how to take them from a batch that is not (inputs, targets) or a mapping.

    Raises:
        UserError: an argument out of range, or a loss that reduces.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        optimizer: OptimizerFactory | torch.optim.Optimizer | None = None,
        policy: str | Policy | Gate = "gate",
        scorer: str | Scorer | None = None,
        rate: float = 0.1,
        warmup: float = 0.05,
        anneal: float = 0.125,
        lr: float = 1e-3,
        schedule: str = "cosine",
        clip_norm: float | None = None,
        precision: str = "auto",
        amp: str | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        channels_last: bool | None = None,
        inputs: Callable[[Any], Any] | None = None,
        targets: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.loss = nn.CrossEntropyLoss(reduction="none") if loss is None else loss
        check_reduction(self.loss)
        if not lr > 0.0:
            raise UserError(f"lr {lr}: wanted more than 0")
        if clip_norm is not None and not clip_norm > 0.0:
            raise UserError(f"clip_norm {clip_norm}: wanted more than 0, or None")
        if amp is not None and amp not in PRECISIONS:
            raise UserError(f"amp {amp!r}: wanted None, {', '.join(PRECISIONS)}")
        self.schedule = Schedule(warmup, anneal, schedule)
        self.policy = make_policy(policy, rate=rate, seed=seed, loss=self.loss, scorer=scorer)
        self.dense = Policy()
        self.device = torch.device(device) if device is not None else _device_of(model)
        self.model = model.to(self.device)
        if channels_last is None:
            channels_last = any(isinstance(module, nn.Conv2d) for module in model.modules())
        if channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.precision = precision
        self.attach(self.policy)
        self.amp = PRECISIONS[amp] if amp is not None else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == torch.float16)
        self.clip_norm, self.seed = clip_norm, seed
        self._extract = {"inputs": inputs, "targets": targets}
        self.optimizer = self._make_optimizer(optimizer, lr)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._checked = False

    def _make_optimizer(
        self, optimizer: OptimizerFactory | torch.optim.Optimizer | None, lr: float
    ) -> torch.optim.Optimizer:
        if isinstance(optimizer, torch.optim.Optimizer):
            return optimizer
        if optimizer is not None:
            return optimizer(self.model.parameters(), lr=lr)
        # One pass over the parameters: a quarter of the unfused step's time on a CPU.
        fused = self.device.type in ("cpu", "cuda")
        return torch.optim.AdamW(self.model.parameters(), lr=lr, fused=fused)

    def attach(self, policy: Policy) -> Policy:
        """The policy on the trainer's device, its scorer told of the trainer's model and loss."""
        policy.to(self.device)
        policy.scorer.attach(self.model, self.loss, device=self.device, precision=self.precision)
        return policy

    @property
    def scorer(self) -> Scorer:
        """What the policy judges rows by."""
        return self.policy.scorer

    # --- one step -------------------------------------------------------------------------------

    def step(self, policy: Policy, loader: Loader, item: Any) -> tuple[Batch, Kept]:
        """Load, score, select and train on one item of the loader."""
        batch = loader.load(item, policy.choose(loader.offer(item)))
        if not self._checked:
            self.check(batch)
        kept = policy.select(policy.score(batch), batch)
        self.report(self.policy, batch, kept, self.learn(kept))
        return batch, kept

    @staticmethod
    def report(policy: Policy, batch: Batch, kept: Kept, learned: Learned | None) -> None:
        """Tell a policy what training made of the rows, where they have numbers, and train what learns beside."""
        if learned is None:
            return
        policy.scorer.learn(kept)
        if batch.ids is not None:
            policy.observe(batch.ids if kept.positions is None else batch.ids[kept.positions], *learned)

    def learn(self, kept: Kept) -> Learned | None:
        """One optimiser step on the kept rows, and what the model made of them; none and None if there are none."""
        rows = kept.targets.shape[0]
        if rows == 0:
            return None
        empty: Tensor | None = None
        if isinstance(kept.rows, Tensor):
            if self._can_skip_on_device():
                empty = (kept.rows == 0).float().reshape(())
            elif int(kept.rows) == 0:  # waits for the device
                return None
        self.optimizer.zero_grad(set_to_none=True)
        # The variance of one row is 0, or an error: BatchNorm uses its running statistics for it.
        frozen = evaluation_statistics(self.model, _BatchNorm) if rows == 1 else nullcontext()
        with frozen, self._autocast(), self.scorer.watch():
            logits = forward(self.model, kept.inputs)
            losses = self.loss(logits, kept.targets)
            loss = losses.mean() if kept.weight is None else (losses * kept.weight).sum() / kept.divisor
        self.scaler.scale(loss).backward()
        if self.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        if empty is not None:
            self.optimizer.found_inf = empty  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if empty is not None:
            del self.optimizer.found_inf  # type: ignore[attr-defined]
        return Learned(losses.detach(), pytree.tree_map_only(Tensor, Tensor.detach, logits))

    def _can_skip_on_device(self) -> bool:
        """Fused optimisers leave everything as it is where ``found_inf`` is 1, without a host sync."""
        fused = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        return fused and self.device.type == "cuda" and not self.scaler.is_enabled()

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
            logits = forward(self.model, batch.inputs)
            losses = self.loss(logits, batch.targets)
        if not isinstance(losses, Tensor) or losses.shape != (batch.rows,):
            shape = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise UserError(f"the loss gives {shape} for {batch.rows} rows: wanted one value a row, [B]")
        self.scorer.build(batch, logits)
        self._checked = True

    def head(self, batch: Batch, rows: int) -> Kept:
        """The first rows of a batch, to train on."""
        parts = (batch.inputs, batch.targets, batch.weight)
        inputs, targets, weight = pytree.tree_map_only(Tensor, lambda tensor: tensor[:rows], parts)
        return Kept(inputs, targets, rows, None, weight, rows)

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
        """Mean loss, and accuracy for class targets, over one pass; the model is left as it was."""
        loader = self.loader(data)
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        rows = 0
        with torch.random.fork_rng(devices=[]), evaluation_statistics(self.model):
            for item in loader:
                batch = loader.load(item)
                logits = forward(self.model, batch.inputs)
                total[0] += self.loss(logits, batch.targets).sum()
                if logits.ndim == batch.targets.ndim + 1:
                    total[1] += (logits.argmax(1) == batch.targets).sum()
                rows += batch.rows
        loss, right = (total / max(rows, 1)).tolist()
        return {"accuracy": right, "loss": loss}

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
        seconds: float | None = None,
        evaluate: Iterable[Any] | Callable[[nn.Module], Mapping[str, float]] | None = None,
        evaluations: int = 20,
        clock: Clock | None = None,
        checkpoint: str | Path | None = None,
        every: int | None = None,
        resume: bool = False,
        progress: Callable[[Status], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> History:
        """Train for a budget: exactly one of epochs, steps or seconds.

        Args:
            train: a ResidentLoader, a DataLoader, or any iterable of batches.
            seconds: of the clock; without a clock given, one is calibrated first.
            evaluate: data, or a function of the model; done so many ``evaluations`` times a run,
                evenly spaced, the last at its end. Evaluation is not charged to the clock.
            checkpoint: folder for checkpoint.pt, written after ``every`` so many steps, when
                stopped, and at the end.
            resume: go on from the folder's checkpoint, bit for bit; start if there is none.
            progress: called after every step.
            stop: asked after every step; once true, the run writes its checkpoint and returns.

        Raises:
            UserError: no budget or two, a checkpoint in the folder and no ``resume``, or one made
                with other settings; a batch or loss of the wrong shape.
        """
        loader = self.loader(train)
        kind, budget = self._budget(loader, epochs=epochs, steps=steps, seconds=seconds)
        settings = self._settings(loader, kind, budget)
        path = None if checkpoint is None else Path(checkpoint) / CHECKPOINT
        previous = path is not None and (path.exists() or files.previous_of(path).exists())
        if previous and not resume:
            raise UserError(f"{path} is there already: resume it, or choose another folder")
        history = History()
        self.policy.prepare(loader.size, loader.labels)
        if path is not None and previous:
            clock = clock or Clock()
            self._restore(files.load(path, self.device), settings, loader, history, clock)
        elif clock is None:
            clock = Clock(calibrate(self, loader) if kind == "seconds" else None)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

        def done() -> float:
            return (clock.seconds if kind == "seconds" else history.steps) / budget

        def save() -> None:
            if path is not None:
                files.save(path, self._state(settings, loader, history, clock))

        items = _endless(loader)
        latest = history.evals[-1] if history.evals else None
        clock.start()
        while (fraction := done()) < 1.0:
            phase = self.schedule.phase(fraction) if self.policy.phased else "sparse"
            self.set_learning_rate(self.schedule.factor(fraction))
            policy = self.policy if phase == "sparse" else self.dense
            policy.at(fraction)
            batch, kept = self.step(policy, loader, next(items))
            clock.charge(policy.name, batch.rows, kept.targets.shape[0], batch.offered, observer=self.policy.name)
            self._record(history, phase, loader, batch, kept)
            fraction = done()
            due = phase == "sparse" and fraction * TRACE_POINTS >= len(history.trace)
            if due and (point := policy.trace()) is not None:
                history.trace.append((history.steps, *point))
            due = int(min(fraction, 1.0) * evaluations) > len(history.evals)
            if evaluate is not None and (due or fraction >= 1.0):
                clock.stop(self.device)
                latest = self._evaluation(evaluate, history, clock)
                clock.start()
            if progress is not None:
                progress(Status(fraction, phase, history.steps, clock.seconds, latest, policy))
            history.interrupted = stop is not None and stop() and fraction < 1.0
            if history.interrupted:
                break
            if every and history.steps % every == 0 and fraction < 1.0:
                clock.stop(self.device)
                save()
                clock.start()
        clock.stop(self.device)
        history.seconds, history.raw_seconds = clock.seconds, clock.raw_seconds
        save()
        if not history.interrupted:
            history.warnings = self.policy.warnings(history.rate)
        return history

    def _evaluation(
        self,
        evaluate: Iterable[Any] | Callable[[nn.Module], Mapping[str, float]],
        history: History,
        clock: Clock,
    ) -> dict[str, float]:
        if callable(evaluate) and not isinstance(evaluate, Loader):
            with evaluation_statistics(self.model):
                found = {name: float(value) for name, value in evaluate(self.model).items()}
        else:
            found = self.evaluate(evaluate)
        history.evals.append({"seconds": clock.seconds, "step": history.steps, **found})
        return history.evals[-1]

    def _record(self, history: History, phase: str, loader: Loader, batch: Batch, kept: Kept) -> None:
        history.steps += 1
        history.phases[phase] += 1
        history.rows_seen += batch.offered
        history.rows_trained += kept.rows
        if phase != "sparse" or self.policy.name == self.dense.name:
            return
        history.offered += batch.offered
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
            "schedule": schedule.shape,
            "lr": [float(group["initial_lr"]) for group in self.optimizer.param_groups],
            "optimizer": type(self.optimizer).__name__,
            "clip_norm": self.clip_norm,
            "scorer": str(self.scorer),
            "precision": str(self.scorer.dtype),
            "amp": str(self.amp),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "batches": loader.batches(),
            "batch_size": getattr(loader, "batch_size", None),
            "rows": loader.size,
        }

    def _state(self, settings: dict[str, Any], loader: Loader, history: History, clock: Clock) -> dict[str, Any]:
        return {
            "settings": settings,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "policy": self.policy.state_dict(),
            "loader": loader.state_dict(),
            "clock": clock.state_dict(),
            "history": history.state_dict(),
            "rng": files.rng_state(self.device),
        }

    def _restore(
        self,
        state: Mapping[str, Any],
        settings: dict[str, Any],
        loader: Loader,
        history: History,
        clock: Clock,
    ) -> None:
        differing = [name for name, value in settings.items() if state["settings"].get(name) != value]
        if differing:
            said = ", ".join(f"{name} {state['settings'].get(name)} is now {settings[name]}" for name in differing)
            raise UserError(f"the checkpoint was made with other settings: {said}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.policy.load_state_dict(state["policy"])
        loader.load_state_dict(state["loader"])
        clock.load_state_dict(state["clock"])
        vars(history).update(state["history"], interrupted=False)
        files.set_rng_state(state["rng"], self.device)


def check_reduction(loss: Callable[..., Any]) -> None:
    """Refuse a loss that is known to reduce over the rows.

    Raises:
        UserError: its ``reduction``, as an attribute or a parameter's default, is not "none".
    """
    reduction = getattr(loss, "reduction", None)
    if reduction is None and not isinstance(loss, nn.Module):
        try:
            parameter = inspect.signature(loss).parameters.get("reduction")
        except (TypeError, ValueError):  # a builtin without a signature
            parameter = None
        reduction = None if parameter is None else parameter.default
    if isinstance(reduction, str) and reduction != "none":
        name = getattr(loss, "__name__", type(loss).__name__)
        raise UserError(f'the loss {name} has reduction="{reduction}": wanted one loss a row, reduction="none"')


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return parameter.device if parameter is not None else torch.device("cpu")


def _endless(loader: Loader) -> Iterator[Any]:
    while True:
        yield from loader
