"""Paired tests against scipy's own and published values."""

import numpy as np
import pytest
from scipy import stats

from sparse_training.experiments.statistics import Paired, common_curve, crossed, holm, not_worse, paired


def test_the_test_is_students_over_pairs():
    ours, theirs = [0.91, 0.93, 0.90, 0.95], [0.90, 0.91, 0.91, 0.92]
    found, wanted = paired(ours, theirs), stats.ttest_rel(ours, theirs)
    assert (found.n, found.mean) == (4, pytest.approx(0.0125))
    assert found.deviation == pytest.approx(np.std(np.subtract(ours, theirs), ddof=1))
    assert found.p == pytest.approx(wanted.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(wanted.confidence_interval(0.95)))
    assert paired(theirs, ours).mean == -found.mean  # which side is ours matters


def test_what_cannot_be_said_is_none():
    assert paired([0.9], [0.8])[2:] == (None,) * 7
    assert paired([0.5, 0.6], [0.5, 0.6])[:6] == (2, 0.0, 0.0, 0.0, 0.0, 1.0)  # equal runs are no difference
    with pytest.raises(ValueError, match="2 values beside 1"):
        paired([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="at least one"):
        paired([], [])


@pytest.mark.filterwarnings("error")
def test_the_same_difference_in_every_pair_warns_of_nothing():
    assert paired([2.0, 3.0], [1.0, 2.0]).p in (0.0, None)


def test_holm_is_the_smallest_times_their_number_and_never_falls():
    assert holm([0.01, None, 0.04, 0.03]) == [pytest.approx(0.03), None, pytest.approx(0.06), pytest.approx(0.06)]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_bands_are_over_the_span_that_all_runs_cover():
    a = (np.array([0.0, 1, 2, 3]), np.array([0.0, 10, 20, 30]))
    b = (np.array([0.5, 2.5]), np.array([7.0, 27.0]))
    seconds, mean, _ = common_curve([a, b])
    np.testing.assert_allclose(seconds, [0.5, 1, 2, 2.5])
    np.testing.assert_allclose(mean, [6, 11, 21, 26])
    assert [len(part) for part in common_curve([])] == [0, 0, 0]


def test_one_seeds_rows_alone_give_mcnemars_variance():
    """b rows are right by one method alone, c by the other: (b + c - (b - c)^2 / N) / N^2."""
    rows, b, c = 1000, 30, 18
    one = np.zeros(rows)
    one[:b], one[b : b + c] = 1.0, -1.0
    found = crossed(np.stack([one, one]))  # the seeds agree on every row: only rows are sampled
    variance = (b + c - (b - c) ** 2 / rows) / rows**2
    assert found.error**2 == pytest.approx(variance * rows / (rows - 1))
    assert (found.n, found.rows, found.mean) == (2, rows, pytest.approx((b - c) / rows))


def test_seeds_that_shift_every_row_alike_give_students_test():
    shifts = np.array([0.01, 0.03, 0.02, -0.01])
    found, wanted = crossed(np.repeat(shifts[:, None], 50, 1)), paired(shifts, np.zeros(4))
    assert found[:6] == pytest.approx(wanted[:6])
    assert found.df == 3.0


def test_mean_squares_are_those_of_the_two_way_table():
    x = np.array([[1.0, 4.0, 3.0], [2.0, 7.0, 9.0]])
    found = crossed(x)
    by_seed, by_row = x.mean(1), x.mean(0)
    seeds, rows = 3 * by_seed.var(ddof=1), 2 * by_row.var(ddof=1)
    rest = ((x - x.mean()) ** 2).sum() - seeds - 2 * rows
    total = seeds + rows - rest / 2
    assert found.error == pytest.approx(np.sqrt(max(total, seeds, rows) / 6))


def test_95_percent_intervals_hold_the_truth_as_often_as_they_say():
    """Five seeds; seeds, rows and the rest drawn: between 92.5% and 98% of the intervals hold the mean."""
    generator = np.random.default_rng(0)
    for of_seeds in (0.0, 0.02, 0.2):
        held = 0
        for _ in range(1500):
            seed = of_seeds * generator.normal(size=(5, 1))
            row = 0.3 * generator.normal(size=(1, 200))
            found = crossed(0.1 + seed + row + 0.5 * generator.normal(size=(5, 200)))
            held += found.low <= 0.1 <= found.high
        assert 0.925 <= held / 1500 <= 0.98, of_seeds


def test_power_is_that_of_the_published_tables():
    """34 pairs find a difference of half a deviation in 80.78% of cases at 2.5% one-sided (G*Power's, for dz = 0.5)."""
    equal = Paired(34, 0.0, 1.0, None, None, None, 1.0 / 34**0.5, 33.0)
    assert not_worse(equal, 0.5).power == pytest.approx(0.8078, abs=1e-4)
    assert not_worse(equal._replace(n=33, error=33**-0.5, df=32.0), 0.5).power < 0.8


def test_not_worse_is_a_one_sided_test_at_the_margin():
    ours, theirs = np.array([0.91, 0.92, 0.905, 0.9]), np.array([0.91, 0.921, 0.903, 0.902])
    found = not_worse(paired(ours, theirs), 0.005)
    wanted = stats.ttest_1samp(ours - theirs, -0.005, alternative="greater")
    assert found.p == pytest.approx(wanted.pvalue)
    assert not_worse(paired([0.9], [0.9]), 0.005) is None
    assert not_worse(paired([0.9, 0.9], [0.9, 0.9]), 0.005) == (0.005, 0.0, 1.0)
    assert not_worse(paired([0.8, 0.7], [0.9, 0.8]), 0.005).p > 0.99


def test_tables_of_other_shapes_are_refused():
    for shape in ((3,), (0, 5), (2, 1)):
        with pytest.raises(ValueError, match=r"must be \[seeds, rows\]"):
            crossed(np.zeros(shape))
