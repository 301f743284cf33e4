"""The original system's law, and its claims beside a rate."""

import numpy as np
import pytest

from sparse_training.experiments.original import CLAIMS, claim_at
from sparse_training.selection.policies.masked import OriginalController


@pytest.mark.parametrize(("rate", "speedups"), [(0.012, (86.5,)), (0.1, (8.6, 10.4)), (0.06, (16.0,)), (0.8, None)])
def test_a_claim_is_found_by_its_rate(rate, speedups):
    claim = claim_at(rate)
    assert (claim and claim.speedups) == speedups


def test_claims_are_ones_that_can_be_printed():
    for claim in CLAIMS:
        assert claim.rate is None or 0 < claim.rate < 1
        assert claim.setting
        assert claim.basis


def test_the_law_is_the_packages():
    """By hand: 60% kept where 40% were wanted, from the threshold it starts with."""
    law = OriginalController(0.4)
    law.observe(0.6)
    assert law.rate == pytest.approx(0.42)
    assert law.threshold == pytest.approx(3.0 + 0.005 * 0.02 + 0.0001 * 0.02)
    law.observe(0.6)
    assert law.integral == pytest.approx(0.02 + 0.038)
    law.threshold = 10.0  # at its clamp the integral leaks
    law.observe(1.0)
    assert law.integral == pytest.approx(0.9 * 0.058)
    assert law.threshold == 10.0


def test_the_law_takes_arrays_as_it_takes_numbers():
    many, one = OriginalController(np.array([[0.1, 0.4]])), OriginalController(0.4)
    for kept in (0.9, 0.2, 0.5):
        many.observe(np.array([[0.1, kept]]))
        one.observe(kept)
    assert float(many.threshold[0, 1]) == float(one.threshold)


def test_it_keeps_a_tenth_and_two_at_least():
    assert [OriginalController.least(rows) for rows in (5, 20, 128)] == [2, 2, 12]
