"""Figures of a study's page, each an SVG."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from sparse_training.reporting import plots
from sparse_training.reporting.result import Result

LATE = 0.3  # fraction of a run: accuracies before it do not set the scale


def figures(result: Result) -> dict[str, Markup]:
    """Draw the figures of a study.

    Returns:
        SVGs by name: "accuracy TASK" and "differences TASK" of each task, "ladder TASK" of those with several
        budgets, "step", and "rate", "threshold" and "mass" of methods with a controller.
    """
    drawn = {}
    for name, task in result["tasks"].items():
        runs = _runs(task)
        if runs.get(result["baseline"]):
            arms = {method: {"runs": some} for method, some in runs.items() if some}
            whole = {"arms": arms, "late": LATE, "baseline": result["baseline"], "measure": task["measure"]}
            drawn[f"accuracy {name}"] = plots.svg(plots.PANELS["accuracy"], whole, 3.4)
            drawn[f"differences {name}"] = plots.svg(partial(_differences, again=result["again"]), whole, 3.4)
    for name, ladder in result["ladders"].items():
        drawn[f"ladder {name}"] = plots.svg(_ladder, ladder, 3.4)
    timed = {"calibration": result["calibration"], "speedup": {}, "arms": dict.fromkeys(result["calibration"]["arms"])}
    drawn["step"] = plots.svg(plots.PANELS["step"], timed, 0.9 + 0.36 * len(timed["arms"]))
    traced = traced_task(result)
    if traced is not None:
        gates = {
            method: {"runs": some} for method, some in _runs(result["tasks"][traced]).items() if any(_traces(some))
        }
        known = any("mass" in point for method in gates.values() for run in method["runs"] for point in run["trace"])
        for panel in ("rate", "threshold", *(["mass"] if known else [])):
            drawn[panel] = plots.svg(plots.PANELS[panel], {"arms": gates})
    return drawn


def traced_task(result: Result) -> str | None:
    """First task with a run whose controller was recorded; None for none."""
    return next((name for name, task in result["tasks"].items() if any(map(_traced, _runs(task).values()))), None)


def _runs(task: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {method: by_fraction["1"] for method, by_fraction in task["arms"].items()}


def _traces(runs: list[Any]) -> list[bool]:
    return [bool(run["trace"]) for run in runs]


def _traced(runs: list[Any]) -> bool:
    return any(_traces(runs))


def _differences(ax: Axes, result: Result, again: Mapping[str, Any] | None) -> None:
    """Each seed's difference from the baseline, in points, and their mean; the band is what chance moves a mean by."""
    looks, baseline = plots.looks(result), result["baseline"]
    base = {run["seed"]: run["accuracy"] for run in result["arms"][baseline]["runs"]}
    methods = [method for method in looks if method != baseline]
    if again is not None and again["noise"] is not None:
        ax.axvspan(-100 * again["noise"], 100 * again["noise"], color=plots.INK, alpha=0.07, lw=0)
    ax.axvline(0, color=plots.INK, lw=1)
    for row, method in enumerate(methods):
        color, marker = looks[method]
        values = np.array(
            [r["accuracy"] - base[r["seed"]] for r in result["arms"][method]["runs"] if r["seed"] in base]
        )
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
    plots.method_rows(ax, methods)
    ax.margins(x=0.12)
    ax.set_xlabel(f"points above {baseline} on test rows, seed by seed")


def _ladder(ax: Axes, ladder: Mapping[str, Any]) -> None:
    """Mean on validation rows by the budget of a run, with the time at which each method reaches X."""
    looks = plots.looks(ladder)
    for method, (color, marker) in looks.items():
        own = ladder["arms"][method]
        points = sorted((float(rung) * ladder["seconds"], 100 * value) for rung, value in own["rungs"].items())
        ax.plot(*zip(*points, strict=True), marker=marker, color=color, ms=5, lw=1.6, label=method)
        if own["time"] is not None:
            ax.plot(
                [own["time"] * ladder["seconds"]] * 2,
                [0.0, 0.05],
                color=color,
                lw=2.4,
                transform=ax.get_xaxis_transform(),
            )
    ax.axhline(100 * ladder["x"], color=plots.INK, lw=1, ls="--")
    ax.annotate(
        "X",
        (0.01, 100 * ladder["x"]),
        (0, 3),
        xycoords=ax.get_yaxis_transform(),
        textcoords="offset points",
    )
    ax.set_xlim(left=0.0)
    ax.set_xlabel("budget of a run, s (calibrated clock)")
    ax.set_ylabel("on validation rows, %")
    ax.legend(loc="center right")
