"""Paired tests against scipy's own, and the moment a curve reaches a value."""

import numpy as np
import pytest
from scipy import stats

from sparse_training.experiments.statistics import common_curve, holm, paired, time_to_reach


def test_the_test_is_students_over_pairs():
    ours, theirs = [0.91, 0.93, 0.90, 0.95], [0.90, 0.91, 0.91, 0.92]
    found, wanted = paired(ours, theirs), stats.ttest_rel(ours, theirs)
    assert (found.n, found.mean) == (4, pytest.approx(0.0125))
    assert found.deviation == pytest.approx(np.std(np.subtract(ours, theirs), ddof=1))
    assert found.p == pytest.approx(wanted.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(wanted.confidence_interval(0.95)))
    assert paired(theirs, ours).mean == -found.mean  # which side is ours matters


def test_what_cannot_be_said_is_none():
    assert paired([0.9], [0.8])[2:] == (None,) * 4
    assert paired([0.5, 0.6], [0.5, 0.6]) == (2, 0.0, 0.0, 0.0, 0.0, 1.0)  # equal runs are no difference
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


def test_a_value_is_reached_between_evaluations_at_the_first_or_never():
    curve = (np.array([0.25, 0.5, 0.75, 1.0]), np.array([0.2, 0.6, 0.5, 0.9]))
    assert time_to_reach([curve], 0.4) == pytest.approx(0.375)
    assert time_to_reach([curve], 0.55) == pytest.approx(0.46875)  # the first time, though it falls again
    assert time_to_reach([curve], 0.1) == 0.25
    assert time_to_reach([curve], 0.9) == 1.0
    assert time_to_reach([curve], 0.91) is None
    assert time_to_reach([], 0.5) is None
