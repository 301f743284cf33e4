"""Speed-up of a policy's step over a dense step, measured, and its bound.

A dense step costs about three forward passes. With a scorer that costs s of them, a step at rate r is at most
3/(s+3r) times as fast: 2.3 at 10% with the whole model's own forward, 10 with a table of past losses. Small batches,
packing and control cost the difference between the bound and the measured speed-up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from sparse_training.profiling.calibration import calibrate
from sparse_training.selection.policies.base import Policy
from sparse_training.selection.registry import make_policy
from sparse_training.training.clock import Costs
from sparse_training.training.step import TrainingStep


class SpeedupBound(NamedTuple):
    """Measured speed-up of a policy's step, and its bound. Recorded results hold the fields under these names.

    Attributes:
        policy: the policy's name.
        rate: fraction of the batch that is kept.
        scorer: name of its scorer; None for a policy without one.
        scorer_cost: cost s of scoring, and of training the scorer, in forward passes: thirds of the cost of training on
            a whole batch.
        ceiling: the bound, 3 / (s + 3 rate).
        speedup: seconds of a dense step, loading included, over those of the policy's step.
    """

    policy: str
    rate: float
    scorer: str | None
    scorer_cost: float
    ceiling: float
    speedup: float

    @property
    def share(self) -> float:
        """Measured speed-up as a fraction of its bound."""
        return self.speedup / self.ceiling


def speedup_bound(costs: Costs, policy: Policy, *, batch_size: int, rate: float) -> SpeedupBound:
    """Compute a policy's speed-up and its bound from measured costs.

    Args:
        costs: measured costs of the policy's steps and of dense steps.
        policy: the policy.
        batch_size: rows that the policy is offered.
        rate: fraction of them that it keeps, in (0, 1].

    Returns:
        The measured speed-up and its bound.
    """
    kept = batch_size if policy.masks else max(1, round(rate * batch_size))
    dense = costs.step("dense", batch_size, batch_size)
    step = costs.step(policy.name, kept if policy.before_loading else batch_size, kept, batch_size)
    s = 3.0 * (step["score"] + costs.observe_seconds(policy.name, kept)) / dense["train"]
    speedup = dense["total"] / step["total"]
    scorer = policy.scorer.name if policy.uses_scores else None
    trained = 1.0 if policy.masks else rate
    return SpeedupBound(policy.name, rate, scorer, s, 3.0 / (s + 3.0 * trained), speedup)


def speedup_bounds(
    trainer: TrainingStep,
    data: Iterable[Any],
    policies: Iterable[str | Policy],
    rates: Iterable[float],
    *,
    seed: int = 0,
    rounds: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[SpeedupBound]:
    """Measure policies on the trainer's model and data, interleaved with each other and with dense steps.

    Args:
        trainer: model, loss and optimizer to measure with; nothing of it changes.
        data: training data, as for ``SparseTrainer.fit``; its batches have one size, except the last.
        policies: policies, or their names, such as "gate" or "gate@early:3".
        rates: fractions of rows to keep, in (0, 1]; each policy is measured at each.
        seed: seed of the policies' draws. Default 0.
        rounds: number of timed rounds for each rate. Default: as many as ``calibrate`` takes.
        progress: called with the fraction done, in [0, 1]. Default None.

    Returns:
        The policies at the first rate, then at the second, and so on.

    Raises:
        UserError: an unknown policy or scorer, a rate out of range, or a scorer that cannot score this model's batches.
    """
    loader = trainer.loader(data)
    batch_size = loader.load(next(loader.probe())).rows
    bounds = []
    listed, all_rates = list(policies), list(rates)
    for done, rate in enumerate(all_rates):
        made = [make_policy(policy, rate=rate, seed=seed, loss=trainer.criterion) for policy in listed]

        def report_progress(fraction: float, rates_done: int = done) -> None:
            if progress is not None:
                progress((rates_done + fraction) / len(all_rates))

        by_name = {policy.name: policy for policy in made}
        costs = calibrate(trainer, loader, by_name, rounds=rounds, progress=report_progress)
        bounds += [speedup_bound(costs, policy, batch_size=batch_size, rate=rate) for policy in made]
    return bounds
