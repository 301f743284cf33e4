"""A cost budget for a run: the rate follows what is left of it."""

from __future__ import annotations

import math

from sparse_training.arguments import check_choice, check_count, check_fraction, check_number, check_positive
from sparse_training.errors import UserError

UNITS = ("flops", "seconds", "joules")
SMOOTHING = 0.05  # gain of the running ratio of measured to expected costs


class Budget:
    """Spreads the rest of a cost budget over the remaining steps, and gives the rate at which a step costs its share.

    A step at rate r is expected to cost k (score + r dense). k starts at 1 and follows the measured costs, so only the
    ratio of ``dense`` to ``score`` must be right from the start. What a step costs more or less than its share is
    spread over all the others. The total is spent exactly, unless even the rate ``least`` costs more (``spent`` is then
    above it) or every row costs less (below). ``at_limit`` tells when that is to be expected.

    Args:
        total: cost to spend on the steps, in ``unit``, above 0.
        unit: "flops" (the default), "seconds" or "joules".
        steps: number of gated steps of the run, at least 1.
        dense: cost of training on every row of a batch, above 0.
        score: cost of scoring a batch, at least 0. Default 0.
        least: lowest rate to give, in (0, 1]. Default 0.01.

    Attributes:
        spent: cost so far.
        steps_taken: number of steps so far.
        cost_ratio: running ratio k of measured to expected costs.

    Raises:
        UserError: a setting is out of range, or even the lowest rate exceeds the total.

    Example:
        >>> budget = Budget(total=2e15, unit="flops", steps=1000, dense=4e12, score=1.3e12)
        >>> for batch in batches:
        ...     gate.set_target_rate(budget.rate())
        ...     budget.spend(train_step(batch))
    """

    def __init__(
        self, total: float, unit: str = "flops", *, steps: int, dense: float, score: float = 0.0, least: float = 0.01
    ) -> None:
        check_choice("unit", unit, UNITS)
        for name, value in (("total", total), ("dense", dense)):
            check_positive(name, value)
        steps, least = check_count("steps", steps), check_fraction("least", least)
        check_number("score", score, "at least 0 and finite", lambda x: 0 <= x < math.inf)
        if total < steps * (score + least * dense):
            raise UserError(
                f"`total` must be at least {steps * (score + least * dense):g} {unit}, the cost of {steps} steps of "
                f"scoring and of training at a rate of {least:g}, got {total:g}"
            )
        self.total, self.unit, self.steps = total, unit, steps
        self.dense, self.score, self.least = dense, score, least
        self.spent = 0.0
        self.steps_taken = 0
        self.cost_ratio = 1.0  # k
        self._rate = 1.0

    def unclamped_rate(self) -> float:
        """Rate at which the remaining steps would cost what is left; it may be out of [0, 1]."""
        share = (self.total - self.spent) / max(1, self.steps - self.steps_taken)
        return (share / self.cost_ratio - self.score) / self.dense

    def at_limit(self) -> bool:
        """True if the total cannot be met from here, judging by the costs so far."""
        return not self.least <= self.unclamped_rate() <= 1.0

    def rate(self) -> float:
        """Rate of the next step, in [least, 1]."""
        self._rate = min(1.0, max(self.least, self.unclamped_rate()))
        return self._rate

    def spend(self, cost: float, rate: float | None = None) -> None:
        """Enter the measured cost of a step.

        Args:
            cost: cost of the step, in ``unit``.
            rate: rate of the step; None (the default) for the one that ``rate`` returned last.

        Raises:
            UserError: the cost is not finite, or below 0.
        """
        cost = check_number("cost", cost, "at least 0 and finite", lambda x: 0 <= x < math.inf)
        expected = self.score + (self._rate if rate is None else rate) * self.dense
        self.spent += cost
        self.steps_taken += 1
        gain = max(SMOOTHING, 1 / (1 + self.steps_taken))
        self.cost_ratio = max(1e-6, self.cost_ratio + gain * (cost / expected - self.cost_ratio))

    def state_dict(self) -> dict[str, float]:
        """State of the budget, without its settings."""
        return {"spent": self.spent, "steps_taken": self.steps_taken, "cost_ratio": self.cost_ratio, "rate": self._rate}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a state of ``state_dict``."""
        self.spent, self.steps_taken = state["spent"], int(state["steps_taken"])
        self.cost_ratio, self._rate = state["cost_ratio"], state["rate"]
