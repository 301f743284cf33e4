"""Paired tests over runs that share a seed and a test set, non-inferiority, and mean curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

Curve = tuple[np.ndarray, np.ndarray]  # time ascending, values
LEVEL = 0.05  # of a claim, two-sided; a one-sided test is at half of it


class Paired(NamedTuple):
    """Two-sided t-test of a mean difference against 0.

    A small p is evidence, a large one is none. (A rank test cannot go below p = 0.25 for 3 pairs.)
    """

    n: int  # pairs of runs
    mean: float
    deviation: float | None  # standard deviation of a difference; None for fewer than 2 pairs
    low: float | None  # 95% confidence interval of the mean
    high: float | None
    p: float | None
    error: float | None = None  # standard error of the mean
    df: float | None = None  # degrees of freedom of the error
    rows: int | None = None  # test rows whose sampling the error includes; None where it is of the seeds alone

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return self._asdict()


class NotWorse(NamedTuple):
    """One-sided test that a mean difference is above -margin, at 2.5%."""

    margin: float
    p: float  # of the hypothesis that the difference is -margin or less
    power: float  # probability that the test finds two equal methods not worse, before any adjustment

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return self._asdict()


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Paired:
    """Test the differences ours - theirs, pair by pair, by the spread of the pairs alone.

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
    n = len(differences)
    if n < 2:
        return Paired(n, float(differences.mean()), None, None, None, None)
    deviation = float(differences.std(ddof=1))
    return _tested(n, float(differences.mean()), deviation, deviation / math.sqrt(n), n - 1.0, None)


def crossed(differences: np.ndarray) -> Paired:
    """Test the mean of differences of seeds x test rows, by the sampling of both.

    Seeds and test rows are both samples, crossed with each other: x[s, i] = mean + seed + row + rest. With the mean
    squares MS of the two-way table of S seeds and N rows, the variance of the mean is estimated by

        (MS_seeds + MS_rows - MS_rest) / (S N)

    and its degrees of freedom by Satterthwaite's formula (Biometrics Bulletin 2, 1946). Seeds alone would give
    MS_seeds / (S N); one seed's rows alone give McNemar's variance, (b + c - (b - c)^2 / N) / N^2 with b and c the
    rows that one method alone has right. Where an estimate falls below that of seeds or rows alone, the larger serves.
    Simulated, 94% to 96% of such 95% intervals hold the truth with 5 seeds, 93% with 3 and 88% with 2.

    Args:
        differences: score of each test row by one method minus that by the other, [S, N], S at least 1 and N at
            least 2.

    Returns:
        The test; its interval and p are None for one seed.

    Raises:
        ValueError: another shape.
    """
    if differences.ndim != 2 or len(differences) < 1 or differences.shape[1] < 2:
        raise ValueError(f"`differences` must be [seeds, rows], at least 1 and 2, got {list(differences.shape)}")
    x = differences.astype(np.float64)
    n, rows = x.shape
    by_seed, by_row, mean = x.mean(1), x.mean(0), float(x.mean())
    if n < 2:
        return Paired(n, mean, None, None, None, None, rows=rows)
    seeds = rows * float(by_seed.var(ddof=1))
    across = n * float(by_row.var(ddof=1))
    rest = float(np.square(x - by_seed[:, None] - by_row + mean).sum()) / ((n - 1) * (rows - 1))
    total = seeds + across - rest
    squares = seeds**2 / (n - 1) + across**2 / (rows - 1) + rest**2 / ((n - 1) * (rows - 1))
    df = total**2 / squares if squares > 0.0 else n - 1.0
    if total < seeds:
        total, df = seeds, n - 1.0
    if total < across:
        total, df = across, rows - 1.0
    return _tested(n, mean, float(by_seed.std(ddof=1)), math.sqrt(total / (n * rows)), max(df, n - 1.0), rows)


def _tested(n: int, mean: float, deviation: float, error: float, df: float, rows: int | None) -> Paired:
    if error == 0.0 and mean == 0.0:
        return Paired(n, 0.0, deviation, 0.0, 0.0, 1.0, error, df, rows)
    half = float(stats.t.ppf(1.0 - LEVEL / 2, df)) * error
    p = float(2.0 * stats.t.sf(abs(mean) / error, df)) if error > 0.0 else 0.0
    return Paired(n, mean, deviation, mean - half, mean + half, p, error, df, rows)


def not_worse(test: Paired, margin: float) -> NotWorse | None:
    """Test that a difference is above -margin (non-inferiority).

    Args:
        test: the test against 0, whose error serves.
        margin: largest loss that counts as none, above 0.

    Returns:
        The test and its power, by the noncentral t distribution; None where the test has no error.
    """
    if test.error is None or test.df is None:
        return None
    if test.error == 0.0:
        return NotWorse(margin, 0.0 if test.mean > -margin else 1.0, 1.0)
    p = float(stats.t.sf((test.mean + margin) / test.error, test.df))
    critical = float(stats.t.ppf(1.0 - LEVEL / 2, test.df))
    power = float(stats.nct.sf(critical, test.df, margin / test.error))
    # scipy's tail of a large noncentrality is NaN; it is 1 there.
    return NotWorse(margin, p, 1.0 if math.isnan(power) else power)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values for the number of tests, by Holm's method (Scandinavian Journal of Statistics 6, 1979).

    None stays None and does not count.
    """
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
