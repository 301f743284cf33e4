"""Other ways to hold a rate, behind one small interface: the original system's three controllers, and a quantile.

Every state is an array [seeds, targets] and all of them advance side by side. ``observe`` takes a step on one
batch; ``kept`` is the share of a population that a controller would keep, decisions, probes and fallbacks
included. Two of the originals want significance in [0, 1]: they see 1 - exp(-s), which loses no row's place.
Where the original draws its decisions the expectation over the draws stands in, which is in its favour.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sparse_training.selection.policies.masked import OriginalController

Array = NDArray[np.float64]


class Controller(Protocol):
    """What the study asks of a controller."""

    def observe(self, rows: Array, ordered: Array) -> None:
        """``rows`` [seeds, rows]: one batch of each seed, which every target sees; and the same ascending."""

    def kept(self, population: Array) -> Array:
        """[seeds, targets]: the share kept of ``population``, which is sorted, [quantiles]."""


def share_above(rows: Array, threshold: Array) -> Array:
    """[seeds, targets]: the share of sorted ``rows`` [seeds, rows] above each ``threshold`` [seeds, targets]."""
    found = [np.searchsorted(row, line, side="right") for row, line in zip(rows, threshold, strict=True)]
    return 1 - np.stack(found) / rows.shape[1]


def squash(significance: Array) -> Array:
    return -np.expm1(-significance)


class Quantile:
    """The batch's own quantile, smoothed by an exponential moving average: needs every batch in order."""

    SMOOTHING = 0.1

    def __init__(self, target: Array) -> None:
        self.target = target
        self.threshold = np.full(target.shape, np.nan)

    def observe(self, rows: Array, ordered: Array) -> None:
        found = np.take_along_axis(ordered, ((1 - self.target) * (rows.shape[1] - 1)).round().astype(int), axis=1)
        first = np.isnan(self.threshold)
        self.threshold = np.where(first, found, self.threshold + self.SMOOTHING * (found - self.threshold))

    def kept(self, population: Array) -> Array:
        if np.isnan(self.threshold).any():  # nothing is left out before the first batch
            return np.ones_like(self.threshold)
        return share_above(np.broadcast_to(population, (len(self.threshold), population.size)), self.threshold)


class Package(OriginalController):
    """adaptive-sparse-training 1.0.1 (``sparse_training.original``)."""

    def __init__(self, target: Array) -> None:
        super().__init__(target, threshold=np.full(target.shape, 3.0), integral=np.zeros(target.shape))
        self.share = 0.1  # kept of a batch at least; exact once a batch was seen

    def observe(self, rows: Array, ordered: Array) -> None:  # type: ignore[override]
        size = rows.shape[1]
        self.share = self.least(size) / size
        super().observe(np.maximum(share_above(ordered, self.threshold), self.share))

    def kept(self, population: Array) -> Array:
        above = share_above(np.broadcast_to(population, (len(self.threshold), population.size)), self.threshold)
        return np.maximum(above, self.share)


class Standalone:
    """The gate of the 10-epoch run: a ramp above the threshold, a tenth of what is below, an unbounded integral."""

    def __init__(self, target: Array) -> None:
        self.target = target
        self.threshold = np.full(target.shape, 0.5)  # where it began is not known: the middle
        self.integral = np.zeros(target.shape)
        self.rates: deque[Array] = deque(maxlen=100)
        self.seen = 0

    @staticmethod
    def _rate(rows: Array, threshold: Array) -> Array:
        """Mean of min(1, (s - threshold) / 0.15 + 0.5) above the threshold and 0.1 below; sorted ``rows``, squashed."""
        found = np.empty(threshold.shape)
        for k, row in enumerate(rows):
            sums = np.concatenate(([0.0], np.cumsum(row)))
            low = np.searchsorted(row, threshold[k], side="right")
            high = np.maximum(low, np.searchsorted(row, threshold[k] + 0.075, side="right"))
            ramp = (sums[high] - sums[low] - (high - low) * threshold[k]) / 0.15 + 0.5 * (high - low)
            found[k] = (0.1 * low + ramp + (row.size - high)) / row.size
        return found

    def decide(self, significance: Array, random: np.random.Generator) -> NDArray[np.bool_]:
        """Decisions on a batch of [rows] of significance in [0, 1], of one seed and target, drawn; it then moves."""
        ramp = np.minimum(1.0, (significance - self.threshold.item()) / 0.15 + 0.5)
        kept = random.random(significance.size) < np.where(significance > self.threshold.item(), ramp, 0.1)
        self._advance(np.full(self.target.shape, kept.mean()))
        return kept

    def observe(self, rows: Array, ordered: Array) -> None:
        self._advance(self._rate(squash(ordered), self.threshold))

    def _advance(self, rate: Array) -> None:
        self.rates.append(rate)
        self.seen += 1
        if self.seen % 10 == 0:
            error = self.target - np.mean(self.rates, axis=0)
            self.integral = self.integral + error
            self.threshold = np.clip(self.threshold - (0.08 * error + 0.005 * self.integral), 0.1, 0.9)

    def kept(self, population: Array) -> Array:
        rows = np.broadcast_to(squash(population), (len(self.threshold), population.size))
        return self._rate(rows, self.threshold)


class Sundew:
    """Sundew's core, one step for every row: a sigmoid gate, a probe every 100 rows, and its energy pressure.

    Steps are slow here, and it settles within tens of them: of a batch it is shown the first rows alone.
    """

    TEMPERATURE = 0.08
    PROBE = 100
    SHOWN = 64

    def __init__(self, target: Array, seed: int = 0) -> None:
        self.target, self.rate = target, target.copy()
        self.threshold = np.full(target.shape, 0.5)  # as above
        self.integral = np.zeros(target.shape)
        self.energy = np.full(target.shape, 100.0)
        self.events = 0
        self.random = np.random.default_rng(seed)

    def observe(self, rows: Array, ordered: Array) -> None:
        self.decide(squash(rows[:, : self.SHOWN]).T[:, :, None])

    def decide(self, significance: Array) -> NDArray[np.bool_]:
        """Decisions [rows, seeds, targets] on rows one after another; ``significance`` [rows, seeds, 1], in [0, 1]."""
        # p > u, with p a sigmoid, is s - threshold > T logit(u): one draw serves every target.
        u = self.random.random(significance.shape)
        line = significance - self.TEMPERATURE * (np.log(u) - np.log1p(-u))
        spent = 0.6 + 10 * (0.8 + 0.4 * significance)
        gained = self.random.uniform(1, 3, significance.shape) - 0.5
        change, dormant = -(spent + gained), gained
        kept = np.empty((len(significance), *self.threshold.shape), dtype=bool)
        for t in range(len(significance)):
            self.events += 1
            on = (line[t] > self.threshold) if self.events % self.PROBE else np.ones(self.threshold.shape)
            kept[t] = on
            # minimum and maximum, not clip: a third of its time on arrays as small as these
            self.energy = np.minimum(np.maximum(self.energy + dormant[t] + on * change[t], 0), 100)
            self.rate = 0.9 * self.rate + 0.1 * on
            error = self.target - self.rate
            error = error * (np.abs(error) > 0.005)
            self.integral = np.minimum(np.maximum(self.integral + error, -0.5), 0.5)
            pressure = 0.04 * (1 - self.energy / 100)
            moved = self.threshold - (0.08 * error + 0.02 * self.integral) + pressure
            self.threshold = np.minimum(np.maximum(moved, 0.20), 0.92)
        return kept

    def kept(self, population: Array) -> Array:
        scaled = (squash(population) - self.threshold[..., None]) / self.TEMPERATURE
        p = (0.5 + 0.5 * np.tanh(0.5 * scaled)).mean(-1)
        return p + (1 - p) / self.PROBE
