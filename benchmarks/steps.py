"""A training step of a policy beside a dense one, and beside its ceiling.

A dense step costs about three forward passes. Scoring with the whole model's own forward costs one of
them, s where it is cheaper or dearer than a third of the dense step, so at rate r no gate can be faster than
3/(s+3r). What is lost to small batches, packing and control is the distance from there.
"""

from __future__ import annotations

from timing import Row

from sparse_training.clock import Costs


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
