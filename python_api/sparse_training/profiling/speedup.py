"""How fast a policy's step is beside a dense one, and how fast it could be at best.

A dense step costs about three forward passes. A scorer that costs s of them leaves a policy at rate r at most
3/(s+3r) times as fast: 2.3 at 10% with the whole model's own forward, 10 with a table of past losses. What is lost to
small batches, packing and control is the distance from there.
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
    """A policy's step, by the clock."""

    policy: str
    rate: float  # fraction of the batch that is kept
    scorer: str | None  # None where nothing is asked of any
    scorer_cost: float  # s, in forward passes: a third of what training on a whole batch costs
    ceiling: float  # 3 / (s + 3 rate)
    speedup: float  # measured: seconds of a dense step, loading included, over those of the policy's

    @property
    def share(self) -> float:
        """Of the ceiling that is reached."""
        return self.speedup / self.ceiling


def speedup_bound(costs: Costs, policy: Policy, *, batch_size: int, rate: float) -> SpeedupBound:
    """By measured costs, for a policy that keeps ``rate`` of batches of that size.

    What is trained beside the model is a part of s, as scoring is.
    """
    kept = batch_size if policy.masks else max(1, round(rate * batch_size))
    dense = costs.step("dense", batch_size, batch_size)
    step = costs.step(policy.name, kept if policy.before_loading else batch_size, kept, batch_size)
    s = 3.0 * (step["score"] + costs.beside(policy.name, kept)) / dense["train"]
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
    """Measures policies on the trainer's model and data, interleaved, beside dense steps.

    Args:
        trainer: stays as it is. data: as for ``fit``; its batches are of one size, but for the last.
        policies: names, policy@scorer, or policies; each is measured at each of the rates.
        seed: seed of the policies' draws.
        rounds: as for ``clock.calibrate``.
        progress: called with the share done, 0 to 1.

    Raises:
        UserError: no such policy, scorer or rate; or one that cannot score this model's batches.
    """
    loader = trainer.loader(data)
    batch_size = loader.load(next(loader.probe())).rows
    found = []
    named, wanted = list(policies), list(rates)
    for done, rate in enumerate(wanted):
        arms = [make_policy(policy, rate=rate, seed=seed, loss=trainer.criterion.loss) for policy in named]

        def tell(share: float, before: int = done) -> None:
            if progress is not None:
                progress((before + share) / len(wanted))

        costs = calibrate(trainer, loader, {arm.name: arm for arm in arms}, rounds=rounds, progress=tell)
        found += [speedup_bound(costs, arm, batch_size=batch_size, rate=rate) for arm in arms]
    return found
