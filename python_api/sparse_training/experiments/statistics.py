"""Paired tests over runs that share a seed, mean curves, and the time at which a curve reaches a value."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

Curve = tuple[np.ndarray, np.ndarray]  # time ascending, values


class Paired(NamedTuple):
    """Two-sided Student's t-test of the mean of n differences against 0.

    With 3 pairs it has 2 degrees of freedom and assumes normal differences: a small p is evidence, a large one is
    none. (A rank test cannot go below p = 0.25 for 3 pairs.)
    """

    n: int
    mean: float
    deviation: float | None  # standard deviation of a difference; None for fewer than 2 pairs
    low: float | None  # 95% confidence interval of the mean
    high: float | None
    p: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return self._asdict()


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Paired:
    """Test the differences ours - theirs, pair by pair.

    Args:
        ours: values of one method, at least one.
        theirs: values of the other, as many.

    Returns:
        The test; its deviation, interval and p are None for one pair.

    Raises:
        ValueError: not the same number of values, or none.
    """
    if len(ours) != len(theirs) or not len(ours):
        raise ValueError(
            f"`ours` and `theirs` must be pairs, at least one, got {len(ours)} values beside {len(theirs)}"
        )
    differences = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    n, mean = len(differences), float(differences.mean())
    if n < 2:
        return Paired(n, mean, None, None, None, None)
    deviation = float(differences.std(ddof=1))
    if deviation == 0.0 and mean == 0.0:
        return Paired(n, 0.0, 0.0, 0.0, 0.0, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # equal differences have no spread to divide by
        test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(0.95)
    p = float(test.pvalue)
    return Paired(n, mean, deviation, float(low), float(high), None if math.isnan(p) else p)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values for the number of tests, by Holm's method; None stays None and does not count."""
    known = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = largest
    return adjusted


def common_curve(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and standard deviation over runs that were evaluated at different times.

    The grid is the union of the times, cut to the span that every run covers: nothing is extrapolated, and no run
    drops out half way.

    Args:
        curves: (times ascending, values) of each run; runs without a point are left out.

    Returns:
        (times, mean, deviation), float64 arrays of one length, which is 0 if no span is shared. The deviation (n - 1)
        is 0 for one run.
    """
    curves = [curve for curve in curves if len(curve[0])]
    if not curves:
        return (np.empty(0),) * 3
    start, end = max(t[0] for t, _ in curves), min(t[-1] for t, _ in curves)
    grid = np.unique(np.concatenate([t for t, _ in curves]))
    grid = grid[(grid >= start) & (grid <= end)]
    values = np.stack([np.interp(grid, t, a) for t, a in curves])
    deviation = values.std(0, ddof=1) if len(curves) > 1 else np.zeros(len(grid))
    return grid, values.mean(0), deviation


def time_to_reach(curves: Sequence[Curve], value: float) -> float | None:
    """Time at which the mean of the curves first reaches a value, linear between evaluations.

    Args:
        curves: (times ascending, values) of each run.
        value: value to reach.

    Returns:
        The time; None for never. A mean that starts above the value gives the first common evaluation.
    """
    seconds, mean, _ = common_curve(curves)
    above = np.flatnonzero(mean >= value)
    if not len(above):
        return None
    i = int(above[0])
    if i == 0:
        return float(seconds[0])
    share = (value - mean[i - 1]) / (mean[i] - mean[i - 1])
    return float(seconds[i - 1] + share * (seconds[i] - seconds[i - 1]))
