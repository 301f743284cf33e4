"""The budget is met: with noise, with costs misjudged, with costs that drift; and it says where it cannot be."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from sparse_training.errors import UserError
from sparse_training.gate.budget import Budget


def simulate(budget: Budget, cost: Callable[[int, float], float]) -> list[float]:
    """The rates of a run whose step t at rate r costs cost(t, r)."""
    rates = []
    for t in range(budget.steps):
        rates.append(budget.rate())
        budget.spend(cost(t, rates[-1]))
    return rates


@pytest.mark.parametrize("unit", ["flops", "seconds", "joules"])
@pytest.mark.parametrize("share", [0.45, 0.6, 0.9])  # of what the dense steps, scored, will about cost
@pytest.mark.parametrize("misjudged", [0.8, 1.0, 1.3])
@pytest.mark.parametrize("drift", [0.8, 1.2])
def test_is_met_within_two_percent(unit: str, share: float, misjudged: float, drift: float) -> None:
    noise = random.Random(0)
    budget = Budget(share * misjudged * (1 + drift) / 2 * 400 * 1.33, unit, steps=400, dense=1.0, score=0.33)

    def cost(t: int, rate: float) -> float:
        # Noisy, a few times off on end, heavy-tailed; the rate itself is kept to within noise only.
        kept = rate * noise.gauss(1.0, 0.15)
        spike = 4.0 if noise.random() < 0.01 else 1.0
        return misjudged * drift ** (t / 400) * (0.33 + kept) * noise.lognormvariate(0.0, 0.2) * spike

    rates = simulate(budget, cost)
    assert budget.spent == pytest.approx(budget.total, rel=0.02)
    assert all(0.01 <= rate <= 1.0 for rate in rates)


def test_exact_costs_give_one_rate() -> None:
    budget = Budget(53.0, steps=100, dense=1.0, score=0.33)
    rates = simulate(budget, lambda t, rate: 0.33 + rate)
    assert rates == pytest.approx([0.2] * 100)
    assert budget.spent == pytest.approx(53.0)


def test_more_than_every_row_costs_leaves_some_and_says_so() -> None:
    budget = Budget(1000.0, steps=100, dense=1.0, score=0.33)
    assert budget.at_limit()
    assert simulate(budget, lambda t, rate: 0.33 + rate) == [1.0] * 100
    assert budget.spent == pytest.approx(133.0)


def test_overspent_runs_on_at_the_least_rate_and_says_so() -> None:
    budget = Budget(60.0, steps=100, dense=1.0, score=0.33, least=0.05)
    assert not budget.at_limit()
    for _ in range(20):
        budget.rate()
        budget.spend(4.0)
    assert budget.at_limit()
    assert budget.rate() == 0.05


def test_resumes_exactly() -> None:
    def cost(t: int, rate: float) -> float:
        return (0.3 + rate) * (1.5 + t % 7)

    whole, half = (Budget(300.0, steps=100, dense=1.0, score=0.3) for _ in range(2))
    for t in range(50):
        for budget in (whole, half):
            budget.spend(cost(t, budget.rate()))
    resumed = Budget(300.0, steps=100, dense=1.0, score=0.3)
    resumed.load_state_dict(half.state_dict())
    for t in range(50, 100):
        assert whole.rate() == resumed.rate()
        whole.spend(cost(t, whole.rate()))
        resumed.spend(cost(t, resumed.rate()))
    assert whole.spent == resumed.spent


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit": "samples"}, r"`unit` must be .*, got 'samples'"),
        ({"total": 0.0}, r"`total` must be .*, got 0.0"),
        ({"total": float("nan")}, r"`total` must be .*, got nan"),
        ({"steps": 0}, r"`steps` must be .*, got 0"),
        ({"dense": -1.0}, r"`dense` must be .*, got -1.0"),
        ({"score": -1.0}, r"`score` must be .*, got -1.0"),
        ({"least": 0.0}, r"`least` must be .*, got 0.0"),
        ({"total": 30.0}, "must be at least 34"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Budget(**{"total": 100.0, "steps": 100, "dense": 1.0, "score": 0.33, **change})
