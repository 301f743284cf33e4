"""A training step of a policy beside a dense one, and beside its ceiling.

A dense step costs about three forward passes. Scoring with the whole model's own forward costs one of
them, s where it is cheaper or dearer than a third of the dense step, so at rate r no gate can be faster than
3/(s+3r). What is lost to small batches, packing and control is the distance from there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timing import Row, quantiles

from sparse_training.data.loader import Loader
from sparse_training.experiments.original import claim_at
from sparse_training.trainer import SparseTrainer
from sparse_training.training.clock import Costs


def step_row(case: str, costs: Costs, batch: int, rate: float, target: float) -> Row:
    """From calibrated costs of the arms ``gate``, ``random`` and ``dense``; ``target``: share of 3/(s+3r)."""
    kept = round(rate * batch)
    dense = costs.step("dense", batch, batch)
    gate, random = costs.step("gate", batch, kept), costs.step("random", kept, kept)
    s = 3.0 * gate["score"] / dense["train"]
    ceilings = {"own_ceiling": 3.0 / (s + 3.0 * rate), "ceiling": 3.0 / (1.0 + 3.0 * rate)}
    reached = dense["total"] / gate["total"]
    return Row(
        case,
        {name: {"p50": cost["total"]} for name, cost in (("ours", gate), ("dense", dense), ("random", random))},
        {
            "dense": reached,
            "share of own ceiling": reached / ceilings["own_ceiling"],
            "share of ceiling": reached / ceilings["ceiling"],
        },
        {"share of own ceiling": target},
        {
            "scorer cost s, forwards": round(s, 3),
            **{name: round(value, 3) for name, value in ceilings.items()},
            "stages, ms": {name: round(1e3 * value, 3) for name, value in gate.items()},
        },
    )


RATES = (0.012, 0.06, 0.1, 0.3)  # the first three are the original's
STEPS = 3  # of an arm in a row, the first of them not counted


def timed_arms(
    make: Callable[[str, float], SparseTrainer], loader: Loader, scorers: Iterable[str], *, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Whole steps, on the clock: a dense arm, and a gate by each scorer at each rate, a few steps of each in turn.

    Args:
        make: a trainer from policy and rate, with weights of its own. loader: of batches of one size.

    Returns:
        By arm, "dense" or "<scorer> <rate>": a number for each step counted of "step", "score", "learn" and
        "beside" in seconds, and of "kept", rows.
    """
    items = list(loader)
    trainers = {"dense": make("dense", 1.0)}
    trainers |= {f"{scorer} {rate}": make(f"gate@{scorer}", rate) for scorer in scorers for rate in RATES}
    samples: dict[str, dict[str, list[float]]] = {}
    for name, trainer in trainers.items():
        _settle(trainer, loader, items)
        samples[name] = {
            "score": _timed(trainer.policy, "score"),
            "learn": _timed(trainer, "learn"),
            "beside": _timed(trainer.policy.scorer, "learn"),
            "step": [],
            "kept": [],
        }
    for turn in range(rounds):
        for name, trainer in trainers.items():
            for step in range(STEPS):
                before = {stage: len(found) for stage, found in samples[name].items()}
                began = time.perf_counter()
                _, kept = trainer.step(trainer.policy, loader, items[(STEPS * turn + step) % len(items)])
                samples[name]["step"].append(time.perf_counter() - began)
                samples[name]["kept"].append(float(kept.rows))
                if step == 0:  # brought the caches and the allocator to where this arm keeps them
                    for stage, found in samples[name].items():
                        del found[before[stage] :]
    return samples


def _settle(trainer: SparseTrainer, loader: Loader, items: list[Any]) -> None:
    """As in the midst of a run: scorers made, a threshold found, losses on record; kernels for the usual shapes."""
    policy = trainer.policy
    trainer.check(loader.load(items[0]))
    policy.prepare(loader.size)
    assert loader.size is not None
    losses = torch.rand(loader.size, generator=torch.Generator().manual_seed(0)).log().neg()
    policy.observe(torch.arange(loader.size), losses, None)
    for item in items[:6]:
        batch = loader.load(item, policy.choose(loader.offer(item)))
        kept = policy.select(policy.score(batch), batch)
        if len(kept.targets) < loader.offer(item).ids.shape[0]:
            trainer.report(policy, batch, kept, trainer.learn(kept))


def _timed(owner: Any, method: str) -> list[float]:
    """The seconds of each call of a method of an object, from now on."""
    call, found = getattr(owner, method), []

    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            found.append(time.perf_counter() - began)

    object.__setattr__(owner, method, timed)
    return found


def scorer_row(case: str, scorer: str, samples: dict[str, dict[str, list[float]]], batch: int) -> Row:
    """A scorer at all rates: times faster than dense, and the share of 3/(s+3r) by the s and r measured."""

    def median(arm: str, stage: str) -> float:
        found = samples[arm][stage]
        return statistics.median(found) if found else 0.0

    forward = median("dense", "learn") / 3.0
    seconds = {"dense": quantiles(samples["dense"]["step"])}
    ratios, targets, notes = {}, {}, {"batch": batch, "threads": torch.get_num_threads()}
    for rate in RATES:
        arm, at = f"{scorer} {rate}", f"{100 * rate:g}%"
        s = (median(arm, "score") + median(arm, "beside")) / forward
        kept = statistics.fmean(samples[arm]["kept"]) / batch
        ceiling = 3.0 / max(s + 3.0 * kept, 1e-9)
        seconds[f"ours at {at}"] = quantiles(samples[arm]["step"])
        ratios[f"dense at {at}"] = median("dense", "step") / median(arm, "step")
        ratios[f"share of ceiling at {at}"] = ratios[f"dense at {at}"] / ceiling
        if scorer == "self":
            targets[f"share of ceiling at {at}"] = 0.9
        claim = claim_at(rate)
        claimed = f"; the original claimed {' and '.join(map(str, claim.speedups))}" if claim else ""
        notes[at] = f"s {s:.3f}, ceiling {ceiling:.2f}, kept {100 * kept:.2f}%{claimed}"
    if scorer == "history":
        targets["dense at 10%"] = 9.0
    return Row(case, seconds, ratios, targets, notes)
