"""Time to a measure on a ladder of budgets: every rung is a run of its own with its whole schedule.

X is the best mean that the baseline reaches on any rung, less a margin. A method's time to X is the smallest budget at
which the mean over its seeds reaches X, linear between rungs. All of it is read from validation rows. The interval is
a paired bootstrap over seeds (Efron and Tibshirani, 1993): each resample draws seeds with replacement, the same for
both methods, and computes X and both times again. With five seeds such intervals are rather too narrow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparse_training.experiments.design import BASELINE

RESAMPLES = 3125  # all of them for five seeds
SEED = 20_244

Rungs = Mapping[float, np.ndarray]  # values of each seed, by the fraction of the whole budget


def ladders(
    arms: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], seconds: float, margin: float
) -> dict[str, Any] | None:
    """Time each method's way to X on one task.

    Args:
        arms: runs by method and fraction, as in a study's result.
        seconds: budget of a whole run.
        margin: margin below the baseline's best, at least 0.

    Returns:
        ``x``, ``seeds``, ``seconds``, ``margin`` and, under ``arms``, each method's rungs and time; None where the
        baseline has fewer than two rungs of common seeds.
    """
    baseline = arms.get(BASELINE, {})
    seeds = _common_seeds(baseline)
    if len([runs for runs in baseline.values() if runs]) < 2 or not seeds:
        return None
    rungs = {
        method: _rungs(by_fraction, seeds)
        for method, by_fraction in arms.items()
        if sum(bool(runs) for runs in by_fraction.values()) > 1 and set(seeds) <= set(_common_seeds(by_fraction))
    }
    base = rungs[BASELINE]
    x = _best(base) - margin
    found: dict[str, Any] = {}
    for method, own in rungs.items():
        low, high = _interval(own, base, len(seeds), margin)
        found[method] = {
            "rungs": {f"{fraction:g}": float(values.mean()) for fraction, values in own.items()},
            "time": _finite(time_to(own, x)),
            "at_most": bool(min(own) == time_to(own, x)),
            "ratio": _finite(time_to(own, x) / time_to(base, x)),
            "low": _finite(low),
            "high": _finite(high),
        }
    return {"x": x, "seeds": len(seeds), "seconds": seconds, "margin": margin, "arms": found}


def time_to(rungs: Rungs, x: float, draw: Sequence[int] | None = None) -> float:
    """Smallest budget at which the mean reaches a value, linear between rungs.

    Args:
        rungs: values of each seed, by fraction.
        x: value to reach.
        draw: numbers of the seeds to average. Default: each once.

    Returns:
        A fraction of the whole budget: the first rung's for a value that is reached there; infinity for never.
    """
    fractions = sorted(rungs)
    means = [float((rungs[fraction] if draw is None else rungs[fraction][list(draw)]).mean()) for fraction in fractions]
    for place, mean in enumerate(means):
        if mean >= x:
            if place == 0:
                return fractions[0]
            share = (x - means[place - 1]) / (mean - means[place - 1])
            return fractions[place - 1] + share * (fractions[place] - fractions[place - 1])
    return math.inf


def _best(rungs: Rungs, draw: Sequence[int] | None = None) -> float:
    return max(float((values if draw is None else values[list(draw)]).mean()) for values in rungs.values())


def _interval(own: Rungs, base: Rungs, seeds: int, margin: float) -> tuple[float | None, float | None]:
    """95% interval of the ratio of times, by the bootstrap; Nones for one seed."""
    if seeds < 2:
        return None, None
    if seeds**seeds <= RESAMPLES:
        draws = list(itertools.product(range(seeds), repeat=seeds))
    else:
        generator = np.random.default_rng(SEED)
        draws = [tuple(draw) for draw in generator.integers(0, seeds, (RESAMPLES, seeds)).tolist()]
    ratios = []
    for draw in draws:
        x = _best(base, draw) - margin
        ratios.append(time_to(own, x, draw) / time_to(base, x, draw))
    low, high = np.quantile(ratios, (0.025, 0.975), method="inverted_cdf")
    return float(low), float(high)


def _common_seeds(by_fraction: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[int]:
    """Seeds that have a run on every rung."""
    sets = [{run["seed"] for run in runs} for runs in by_fraction.values()]
    return sorted(set.intersection(*sets)) if sets else []


def _rungs(by_fraction: Mapping[str, Sequence[Mapping[str, Any]]], seeds: Sequence[int]) -> dict[float, np.ndarray]:
    found = {}
    for fraction, runs in by_fraction.items():
        by_seed = {run["seed"]: run["validation"] for run in runs}
        found[float(fraction)] = np.array([by_seed[seed] for seed in seeds])
    return found


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
