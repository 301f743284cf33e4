"""Time to X is read from runs of several budgets, each with its whole schedule, on validation rows."""

import numpy as np
import pytest

from sparse_training.experiments.design import Plan
from sparse_training.experiments.ladder import ladders, time_to
from sparse_training.experiments.study import study_design


def rungs(values, spread=(0.0,)):
    """Runs by fraction, with one seed for each of the spread."""
    return {
        f"{fraction:g}": [{"seed": seed, "validation": value + by, "accuracy": 0.1} for seed, by in enumerate(spread)]
        for fraction, value in values.items()
    }


DENSE = {0.25: 0.80, 0.5: 0.88, 1.0: 0.90}


def test_x_is_denses_best_less_the_margin_and_times_are_linear_between_rungs():
    faster = {0.25: 0.86, 0.5: 0.90, 1.0: 0.91}
    found = ladders({"dense": rungs(DENSE), "infobatch": rungs(faster)}, 40.0, 0.01)
    assert found["x"] == pytest.approx(0.89)
    dense, infobatch = found["arms"]["dense"], found["arms"]["infobatch"]
    assert dense["time"] == pytest.approx(0.75)
    assert infobatch["time"] == pytest.approx(0.25 + 0.25 * 0.03 / 0.04)
    assert infobatch["ratio"] == pytest.approx(infobatch["time"] / dense["time"])
    assert (dense["ratio"], infobatch["low"]) == (1.0, None)  # one seed has no interval


def test_the_first_rung_is_an_upper_bound_and_never_is_none():
    found = ladders(
        {"dense": rungs(DENSE), "fast": rungs({0.25: 0.95, 1.0: 0.95}), "slow": rungs({0.25: 0.1, 1.0: 0.2})}, 1.0, 0.01
    )
    assert (found["arms"]["fast"]["time"], found["arms"]["fast"]["at_most"]) == (0.25, True)
    assert (found["arms"]["slow"]["time"], found["arms"]["slow"]["ratio"]) == (None, None)


def test_denses_best_may_be_before_its_end():
    assert ladders({"dense": rungs({0.5: 0.9, 1.0: 0.89})}, 1.0, 0.005)["x"] == pytest.approx(0.895)
    assert time_to({0.5: np.array([0.9]), 1.0: np.array([0.89])}, 0.895) == 0.5


def test_the_interval_is_a_paired_bootstrap_over_seeds():
    """Seeds that shift both methods alike leave the ratio as it is: only what is not shared widens it."""
    shared = (-0.01, 0.0, 0.004, 0.01)
    faster = {0.25: 0.86, 0.5: 0.90, 1.0: 0.91}
    alike = ladders({"dense": rungs(DENSE, shared), "infobatch": rungs(faster, shared)}, 1.0, 0.01)["arms"]["infobatch"]
    assert alike["low"] == pytest.approx(alike["ratio"])
    assert alike["high"] == pytest.approx(alike["ratio"])
    apart = ladders({"dense": rungs(DENSE, shared), "infobatch": rungs(faster, shared[::-1])}, 1.0, 0.01)
    own = apart["arms"]["infobatch"]
    assert own["low"] < own["ratio"] - 0.05 < own["ratio"] + 0.05 < own["high"]


def test_one_budget_is_no_ladder_and_unfinished_seeds_are_left_out():
    assert ladders({"dense": rungs({1.0: 0.9})}, 1.0, 0.01) is None
    assert ladders({}, 1.0, 0.01) is None
    part = rungs(DENSE, (0.0, 0.0))
    part["0.5"].pop()
    assert ladders({"dense": part}, 1.0, 0.01)["seeds"] == 1


def test_a_design_says_which_methods_and_budgets_a_task_has():
    design = study_design(
        tasks=("clean", "long"), methods=("random", "gate"), seeds=(0, 1),
        plans={"long": Plan(methods=("infobatch",), fractions=(0.5,), seconds=90.0)},
    )  # fmt: skip
    cells = {(cell.task, cell.method, cell.fraction) for cell in design.cells}
    assert cells == {
        *(("clean", method, 1.0) for method in ("dense", "random", "gate")),
        *(("long", method, fraction) for method in ("dense", "infobatch") for fraction in (1.0, 0.5)),
    }
    assert len(design.cells) == 2 * len(cells)
    assert (design.plan("long").seconds, design.plan("clean").seconds) == (90.0, design.seconds)
    assert design.plan("long").batch_size == design.batch_size
