"""Cost budgets: the rate of a run's sparse phase follows the operations, or seconds, that are left.

    trainer = SparseTrainer(model, policy="gate")
    trainer.fit(loader, epochs=10, cost_budget=(2e15, "flops"))

The dense phases' cost is subtracted, and the rest is spread over the sparse steps (``Budget``). Operations are counted
and seconds are the calibrated clock's, so that the total does not depend on the load of the machine.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from sparse_training.data.loader import Loader
from sparse_training.errors import UserError
from sparse_training.gate.budget import Budget
from sparse_training.selection.policies.base import Policy
from sparse_training.selection.types import Batch
from sparse_training.training.clock import Costs
from sparse_training.training.schedule import Schedule
from sparse_training.training.step import TrainingStep

UNITS = ("flops", "seconds")


class StepCosts(NamedTuple):
    """Expected costs of full batches, in the budget's unit.

    Attributes:
        dense: cost of a dense step.
        score: cost of a sparse step without the training on its rows.
        train: cost of the training on all rows in a sparse step.
    """

    dense: float
    score: float
    train: float


class BudgetController:
    """Sets the rate of a trainer's policy so that the whole run costs a given total.

    Args:
        trainer: the run's model and policy.
        schedule: the run's phases.
        loader: the training data.
        total: cost of the whole run, in ``unit``.
        unit: "flops", or "seconds" of the calibrated clock.
        steps: number of steps of the run.
        costs: costs of the calibrated clock, which "seconds" needs. Default None.

    Raises:
        UserError: an unknown unit, a policy without a rate to set, a run without sparse steps, or a total below the
            cost of the dense steps and the scoring.
    """

    def __init__(
        self,
        trainer: TrainingStep,
        schedule: Schedule,
        loader: Loader,
        *,
        total: float,
        unit: str,
        steps: int,
        costs: Costs | None = None,
    ) -> None:
        if unit not in UNITS:
            raise UserError(f"the unit of `cost_budget` must be {' or '.join(UNITS)}, got {unit!r}")
        if unit == "seconds" and costs is None:
            raise UserError("a `cost_budget` in seconds needs a calibrated clock; leave out clock= for one")
        policy = trainer.policy
        if policy.target is None or policy.masks:
            raise UserError(
                f"`cost_budget` needs a policy whose rate can be set, such as gate; {policy.name} has no such rate"
            )
        phases = [schedule.phase(step / steps) if policy.phased else "sparse" for step in range(steps)]
        sparse, self.last = phases.count("sparse"), phases.count("anneal")
        if not sparse:
            raise UserError(
                f"`cost_budget` needs sparse steps, got none in a run of {steps} steps; use a smaller dense_start or "
                "dense_end"
            )
        if costs is not None and unit == "seconds":
            step = _seconds(policy, loader, costs)
        else:
            step = _operations(trainer, loader)
        score, train = step.score, step.train
        self.total, self.unit, self.dense = total, unit, step.dense * _mean_fullness(loader)
        left = total - (steps - sparse) * self.dense
        least = 1.0 / max(_batch(loader).rows, 1)
        if left < sparse * (score + least * train):
            lowest = total - left + sparse * (score + least * train)
            raise UserError(
                f"`cost_budget` must be at least {lowest:.4g} {unit}, for {steps - sparse} dense steps and the scoring "
                f"of {sparse} sparse ones, got {total:g}"
            )
        self._spent = 0.0
        self.budget = Budget(left, unit, steps=sparse, dense=train, score=score, least=least)

    def before(self, policy: Policy, spent: float) -> None:
        """Set the policy's rate for the next sparse step.

        Args:
            policy: the policy of the sparse steps.
            spent: cost of the run so far.
        """
        self._spent = spent
        self.budget.total = self.budget.spent + self.total - spent - self.last * self.dense
        policy.set_target_rate(self.budget.rate())

    def after(self, spent: float) -> None:
        """Record the cost of the run after that step."""
        self.budget.spend(spent - self._spent)

    def warnings(self) -> list[str]:
        """Return a sentence where the total was missed by more than 2%."""
        missed = (self.budget.spent - self.budget.total) / self.total
        if abs(missed) <= 0.02:
            return []
        return [f"the run cost {missed:+.1%} more than its budget of {self.total:.4g} {self.unit}"]

    def state_dict(self) -> dict[str, Any]:
        """Return the budget's state, for a checkpoint."""
        return self.budget.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self.budget.load_state_dict(dict(state))


def _batch(loader: Loader) -> Batch:
    return loader.load(next(loader.probe()))


def _mean_fullness(loader: Loader) -> float:
    """Return the mean number of rows in a batch, over that of a full batch."""
    batches = loader.batches()
    if loader.size is None or not batches or getattr(loader, "drop_last", False):
        return 1.0
    return loader.size / batches / _batch(loader).rows


def _seconds(policy: Policy, loader: Loader, costs: Costs) -> StepCosts:
    """Return the costs in seconds of the calibrated clock."""
    rows = _batch(loader).rows
    dense = costs.step("dense", rows, rows, observer=policy.name)["total"]
    one = costs.step(policy.name, 1 if policy.before_loading else rows, 1, rows)["total"]
    whole = costs.step(policy.name, rows, rows, rows)["total"]
    return StepCosts(dense, max(0.0, one - (whole - one) / max(1, rows - 1)), whole - one)


def _operations(trainer: TrainingStep, loader: Loader) -> StepCosts:
    """Return the costs in operations, counted on a copy of the trainer."""
    twin, batch = copy.deepcopy(trainer), _batch(loader)
    twin.update.scheduler = None
    with torch.random.fork_rng(devices=[twin.device] if twin.device.type == "cuda" else []):
        twin.check(batch)
        with FlopCounterMode(display=False) as scoring:
            twin.policy.score(batch)
        kept = twin.head(batch, batch.rows)
        with FlopCounterMode(display=False) as training:
            if twin.learn(kept) is not None:
                twin.scorer.learn(kept)
    train = float(training.get_total_flops())
    return StepCosts(train, float(scoring.get_total_flops()), train)
