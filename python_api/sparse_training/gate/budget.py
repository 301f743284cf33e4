"""A budget for a run: the rate follows what is left of it."""

from __future__ import annotations

import math

from sparse_training.errors import UserError

UNITS = ("flops", "seconds", "joules")
SMOOTHING = 0.05  # of the ratio of measured to expected costs


class Budget:
    """Spreads what is left over the steps that are left, and says at what rate a step costs its share.

        budget = Budget(total=2e15, unit="flops", steps=1000, dense=4e12, score=1.3e12)
        for batch in batches:
            gate.set_target_rate(budget.rate())
            ...
            budget.spend(cost_of_that_step)

    A step at rate r is expected to cost k (score + r dense). k starts at 1 and follows the costs measured,
    so that only the ratio of ``dense`` to ``score`` must be right from the start; what a step cost more or
    less than its share is spread over all the others. The total is met, not only kept to, unless even
    ``least`` costs more (spent is then above it) or every row costs less (below). ``at_limit`` says so.

    Args:
        total: to be spent on the steps, in ``unit``: "flops", "seconds" or "joules".
        steps: gated steps of the run.
        dense: of training on every row of a batch. score: of scoring the batch.
        least: the lowest rate asked for.

    Raises:
        UserError: a setting out of range, or a total that the scoring alone exceeds.
    """

    def __init__(
        self, total: float, unit: str = "flops", *, steps: int, dense: float, score: float = 0.0, least: float = 0.01
    ) -> None:
        if unit not in UNITS:
            raise UserError(f"unit={unit!r}; wanted one of {', '.join(UNITS)}")
        for name, value in (("total", total), ("steps", steps), ("dense", dense)):
            if not 0 < value < math.inf:
                raise UserError(f"{name}={value}; wanted a number above 0")
        if not 0 <= score < math.inf:
            raise UserError(f"score={score}; wanted 0 or above")
        if not 0 < least <= 1:
            raise UserError(f"least={least}; wanted a rate above 0 and at most 1")
        if total < steps * (score + least * dense):
            raise UserError(
                f"total={total:g} {unit} for {steps} steps; wanted at least {steps * (score + least * dense):g}: "
                f"scoring, and training at a rate of {least:g}"
            )
        self.total, self.unit, self.steps = total, unit, steps
        self.dense, self.score, self.least = dense, score, least
        self.spent = 0.0
        self.steps_taken = 0
        self.cost_ratio = 1.0  # k
        self._rate = 1.0

    def wanted(self) -> float:
        """The rate at which the steps left would cost what is left; of any size and sign."""
        share = (self.total - self.spent) / max(1, self.steps - self.steps_taken)
        return (share / self.cost_ratio - self.score) / self.dense

    def at_limit(self) -> bool:
        """The total cannot be met from here, as far as the costs so far tell."""
        return not self.least <= self.wanted() <= 1.0

    def rate(self) -> float:
        """The set-point of the next step, in [least, 1]."""
        self._rate = min(1.0, max(self.least, self.wanted()))
        return self._rate

    def spend(self, cost: float, rate: float | None = None) -> None:
        """A step's measured cost, in the unit; ``rate`` is the one it had, by default the one last asked for."""
        expected = self.score + (self._rate if rate is None else rate) * self.dense
        self.spent += cost
        self.steps_taken += 1
        gain = max(SMOOTHING, 1 / (1 + self.steps_taken))
        self.cost_ratio = max(1e-6, self.cost_ratio + gain * (cost / expected - self.cost_ratio))

    def state_dict(self) -> dict[str, float]:
        """What a run that goes on needs besides the settings."""
        return {"spent": self.spent, "steps_taken": self.steps_taken, "cost_ratio": self.cost_ratio, "rate": self._rate}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Inverse of ``state_dict``."""
        self.spent, self.steps_taken = state["spent"], int(state["steps_taken"])
        self.cost_ratio, self._rate = state["cost_ratio"], state["rate"]
