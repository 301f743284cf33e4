"""Calibration: the seconds of each stage of each policy's step, measured before a run or a comparison.

On a shared machine, raw wall-clock gives one method of a comparison more steps than another. So each kind of work is
timed beforehand, in interleaved blocks of the policies' steps, so that a drift affects all of them alike. A run's clock
then advances by the medians. Raw seconds are recorded as well.
"""

from __future__ import annotations

import copy
import operator
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparse_training.data.loader import Loader
from sparse_training.devices import synchronize
from sparse_training.selection.policies.base import Policy
from sparse_training.training.clock import Costs, Curve
from sparse_training.training.step import TrainingStep
from sparse_training.user_code import explained

BLOCK, SETTLING = 12, 2  # consecutive steps of a policy, and how many of them, at the start, are not timed
SHORT_BLOCK = 3  # on the short last batch of an epoch
MIN_ROUNDS, MAX_ROUNDS, CALIBRATION_SECONDS = 5, 101, 5.0
OBSERVED = 1 << 14  # rows whose losses are passed at once


def calibrate(
    trainer: TrainingStep,
    loader: Loader,
    policies: Mapping[str, Policy] | None = None,
    *,
    loaders: Mapping[str, Loader] | None = None,
    rounds: int | None = None,
    seconds: float = CALIBRATION_SECONDS,
    progress: Callable[[float], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Costs:
    """Time every stage of every policy's step, interleaved, on copies; nothing of the trainer changes.

    Args:
        trainer: trainer whose model and optimizer are copied.
        loader: loader of the batches to time; its epoch and position stay as they are.
        policies: policies by name. Default: the trainer's own. Dense steps are always timed too.
        loaders: loaders by policy name, for policies that are offered other batches than those of ``loader``.
            Default: none.
        rounds: number of rounds over all policies and batch sizes. Default: as many as fit into ``seconds``, from 5
            to 101, after a warm-up.
        seconds: duration of the timed rounds where ``rounds`` is not given. Default 5.
        progress: called after every round with the fraction done, in [0, 1], and once with 0. Default None.
        stop: asked before every step; once it returns true, the calibration ends. Default None.

    Returns:
        The median seconds of each stage.

    Raises:
        Stopped: ``stop`` returned true.
    """
    show, go_on = progress or (lambda fraction: None), _Asks(stop)
    with explained(lambda: "seconds are calibrated on a copy of the model, which copy.deepcopy cannot make"):
        twin = copy.deepcopy(trainer)
    twin.update.scheduler = None
    twin.compile()
    memo = {id(trainer.model): twin.model}  # scorers attached to the model are attached to its copy
    copies = [twin.dense, *copy.deepcopy(list((policies or {"": trainer.policy}).values()), memo)]
    sources = [
        _Source(twin.attach(policy), (loaders or {}).get(policy.name, loader), classes=twin.criterion.classes)
        for policy in {policy.name: policy for policy in copies}.values()
    ]
    samples: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    devices = [twin.device] if twin.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for source in sources:
            twin.policy = source.policy
            twin.check(loader.load(source.items()[0]))
        show(0.0)
        for source in sources:
            twin.policy = source.policy
            _fill(twin, source, go_on)
            _warm_up(twin, source, go_on)
        done, began = 0, time.perf_counter()
        while done < (rounds or MIN_ROUNDS) or (rounds is None and done < MAX_ROUNDS and _since(began) < seconds):
            for source in sources:
                for item, steps in zip(source.items(), (BLOCK, SHORT_BLOCK), strict=False):
                    _time_block(twin, source, item, steps, samples, go_on)
            done += 1
            least = min(done / MIN_ROUNDS, _since(began) / max(seconds, 1e-9))
            show(min(1.0, done / rounds if rounds else max(least, done / MAX_ROUNDS)))
    shared = {stage: _curve(samples, "", stage) for stage in ("load", "train")}
    stages = ("score", "select", "observe")
    names = [source.policy.name for source in sources]
    own = {name: {stage: _curve(samples, name, stage) for stage in stages} for name in names}
    return Costs(shared, own, done)


class Stopped(Exception):
    """A calibration was stopped; nothing has changed."""


class _Asks:
    """Raises ``Stopped`` once its function returns true."""

    def __init__(self, stop: Callable[[], bool] | None) -> None:
        self.stop = stop

    def __call__(self) -> None:
        if self.stop is not None and self.stop():
            raise Stopped


class _Source:
    """A policy and the batches that it is offered."""

    def __init__(self, policy: Policy, loader: Loader, *, classes: bool) -> None:
        self.policy, self.loader = policy, loader
        policy.prepare(loader.size, loader.labels if classes else None, loader.duplicate_counts)
        self._probe = loader.probe()

    def items(self) -> list[Any]:
        """Return a full batch and, where an epoch has more than one, the short last one."""
        return [next(self._probe) for _ in range(2 if (self.loader.batches() or 0) > 1 else 1)]


def _time_block(
    twin: TrainingStep,
    source: _Source,
    item: Any,
    steps: int,
    samples: dict[tuple[str, str, int], list[float]],
    go_on: _Asks,
) -> None:
    """Time consecutive steps of a policy on one item, then training on the other likely numbers of rows.

    A run's steps follow one another, so they are timed one after another: the first ones only bring the caches and the
    allocator to the state that a run of this policy keeps them in. Timed straight after another policy's step, a
    gate's step was measured at 1.3 times its own.
    """
    policy, loader = source.policy, source.loader
    twin.policy = policy
    watch = _LapTimer(twin.device)
    for step in range(steps):
        go_on()
        watch.lap()
        choice = policy.choose(loader.offer(item))
        choose = watch.lap()
        batch = loader.load(item, choice)
        load = watch.lap()
        scores = policy.score(batch)
        score = watch.lap()
        policy.select(scores, batch)
        select = watch.lap()
        row_counts = _row_counts(policy.likely_rows(batch.rows), batch.rows)
        usual = row_counts[len(row_counts) // 3]
        kept = twin.head(batch, usual)
        watch.lap()
        result = twin.learn(kept)
        train = watch.lap()
        twin.report(policy, batch, kept, result)
        observe = watch.lap()
        if step < min(SETTLING, steps // 2):
            continue
        samples[policy.name, "select", batch.offered].append(choose + select)
        samples[policy.name, "score", batch.rows].append(score)
        samples[policy.name, "observe", usual].append(observe)
        if batch.rows:  # a policy may select nothing of a batch
            samples["", "load", batch.rows].append(load)
            samples["", "train", usual].append(train)
    if len(policy.likely_rows(batch.rows)) == 1:
        return
    for rows in row_counts if batch.rows else ():
        go_on()
        kept = twin.head(batch, rows)
        twin.learn(kept)
        watch.lap()
        twin.learn(kept)
        samples["", "train", rows].append(watch.lap())


def _row_counts(likely: range, rows: int) -> list[int]:
    """Return the numbers of rows to time training on: the likely ones' ends and middle, and 1 to all rows."""
    if len(likely) == 1:
        return [likely[0]]
    return sorted({1, likely[0], likely[len(likely) // 3], likely[-1], max(1, rows // 2), rows})


def _fill(twin: TrainingStep, source: _Source, go_on: _Asks) -> None:
    """Pass a policy losses for every row, as in the midst of a run, so that choosing by past losses is timed."""
    size = source.loader.size
    batch = source.loader.load(source.items()[0])
    result = twin.learn(twin.head(batch, batch.rows))
    if size is None or result is None:
        return
    losses = torch.linspace(0.0, 1.0, size, device=batch.targets.device)
    for start in range(0, size, OBSERVED):
        go_on()
        ids = torch.arange(start, min(start + OBSERVED, size), device=losses.device)
        of_rows = ids % batch.rows
        logits = pytree.tree_map_only(Tensor, operator.itemgetter(of_rows), result.logits)
        source.policy.observe(ids, losses[ids], logits)


def _warm_up(twin: TrainingStep, source: _Source, go_on: _Asks) -> None:
    """Train once on each likely number of rows, the middle ones first, for at most CALIBRATION_SECONDS.

    Libraries prepare a kernel for each new shape: a cost per process, not per step.
    """
    began = time.perf_counter()
    for item in source.items():
        batch = source.loader.load(item, source.policy.choose(source.loader.offer(item)))
        likely = source.policy.likely_rows(batch.rows)
        middle = likely[len(likely) // 3]
        for rows in sorted(likely, key=lambda rows: abs(rows - middle)):
            if _since(began) > CALIBRATION_SECONDS:
                return
            go_on()
            twin.learn(twin.head(batch, rows))


class _LapTimer:
    """Seconds between laps, each taken after the device has finished its work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last = 0.0
        self.lap()

    def lap(self) -> float:
        """Return the seconds since the last lap."""
        synchronize(self.device)
        before, self._last = self._last, time.perf_counter()
        return self._last - before


def _curve(samples: Mapping[tuple[str, str, int], list[float]], policy: str, stage: str) -> Curve:
    points = sorted(
        (rows, statistics.median(seconds)) for (*kind, rows), seconds in samples.items() if kind == [policy, stage]
    )
    return tuple(rows for rows, _ in points), tuple(seconds for _, seconds in points)


def _since(began: float) -> float:
    return time.perf_counter() - began
