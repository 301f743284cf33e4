"""A run of so many steps for so many operations, or seconds: the rate of its sparse phase follows what is left.

    trainer = SparseTrainer(model, policy="gate")
    trainer.fit(loader, epochs=10, cost_budget=(2e15, "flops"))

Dense phases cost what they cost; what remains is spread over the sparse steps (``Budget``). Operations are counted and
seconds are the calibrated clock's, so that the total does not hang on the machine's mood.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

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


class BudgetController:
    """Steers a trainer's policy so that a run costs a total.

    Args:
        total: of the whole run, in ``unit``: "flops" or "seconds", of the calibrated clock.
        steps: of the run. costs: the clock's, for seconds.

    Raises:
        UserError: a policy without a rate to steer, or a total that the dense phases and scoring exceed.
    """

    def __init__(
        self,
        trainer: TrainingStep,
        schedule: Schedule,
        loader: Loader,
        total: float,
        unit: str,
        *,
        steps: int,
        costs: Costs | None = None,
    ) -> None:
        if unit not in UNITS:
            raise UserError(f"within {total:g} {unit}: wanted {' or '.join(UNITS)}")
        if unit == "seconds" and costs is None:
            raise UserError(f"within {total:g} seconds: wanted a calibrated clock, or none, so that one is calibrated")
        policy = trainer.policy
        if policy.target is None or policy.masks:
            raise UserError(f"within {total:g} {unit}: wanted a policy with a rate; {policy.name} has no rate to steer")
        phases = [schedule.phase(step / steps) if policy.phased else "sparse" for step in range(steps)]
        sparse, self.last = phases.count("sparse"), phases.count("anneal")
        if not sparse:
            raise UserError(
                f"within {total:g} {unit}: wanted a shorter warm-up or anneal; no step of {steps} is sparse"
            )
        if costs is not None and unit == "seconds":
            dense, score, train = _seconds(policy, loader, costs)
        else:
            dense, score, train = _operations(trainer, loader)
        self.total, self.unit, self.dense = total, unit, dense * _fullness(loader)
        left = total - (steps - sparse) * self.dense
        least = 1.0 / max(_batch(loader).rows, 1)
        if left < sparse * (score + least * train):
            raise UserError(
                f"within {total:g} {unit}: wanted {total - left + sparse * (score + least * train):.4g} at least, for "
                f"{steps - sparse} dense steps and the scoring of {sparse}"
            )
        self._spent = 0.0
        self.budget = Budget(left, unit, steps=sparse, dense=train, score=score, least=least)

    def before(self, policy: Policy, spent: float) -> None:
        """A sparse step; ``spent`` on the run so far."""
        self._spent = spent
        self.budget.total = self.budget.spent + self.total - spent - self.last * self.dense
        policy.set_target_rate(self.budget.rate())

    def after(self, spent: float) -> None:
        """The step."""
        self.budget.spend(spent - self._spent)

    def warnings(self) -> list[str]:
        """Whether the total was missed, and why."""
        missed = (self.budget.spent - self.budget.total) / self.total
        if abs(missed) <= 0.02:
            return []
        return [f"the run took {missed:+.1%} more than the {self.total:.4g} {self.unit} that it was to take"]

    def state_dict(self) -> dict[str, Any]:
        return self.budget.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.budget.load_state_dict(dict(state))


def _batch(loader: Loader) -> Batch:
    return loader.load(next(loader.probe()))


def _fullness(loader: Loader) -> float:
    """Mean rows of a batch, over those of a full one."""
    batches = loader.batches()
    if loader.size is None or not batches or getattr(loader, "drop_last", False):
        return 1.0
    return loader.size / batches / _batch(loader).rows


def _seconds(policy: Policy, loader: Loader, costs: Costs) -> tuple[float, float, float]:
    """Of a dense step; of a sparse one without the rows it keeps; and of keeping all of them."""
    rows = _batch(loader).rows
    dense = costs.step("dense", rows, rows, observer=policy.name)["total"]
    one = costs.step(policy.name, 1 if policy.before_loading else rows, 1, rows)["total"]
    whole = costs.step(policy.name, rows, rows, rows)["total"]
    return dense, max(0.0, one - (whole - one) / max(1, rows - 1)), whole - one


def _operations(trainer: TrainingStep, loader: Loader) -> tuple[float, float, float]:
    """The same in operations, counted on a copy."""
    twin, batch = copy.deepcopy(trainer), _batch(loader)
    with torch.random.fork_rng(devices=[twin.device] if twin.device.type == "cuda" else []):
        twin.check(batch)
        with FlopCounterMode(display=False) as scoring:
            twin.policy.score(batch)
        kept = twin.head(batch, batch.rows)
        with FlopCounterMode(display=False) as training:
            if twin.learn(kept) is not None:
                twin.scorer.learn(kept)
    train = float(training.get_total_flops())
    return train, float(scoring.get_total_flops()), train
