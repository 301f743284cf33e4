"""Savings of each method on a model and a loader that were watched, and the noise that they cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sparse_training import devices
from sparse_training.nn import Compact
from sparse_training.profiling import advise_rows
from sparse_training.profiling.advise_steps import Head, Observed
from sparse_training.selection.policies.base import Policy
from sparse_training.selection.registry import make_policy, uses_rate
from sparse_training.selection.types import Batch
from sparse_training.training.flops import Operations
from sparse_training.training.schedule import Schedule
from sparse_training.training.step import TrainingStep

REPEATS, MORE_REPEATS, REPEAT_SECONDS = 3, 15, 4.0  # of what is timed here, the median taken; more while time is left
NOISE = 1.1  # the most that a drawn gradient's mean square may be, relative to the dense one's
HELD = 0.9  # share of the gradient norms that a hard gate's rows hold
LEAST_SAVING, LEAST_EFFICIENCY = 0.05, 1.05  # below these there is nothing to gain
_PACKED = "(hidden, targets), _ = Compact()((hidden.flatten(0, -2), targets.flatten()), targets.flatten() != {})"
_ASSUMES = {"importance": "past losses tell gradients", "gate": "hard rows are worth more"}


@dataclass(frozen=True)
class MethodBound:
    """Savings of one method, and their price.

    Attributes:
        method: the policy's name, or "head": the last layer and the loss on the targets that count alone.
        rate: fraction of the rows (of the targets, for "head") that are trained on in the sparse phase.
        scorer_cost: cost of scoring a batch, in forward passes: thirds of the cost of training on it.
        bound: the most times as fast as a dense step that the sparse phase's step can be here, were nothing lost to
            smaller batches.
        speedup: times as fast as a dense step, with the smaller batch's own measured time.
        sparse: fraction of a run that is sparse.
        saving: fraction of a run's time that is saved, its dense phases included; below 0 where the method costs more.
        saved_rows: fraction of a run's rows that are not trained on; of its targets, for "head".
        saved_flops: fraction of a run's floating-point operations that are saved, scoring included; None where none
            could be counted.
        noise: mean square of the gradient, relative to the dense one's, from the measured gradient norms; None where
            the method is biased or no gradient was seen.
        unbiased: True where the expected gradient is the dense one.
        assumes: what must hold for it; "" for nothing.
        code: line of code that follows it.
    """

    method: str
    rate: float
    scorer_cost: float
    bound: float
    speedup: float
    sparse: float
    saving: float
    saved_rows: float
    saved_flops: float | None
    noise: float | None
    unbiased: bool
    assumes: str
    code: str

    @property
    def efficiency(self) -> float | None:
        """Speed-up over noise: 1 for a dense step and for random rows, above 1 for a gain; None without a noise."""
        return None if self.noise is None else self.speedup / self.noise

    @property
    def worthwhile(self) -> bool:
        """True where the method saves time without a bias or an assumption, and more than random rows would."""
        gains = self.efficiency is not None and self.efficiency >= LEAST_EFFICIENCY
        return gains and self.saving >= LEAST_SAVING and self.unbiased and not self.assumes


class PlannedRun(NamedTuple):
    """A run of the trainer that savings are of.

    Attributes:
        epochs: its length in passes over the data, above 0.
        arguments: arguments of ``SparseTrainer`` as they stand in code, without policy and rate.
        numbered: True where rows can be left out before they are loaded.
        own_batches: True where a batch sampler of the user's arranged the batches, which then are pruned one by one.
    """

    epochs: float
    arguments: str
    numbered: bool
    own_batches: bool

    def code(self, policy: str, rate: float | None = None) -> str:
        """Return the line of code that trains with a policy, at a rate where it has one."""
        at = "" if rate is None else f", rate={rate:g}"
        return f'SparseTrainer({self.arguments}, policy="{policy}"{at}).fit(loader, epochs={self.epochs:g})'


def method_bounds(step: TrainingStep, seen: Observed, run: PlannedRun) -> list[MethodBound]:
    """Compute what each method could save, timing what the watched steps do not tell.

    Args:
        step: the training step that was watched; it may be changed.
        seen: what was seen of it.
        run: the run that savings are of.

    Returns:
        The methods that can be used on this model and data.
    """
    found = []
    if step.criterion.granularity == "sample" and len(seen.losses) > 1 and seen.batch.rows > 1:
        found += _by_rows(step, seen, run)
    if seen.head is not None and seen.counts.ignored and (saved := _by_targets(step, seen, seen.head)) is not None:
        found.append(saved)
    return found


def _by_rows(step: TrainingStep, seen: Observed, run: PlannedRun) -> list[MethodBound]:
    """Bounds of the methods that leave out rows."""
    losses, squares = seen.losses, seen.squares
    graded = len(squares) == len(losses) and bool((squares > 0.0).any())
    by_norm = squares if graded else torch.ones_like(losses)
    rates: dict[str, tuple[float, float | None]] = {}
    if run.numbered:
        rates["infobatch"] = advise_rows.infobatch(losses, by_norm)
        rates["importance"] = advise_rows.importance(losses, by_norm, NOISE)
    rates["importance@self"] = advise_rows.within_batch(losses, by_norm, NOISE)
    rates["gate"] = (advise_rows.fewest(by_norm.sqrt(), HELD), None)
    score, part, flops = _measure(step, seen, sorted({rate for rate, _ in rates.values()}))
    times, schedule, found = seen.times, Schedule(), []
    for method, (rate, noise) in rates.items():
        unread = method in ("infobatch", "importance")
        load, scoring = (times.load * rate, 0.0) if unread else (times.load, score)
        # Infobatch's steps are whole batches, and fewer of them; the others' are smaller.
        train = rate if method == "infobatch" and not run.own_batches else part[rate]
        speedup = times.total / (load + scoring + train * times.compute)
        # Past losses are there from the second pass on. Importance begins with the rows that have none.
        start = max(schedule.dense_start, 1.0 / run.epochs) if method == "infobatch" else schedule.dense_start
        sparse = max(0.0, 1.0 - start - schedule.dense_end)
        spent = None if not flops else rate + (flops["score"] / flops["train"] if scoring else 0.0)
        found.append(
            MethodBound(
                method=method,
                rate=rate,
                scorer_cost=3.0 * scoring / times.compute,
                bound=times.total / (load + scoring + rate * times.compute),
                speedup=speedup,
                sparse=sparse,
                saving=sparse * (1.0 - 1.0 / speedup),
                saved_rows=sparse * (1.0 - rate),
                saved_flops=None if spent is None else sparse * (1.0 - spent),
                noise=noise if graded else None,
                unbiased=method != "gate",
                assumes=_ASSUMES.get(method, ""),
                code=run.code(method, rate if uses_rate(method) else None),
            )
        )
    return found


def _measure(
    step: TrainingStep, seen: Observed, rates: list[float]
) -> tuple[float, dict[float, float], Mapping[str, float]]:
    """Time the scoring of a batch, and training on a part of it relative to the whole.

    Returns:
        Seconds of scoring, the relative cost of training at each rate, and the operations of "score" and "train";
        none of those where none were counted.
    """
    batch = seen.batch
    policy = make_policy("importance@self", rate=1.0, seed=0, loss=step.criterion)
    step.policy = step.attach(policy)
    step.check(batch)
    counted = Operations()
    with counted.of("score", batch.rows):
        _score(policy, batch)
    with counted.of("train", batch.rows):
        step.learn(step.head(batch, batch.rows))
    rows = {rate: max(1, round(rate * batch.rows)) for rate in rates}
    samples: dict[Any, list[float]] = {key: [] for key in ("score", 1.0, *rates)}
    for repeat in _repeats():
        taken: dict[Any, float] = {"score": _seconds(step, _score, policy, batch)}
        for rate in (1.0, *rates):
            taken[rate] = _seconds(step, step.learn, step.head(batch, rows.get(rate, batch.rows)))
        if repeat:  # the first one prepares the kernels of each shape
            for key, seconds in taken.items():
                samples[key].append(seconds)
    medians = {key: statistics.median(values) for key, values in samples.items()}
    scale = seen.times.compute / medians[1.0]
    relative = {rate: medians[rate] / medians[1.0] for rate in rates}
    return medians["score"] * scale, relative, counted.total if counted.total["train"] else {}


def _score(policy: Policy, batch: Batch) -> None:
    """Score a batch, down to the losses that a policy draws by."""
    scores = policy.score(batch)
    assert scores is not None
    scores.losses  # noqa: B018  # computed when first asked for


def _repeats() -> Iterator[int]:
    """Count repetitions from 0: a few in any case, and more while there is time."""
    began = time.perf_counter()
    for repeat in range(MORE_REPEATS):
        if repeat > REPEATS and time.perf_counter() - began > REPEAT_SECONDS:
            return
        yield repeat


def _seconds(step: TrainingStep, work: Callable[..., Any], *arguments: Any) -> float:
    """Time a piece of work, until the device has finished it."""
    devices.synchronize(step.device)
    began = time.perf_counter()
    work(*arguments)
    devices.synchronize(step.device)
    return time.perf_counter() - began


def _by_targets(step: TrainingStep, seen: Observed, head: Head) -> MethodBound | None:
    """Bound of the last layer and the loss on the targets that count; None where none count or the loss refuses."""
    loss, ignored = step.criterion.loss, step.criterion.ignore_index
    keep = head.targets != ignored
    if not bool(keep.any()) or bool(keep.all()):
        return None
    compact = Compact()

    def train(packed: bool) -> None:
        hidden, targets = head.hidden.detach().requires_grad_(), head.targets
        with torch.autocast(step.device.type, step.amp, enabled=step.amp is not None):
            if packed:
                (rows, targets), _ = compact((hidden, targets), keep)
                losses = loss(head.layer(rows), targets)
            else:
                losses = loss(head.layer(hidden), targets)
        losses.sum().backward()

    counted = {packed: Operations() for packed in (False, True)}
    for packed, operations in counted.items():
        with operations.of("train", 1):
            try:
                train(packed)
            except Exception:  # a loss that takes its targets in one shape alone says so in its own way
                return None
    samples: dict[bool, list[float]] = {False: [], True: []}
    for _ in _repeats():
        for packed, seconds in samples.items():
            seconds.append(_seconds(step, train, packed))
    whole, part = (min(statistics.median(samples[packed]), seen.times.compute) for packed in (False, True))
    rate = float(keep.float().mean())
    total, saved = seen.times.total, whole - part
    spared = counted[False].total["train"] - counted[True].total["train"]
    return MethodBound(
        method="head",
        rate=rate,
        scorer_cost=0.0,
        bound=total / (total - (1.0 - rate) * whole),
        speedup=total / (total - saved),
        sparse=1.0,
        saving=saved / total,
        saved_rows=1.0 - rate,
        saved_flops=spared / seen.flops if seen.flops else None,
        noise=1.0,
        unbiased=True,
        assumes="",
        code=_PACKED.format(ignored),
    )
