"""The figures of a study's page, each an SVG."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from sparse_training.experiments.study import BASE
from sparse_training.reporting import plots

Result = Mapping[str, Any]
LATE = 0.3  # of a run: accuracies before it do not set the scale


def figures(result: Result) -> dict[str, str]:
    """By name: each task's "accuracy TASK" and "differences TASK", "step", and a gate's "rate", "threshold", "mass"."""
    found = {}
    for name, task in result["tasks"].items():
        runs = _runs(task)
        if runs.get(BASE):
            whole = {"arms": {arm: {"runs": some} for arm, some in runs.items() if some}, "late": LATE}
            found[f"accuracy {name}"] = plots.svg(plots.PANELS["accuracy"], whole, 3.4)
            found[f"differences {name}"] = plots.svg(partial(_differences, again=result["again"]), whole, 3.4)
    timed = {"calibration": result["calibration"], "speedup": {}, "arms": dict.fromkeys(result["settings"]["arms"])}
    found["step"] = plots.svg(plots.PANELS["step"], timed, 0.9 + 0.36 * len(timed["arms"]))
    traced = traced_task(result)
    if traced is not None:
        gates = {arm: {"runs": some} for arm, some in _runs(result["tasks"][traced]).items() if any(_traces(some))}
        known = any("mass" in point for arm in gates.values() for run in arm["runs"] for point in run["trace"])
        for panel in ("rate", "threshold", *(["mass"] if known else [])):
            found[panel] = plots.svg(plots.PANELS[panel], {"arms": gates})
    return found


def traced_task(result: Result) -> str | None:
    """The first task with a run that has a controller to watch."""
    return next((name for name, task in result["tasks"].items() if any(map(_traced, _runs(task).values()))), None)


def _runs(task: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {arm: by_fraction["1"] for arm, by_fraction in task["arms"].items()}


def _traces(runs: list[Any]) -> list[bool]:
    return [bool(run["trace"]) for run in runs]


def _traced(runs: list[Any]) -> bool:
    return any(_traces(runs))


def _differences(ax: Axes, result: Result, again: Mapping[str, Any] | None) -> None:
    """Each seed's difference from random, in points, and their mean; the band is what chance alone makes of a mean."""
    looks = plots.looks(result)
    base = {run["seed"]: run["accuracy"] for run in result["arms"][BASE]["runs"]}
    arms = [arm for arm in looks if arm != BASE]
    if again is not None and again["noise"] is not None:
        ax.axvspan(-100 * again["noise"], 100 * again["noise"], color=plots.INK, alpha=0.07, lw=0)
    ax.axvline(0, color=plots.INK, lw=1)
    for row, arm in enumerate(arms):
        color, marker = looks[arm]
        values = np.array([r["accuracy"] - base[r["seed"]] for r in result["arms"][arm]["runs"] if r["seed"] in base])
        values = 100 * values[np.isfinite(values)]
        if not len(values):
            continue
        if abs(points := values.mean()) > plots.FAR:
            text, side = (f"← −{-points:.0f}", "left") if points < 0 else (f"+{points:.0f} →", "right")
            at = 0.02 if points < 0 else 0.98
            ax.text(at, row, text, color=color, va="center", ha=side, transform=ax.get_yaxis_transform())
            continue
        ax.plot(values, np.full(len(values), row), marker, color=color, ms=5, alpha=0.6, mew=0)
        ax.plot([values.mean()] * 2, [row - 0.28, row + 0.28], color=color, lw=2.4)
    plots.arm_rows(ax, arms)
    ax.margins(x=0.12)
    ax.set_xlabel(f"points of accuracy beside {BASE}, seed by seed")
