"""Simulation of training on more ranks and samples than are at hand, from the measured seconds of one rank's step.

A step's distribution is sampled: the rows that each rank keeps, the slowest rank, the collectives. No table of the
samples is made, so a billion of them take no more memory or time than a thousand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparse_kernels.control_law import Sums
from sparse_kernels.sum_tree import FAN
from sparse_training.arguments import check_count, check_fraction, check_number, check_positive
from sparse_training.errors import UserError
from sparse_training.profiling.scale_costs import StageCosts, curve_seconds

METHODS = ("dense", "gate", "gate-balanced", "infobatch", "infobatch-balanced", "importance")
POLICIES = {"gate-balanced": "gate", "infobatch-balanced": "infobatch"}  # of a method, where it is not its name
DRAWS, MOST_STEPS = 1 << 19, 2000  # numbers of rows drawn for a method, and steps at most
MOST_RANKS = 1 << 16
_SHARED = (16, 4)  # bytes of what every step sums beside the gradient: rows and divisor; whether a loss is not finite
_GATE = 8 * (len(Sums._fields) + 3)  # of a gate's sums; see gate.exchange
_WAITING = 16  # of the rows that wait; see samplers.infobatch.common_batch


@dataclass(frozen=True)
class Cluster:
    """Ranks and what joins them.

    Args:
        bandwidth: bytes a second that a rank sends, above 0. Default 10e9.
        latency: seconds of one message, at least 0. Default 20e-6.
        jitter: standard deviation of a rank's seconds by their mean, at least 0: what else makes ranks unequal.
            Default 0.
        cores: cores that all ranks share, for ranks of one thread on one machine. None (the default): each has its
            own.

    Raises:
        UserError: a value out of range.
    """

    bandwidth: float = 10e9
    latency: float = 20e-6
    jitter: float = 0.0
    cores: int | None = None

    def __post_init__(self) -> None:
        check_positive("bandwidth", self.bandwidth)
        for name in ("latency", "jitter"):
            check_number(name, getattr(self, name), "at least 0 and finite", lambda x: 0 <= x < math.inf)
        if self.cores is not None:
            check_count("cores", self.cores)

    def exchange_seconds(self, ranks: int, payload: int, small: Sequence[int]) -> float:
        """Seconds of the gradients' ring all-reduce, not overlapped, and of small collectives by a tree."""
        rounds = math.ceil(math.log2(ranks))
        sent = 2 * (ranks - 1) / ranks * (payload + sum(small))
        return sent / self.bandwidth + (2 * (payload > 0) + len(small)) * rounds * self.latency


@dataclass(frozen=True)
class Plan:
    """A training run.

    Args:
        samples: rows of the data set, at least one a rank.
        ranks: processes, 2 to 65536.
        batch_size: rows that each is offered a step, at least 1.
        parameters: parameters of the model, float32 gradients, at least 1.
        rate: fraction of the rows that gate and importance keep, in (0, 1]. Default 0.1.
        prune: probability of leaving out a well-learned row, for infobatch, in [0, 1). Default 0.5.
        below_mean: share of the rows whose loss is below the mean, in [0, 1]; ``advise`` measures it. Default 0.6.

    Raises:
        UserError: a value out of range.
    """

    samples: int
    ranks: int
    batch_size: int
    parameters: int
    rate: float = 0.1
    prune: float = 0.5
    below_mean: float = 0.6

    def __post_init__(self) -> None:
        for name in ("batch_size", "parameters"):
            check_count(name, getattr(self, name))
        if not 2 <= self.ranks <= MOST_RANKS:
            raise UserError(f"`ranks` must be 2 to {MOST_RANKS}, got {self.ranks}")
        if self.samples < self.ranks:
            raise UserError(f"`samples` must be at least one a rank, got {self.samples} for {self.ranks} ranks")
        check_fraction("rate", self.rate)
        check_number("prune", self.prune, "in [0, 1)", lambda x: 0 <= x < 1)
        check_number("below_mean", self.below_mean, "in [0, 1]", lambda x: 0 <= x <= 1)

    @property
    def kept(self) -> float:
        """Share of the rows that infobatch keeps."""
        return 1.0 - self.prune * self.below_mean


@dataclass(frozen=True)
class Simulated:
    """A method's steps on the ranks of a plan.

    Attributes:
        method: one of ``METHODS``.
        samples: as in the plan.
        ranks: as in the plan.
        table_bytes: memory of a rank's table of past scores.
        count_bytes: memory of the trainer's counts of how often each row was kept and scored.
        reduced_bytes: mean bytes that a rank gives to the collectives of a step: gradients and all else.
        rows: mean rows that a rank trains on, of the steps that have rows.
        imbalance: rows of the fullest rank by the mean rank's; 1 where all have as many.
        seconds: mean seconds of a step.
        spread: 5th, 50th and 95th percentile of them.
        steps: steps of an epoch.
        epoch_seconds: seconds of an epoch.
        speedup: seconds of a dense epoch by this one's.
    """

    method: str
    samples: int
    ranks: int
    table_bytes: int
    count_bytes: int
    reduced_bytes: int
    rows: float
    imbalance: float
    seconds: float
    spread: tuple[float, float, float]
    steps: int
    epoch_seconds: float
    speedup: float


def table_bytes(rows: int) -> int:
    """Memory of ``ScoreTable`` for that many rows: float32 scores and the sums of each 64."""
    found, nodes = 4 * rows, rows
    while nodes > 1 or found == 4 * rows:
        nodes = -(-nodes // FAN)
        found += 8 * nodes
    return found


def draw_rows(plan: Plan, method: str, steps: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Draw the rows that each rank trains on in consecutive steps: int64 [steps, ranks].

    Args:
        plan: the run.
        method: one of ``METHODS``.
        steps: number of steps.
        random: generator of the draws.
    """
    shape, batch = (steps, plan.ranks), plan.batch_size
    if method == "gate":
        return random.binomial(batch, plan.rate, shape)
    if method == "infobatch":
        return _common_batches(random.binomial(batch, plan.kept, shape), batch)
    every = {
        "gate-balanced": min(batch, math.ceil(plan.rate * batch)),
        "importance": max(1, round(plan.rate * batch)),
    }
    return np.full(shape, every.get(method, batch), dtype=np.int64)


def _common_batches(kept: NDArray[np.int64], batch_size: int) -> NDArray[np.int64]:
    """Rows of the steps in which ranks wait until all of them together fill a batch of each; else 0."""
    found, waiting = np.zeros_like(kept), np.zeros(kept.shape[1], dtype=np.int64)
    for step, rows in enumerate(kept):
        waiting += rows
        if waiting.min() > 0 and waiting.sum() >= batch_size * len(waiting):
            found[step], waiting = waiting, np.zeros_like(waiting)
    return found


def slowest(seconds: NDArray[np.float64], cores: int | None) -> NDArray[np.float64]:
    """Seconds until every rank is done: [steps] of [steps, ranks].

    Args:
        seconds: what each rank needs by itself.
        cores: cores that they share evenly, one a rank at most; None for one each.
    """
    if cores is None or seconds.shape[1] <= cores:
        longest: NDArray[np.float64] = seconds.max(1)
        return longest
    ordered = np.sort(seconds, axis=1)
    parts = np.diff(ordered, axis=1, prepend=0.0)  # while the shortest run, then those left
    left = np.arange(seconds.shape[1], 0, -1)
    until: NDArray[np.float64] = (parts * np.maximum(1.0, left / cores)).sum(1)
    return until


def simulate(plan: Plan, costs: StageCosts, cluster: Cluster, *, seed: int = 0) -> list[Simulated]:
    """Simulate every method on the ranks of a plan.

    Args:
        plan: the run.
        costs: seconds of a rank's step by its rows.
        cluster: what joins the ranks.
        seed: seed of the draws. Default 0.

    Returns:
        One result for each of ``METHODS``.

    Example:
        >>> costs = StageCosts.from_step(128, load=0.001, forward=0.01, backward=0.02, optimizer=0.001)
        >>> simulate(Plan(10**9, 1024, 128, 25_600_000), costs, Cluster())[3].speedup
    """
    found: list[Simulated] = []
    for method in METHODS:
        random = np.random.default_rng(seed)
        steps = min(MOST_STEPS, max(16, DRAWS // plan.ranks))
        rows = draw_rows(plan, method, steps, random)
        small, gradients = collectives(method), 4 * plan.parameters
        # Where all ranks wait for rows, they tell one another how many they have, and no more.
        busy = rows.any(1) if method == "infobatch" else np.ones(steps, dtype=bool)
        seconds = _step_seconds(plan, method, rows, costs, cluster, random) + np.where(
            busy,
            cluster.exchange_seconds(plan.ranks, gradients, small),
            cluster.exchange_seconds(plan.ranks, 0, (_WAITING,)),
        )
        full, mean = rows[rows.any(1)], float(seconds.mean())
        number = _epoch_steps(plan, method, random)
        held = -(-plan.samples // plan.ranks)
        past = method.startswith(("infobatch", "importance"))
        low, middle, high = np.quantile(seconds, (0.05, 0.5, 0.95)).tolist()
        found.append(
            Simulated(
                method, plan.samples, plan.ranks,
                table_bytes=table_bytes(held) if past else 0,
                count_bytes=held * {"dense": 0, "gate": 8, "gate-balanced": 8, "infobatch-balanced": 0}.get(method, 4),
                reduced_bytes=round(np.where(busy, gradients + sum(small), _WAITING).mean()),
                rows=float(full.mean()) if len(full) else 0.0,
                imbalance=float(full.max(1).mean() / full.mean()) if len(full) else 1.0,
                seconds=mean, spread=(low, middle, high), steps=number, epoch_seconds=number * mean,
                speedup=found[0].epoch_seconds / (number * mean) if found else 1.0,
            )
        )  # fmt: skip
    return found


def collectives(method: str) -> tuple[int, ...]:
    """Bytes that a rank gives to each small collective of a step with rows."""
    if method == "infobatch-balanced":  # a DataLoader's: DistributedDataParallel alone
        return ()
    own = {"gate": (_GATE,), "gate-balanced": (_GATE,), "infobatch": (_WAITING,)}
    return (*own.get(method, ()), *_SHARED)


def _step_seconds(
    plan: Plan, method: str, rows: NDArray[np.int64], costs: StageCosts, cluster: Cluster, random: Any
) -> NDArray[np.float64]:
    """Seconds of steps without the collectives: ranks wait for one another before training and after it."""
    scored = method.startswith("gate")
    offered = np.full(rows.shape, plan.batch_size)
    before = curve_seconds(costs.load, offered if scored else rows)
    before = before + curve_seconds(costs.select.get(POLICIES.get(method, method)), offered)
    if scored:
        before = before + curve_seconds(costs.score, offered)
    train = curve_seconds(costs.train, np.maximum(rows, 1))  # a rank without rows runs a row of zeros,
    if method == "infobatch":
        train = np.where(rows.any(1, keepdims=True), train, 0.0)  # unless none has any
    if cluster.jitter:
        sigma = math.sqrt(math.log1p(cluster.jitter**2))
        before, train = (part * random.lognormal(-0.5 * sigma**2, sigma, rows.shape) for part in (before, train))
    return slowest(before, cluster.cores) + slowest(train, cluster.cores)


def _epoch_steps(plan: Plan, method: str, random: np.random.Generator) -> int:
    """Steps of an epoch; ranks that fill batches of their own repeat rows until the fullest has none left."""
    held = -(-plan.samples // plan.ranks)
    if method == "infobatch-balanced":
        kept = int(random.binomial(held, plan.kept, plan.ranks).max())
        return max(1, -(-kept // plan.batch_size))
    return -(-held // plan.batch_size)
