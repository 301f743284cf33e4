"""Training steps that are watched: where their time goes, and what their rows teach."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_training import devices
from sparse_training.criterion import mean_over_tokens
from sparse_training.data.loader import Loader
from sparse_training.errors import UserError
from sparse_training.profiling.advise_isolation import endless
from sparse_training.profiling.advise_rows import RowCounts
from sparse_training.selection.types import Batch
from sparse_training.training.step import TrainingStep

LEAST = 2  # steps of each part, whatever they cost
SETTLED, TIMED = 0.3, 0.7  # of the limit: steps before the timed ones, and before those whose rows are looked at
STAGES = ("load", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a dense training step, by what it waits for.

    Attributes:
        load: waiting for the loader and moving the batch to the device, the mean of the timed steps: workers that load
            ahead make a step wait for less, or for nothing.
        forward: the model's forward pass and the loss, the median.
        backward: the backward pass, the median.
        optimizer: the optimizer's step, the median.
        steps: number of timed steps.
    """

    load: float
    forward: float
    backward: float
    optimizer: float
    steps: int

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return self.load + self.compute

    @property
    def compute(self) -> float:
        """Seconds of a step, but for loading."""
        return self.forward + self.backward + self.optimizer


class Head(NamedTuple):
    """A linear layer whose output is the logits, with what it was given.

    Attributes:
        layer: the layer.
        hidden: its input, for the targets that there are; [..., features].
        targets: the targets, [...].
    """

    layer: nn.Linear
    hidden: Tensor
    targets: Tensor


@dataclass
class Observed:
    """Everything that the watched steps showed.

    Attributes:
        times: seconds of a step.
        losses: loss of each row of the steps looked at, float32 on the CPU.
        squares: squared norm of the gradient of each row's loss in the model's output, up to one factor; empty where
            the loss was not given such an output.
        counts: counts of rows and targets that teach nothing.
        batch: the last whole batch.
        head: the layer that makes the logits; None where no linear layer does.
        steps: number of steps taken.
        flops: floating-point operations of a step, the mean.
        invalid: number of rows whose loss was not finite.
    """

    times: StepTimes
    losses: Tensor
    squares: Tensor
    counts: RowCounts
    batch: Batch
    head: Head | None
    steps: int
    flops: float
    invalid: int


@dataclass
class Limit:
    """Steps or seconds to measure for, whichever end first.

    Attributes:
        steps: largest number of steps; None for no such end.
        seconds: largest number of seconds; None for no such end.
    """

    steps: int | None
    seconds: float | None
    done: int = 0
    began: float = field(default_factory=time.perf_counter)

    def spent(self) -> float:
        """Return the part that is spent, from 0."""
        by_steps = 0.0 if self.steps is None else self.done / self.steps
        by_seconds = 0.0 if self.seconds is None else (time.perf_counter() - self.began) / self.seconds
        return max(by_steps, by_seconds)


class _Watch:
    """Takes the place of a step's loss, and notes times, losses and gradients as a step goes by.

    Args:
        step: the step, a copy of the user's.
    """

    def __init__(self, step: TrainingStep) -> None:
        self.step, self.loss = step, step.criterion.loss
        self.timing, self.looking = False, False
        self.laps: dict[str, list[float]] = {stage: [] for stage in STAGES}
        self.values: Tensor | None = None  # losses as the loss returned them
        self.targets: Tensor | None = None
        self.logits: Tensor | None = None
        self.gradients: list[Tensor] = []
        self.linear: list[tuple[nn.Linear, Tensor, Tensor]] = []
        self._last = 0.0
        step.criterion.loss = self
        step.parallel.register_forward_pre_hook(lambda *_: self.lap("load"))
        step.optimizer.register_step_pre_hook(lambda *_: self.lap("backward"))
        step.optimizer.register_step_post_hook(lambda *_: self.lap("optimizer"))
        for module in step.model.modules() if step.parallel is step.model else ():  # a compiled one would trace hooks
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self._keep_linear)

    def __call__(self, logits: Any, targets: Any) -> Any:
        values = self.loss(logits, targets)
        self.lap("forward")
        if torch.is_grad_enabled() and isinstance(values, Tensor) and not values.requires_grad:
            raise UserError("the loss must depend on the model's output, got one without a gradient")
        if self.looking and isinstance(logits, Tensor) and logits.requires_grad and isinstance(values, Tensor):
            self.values, self.targets, self.logits = values.detach(), targets, logits.detach()
            logits.register_hook(self.gradients.append)  # type: ignore[no-untyped-call]
        return values

    def _keep_linear(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if self.looking and isinstance(layer, nn.Linear) and torch.is_grad_enabled() and inputs:
            self.linear.append((layer, inputs[0].detach(), output.detach()))

    def start(self) -> None:
        """Begin to time a step."""
        if self.timing:
            devices.synchronize(self.step.device)
            self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """End a stage of the step."""
        if self.timing:
            devices.synchronize(self.step.device)
            before, self._last = self._last, time.perf_counter()
            self.laps[stage].append(self._last - before)

    def forget(self) -> None:
        """Forget the last step's tensors."""
        self.values = self.targets = self.logits = None
        self.gradients.clear()
        self.linear.clear()

    def mean_square(self) -> Tensor | None:
        """Squared norm of the gradient of each target or row; None where the loss was given no such output."""
        if not self.gradients or self.targets is None:
            return None
        squares, shape = self.gradients[0].detach().float().nan_to_num().square(), self.targets.shape
        for dim in (1, -1) if squares.ndim == len(shape) + 1 else ():
            if (summed := squares.sum(dim)).shape == shape:
                return summed
        return squares if squares.shape == shape else squares.reshape(squares.shape[0], -1).sum(1)

    def head(self) -> Head | None:
        """Find the linear layer whose output the loss was given, whole or but for its last positions."""
        if self.logits is None or self.targets is None:
            return None
        for layer, hidden, output in reversed(self.linear):
            if output.data_ptr() != self.logits.data_ptr() or hidden.shape[:-1] != output.shape[:-1]:
                continue
            if hidden.shape[:-1].numel() == self.targets.numel():
                return Head(layer, hidden.reshape(-1, hidden.shape[-1]), self.targets.reshape(-1))
            if hidden.ndim == 3 and self.targets.ndim == 2 and hidden.shape[1] > self.targets.shape[1]:
                return Head(layer, hidden[:, : self.targets.shape[1]].flatten(0, 1), self.targets.reshape(-1))
        return None


def observe(
    step: TrainingStep,
    loader: Loader,
    limit: Limit,
    *,
    ahead: int = 0,
    compare_inputs: bool = True,
    progress: Callable[[float], None] | None = None,
) -> Observed:
    """Train up to a limit, and watch: first settle, then time steps, then look at their rows.

    Args:
        step: a training step that may be changed.
        loader: a loader that may be moved on.
        limit: steps or seconds to train for; a few steps are taken in any case.
        ahead: number of batches that the loader's workers have loaded before the first step, which are not timed.
        compare_inputs: True (the default) to look for exact copies among the rows.
        progress: called after each step with the part of the limit that is spent. Default None.

    Returns:
        What was seen.

    Raises:
        UserError: the data yields no batch, or the model or the loss does not fit it.
    """
    watch, items = _Watch(step), endless(loader)

    def take(item: Any) -> None:
        step.step(step.dense, loader, item)
        devices.end_step(step.device)
        limit.done += 1
        if progress is not None:
            progress(min(1.0, limit.spent()))

    while limit.done < LEAST or limit.spent() < SETTLED / 2 or (limit.done < ahead and limit.spent() < SETTLED):
        take(next(items)[0])
    times = _timed(watch, items, limit, take)
    looks: list[tuple[Tensor, Tensor | None]] = []
    counts, invalid = RowCounts(), 0
    watch.looking, looked = True, 0
    whole: Batch | None = None
    while looked < LEAST or limit.spent() < 1.0:
        item, first = next(items)
        if first:
            counts.begin_pass()
        watch.forget()
        take(item)
        looked += 1
        batch = loader.load(item)
        of_rows, of_gradients = _look(watch, step, batch, counts)
        if compare_inputs:
            counts.add_inputs(batch.inputs, batch.rows)
        finite = of_rows.isfinite()
        invalid += int((~finite).sum())
        looks.append((of_rows[finite], None if of_gradients is None else of_gradients[finite]))
        whole = batch if whole is None or batch.rows >= whole.rows else whole
    assert whole is not None
    head = watch.head()
    watch.looking = False
    watch.forget()
    flops = step.operations.total.get("train", 0.0) / limit.done
    # A batch with a loss that is not finite has no gradient: the others stand for it.
    graded = [(losses, squares) for losses, squares in looks if squares is not None]
    losses = torch.cat([losses for losses, _ in graded or looks])
    squares = torch.cat([squares for _, squares in graded]) if graded else torch.empty(0)
    return Observed(times, losses, squares, counts, whole, head, limit.done, flops, invalid)


def _timed(watch: _Watch, items: Iterator[tuple[Any, bool]], limit: Limit, take: Callable[[Any], None]) -> StepTimes:
    """Take steps whose stages are timed; on an accelerator also steps that nothing interrupts."""
    watch.timing, device = True, watch.step.device
    share = TIMED if device.type == "cpu" else (SETTLED + TIMED) / 2
    steps = 0
    while steps < LEAST or limit.spent() < share:
        watch.start()
        take(next(items)[0])
        steps += 1
    watch.timing = False
    load = sum(watch.laps["load"]) / steps
    forward, backward, optimizer = (
        statistics.median(watch.laps[stage]) if watch.laps[stage] else 0.0 for stage in STAGES[1:]
    )
    if device.type != "cpu":  # the device works while the host loads: a step waits for less than loading takes
        devices.synchronize(device)
        began, free = time.perf_counter(), 0
        while free < LEAST or limit.spent() < TIMED:
            take(next(items)[0])
            free += 1
        devices.synchronize(device)
        load = max(0.0, (time.perf_counter() - began) / free - forward - backward - optimizer)
    return StepTimes(load, forward, backward, optimizer, steps)


def _look(watch: _Watch, step: TrainingStep, batch: Batch, counts: RowCounts) -> tuple[Tensor, Tensor | None]:
    """Count a step's rows; return their losses and the squared norms of their gradients, on the CPU."""
    values, targets = watch.values, watch.targets
    if values is None or targets is None:
        raise UserError("the loss must be a tensor with a gradient, computed from the model's output")
    counting = step.criterion.counting(targets)
    counting = counting if counting is not None and counting.shape == values.shape else None
    squares = watch.mean_square()
    counts.add_targets(targets, counting)
    counts.add_padding(batch.inputs)
    if squares is not None:
        counts.add_gradients(squares, counting if squares.shape == targets.shape else None)
        squares = squares.reshape(len(squares), -1).sum(1)
    values = values.float()
    losses = values if values.ndim == 1 else mean_over_tokens(values, counting)
    if step.criterion.granularity == "token" and counting is not None:  # a row is a token, and some do not count
        losses, squares = losses[counting], None if squares is None else squares[counting]
    return losses.cpu(), None if squares is None else squares.cpu()
