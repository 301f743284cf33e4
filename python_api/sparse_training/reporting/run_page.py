"""Page of a training run: its learning curves, its rows and phases, and what the policy announced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from sparse_training.reporting.pages import PAGE, render, write_files
from sparse_training.reporting.plots import PANELS, shade_phases, svg
from sparse_training.reporting.run import evaluated_on, evaluation_names, evaluation_rows, method_name, run_lines
from sparse_training.reporting.text import facts, number, sentence

# Curves of what a policy traces, by the entry that a trace must have.
_TRACED = {
    "rate": "Rows kept in the sparse phase",
    "threshold": "Threshold",
    "mass": "Share of the gradient norm kept",
}
_PHASES = {"warmup": "dense start", "sparse": "sparse", "anneal": "dense end"}
_COLORS = {"accuracy": "#0072B2", "loss": "#D55E00"}


def write_run(result: Mapping[str, Any], folder: str | Path) -> Path:
    """Write report.html.

    Args:
        result: a run's result, as ``read_run`` gives it.
        folder: folder to write to, made if missing.

    Returns:
        The page's path.

    Raises:
        UserError: the folder cannot be written.
    """
    return write_files(folder, {PAGE: run_page(result).encode()})[0]


def run_page(result: Mapping[str, Any]) -> str:
    """Render the page: one file with its style and curves inside."""
    run, settings = result["run"], result["settings"]
    headline, *lines = run_lines(result)
    names = evaluation_names(run)
    return render(
        "run.html.j2",
        title=f"{settings.get('model', 'a model')} on {settings.get('data', 'data')}: "
        f"{method_name(result)}, seed {settings['seed']}",
        headline=headline,
        lines=lines,
        notes=run.get("notes", []),
        warnings=run["warnings"],
        figures=[(title, svg(draw, result)) for title, draw in _figures(result, names).items()],
        rows=_rows(run),
        phases=[(_PHASES.get(name, name), f"{steps:,}") for name, steps in run.get("phases", {}).items()],
        evaluated_on=evaluated_on(result),
        evaluation_headings=[(name, "") for name in ("step", "seconds", *names)],
        evaluations=evaluation_rows(run, names),
        facts=facts(result),
    )


def _rows(run: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    seen, trained = run["rows_seen"], run["rows_trained"]
    counts = {"offered": seen, "trained on": trained, "skipped": seen - trained}
    share = 100 / seen if seen else float("nan")
    return [(name, f"{count:,}", number(share * count, ".1f")) for name, count in counts.items()]


def _figures(result: Mapping[str, Any], names: list[str]) -> dict[str, Callable[[Axes, Any], None]]:
    """Function that draws each figure, by the figure's title; what was not recorded has none."""
    drawn: dict[str, Callable[[Axes, Any], None]] = {
        f"{sentence(name)} on {evaluated_on(result)}": partial(_evaluations, name=name) for name in names
    }
    trace = result["run"].get("trace", [])
    for name, title in _TRACED.items():
        if any(point.get(name) is not None for point in trace):
            drawn[title] = partial(_traced, name=name)
    return drawn


def _evaluations(ax: Axes, result: Mapping[str, Any], name: str) -> None:
    run = result["run"]
    scale, unit = (100.0, ", %") if name == "accuracy" else (1.0, "")
    points = [(one["step"], one[name]) for one in run["evals"] if isinstance(one.get(name), (int, float))]
    steps, values = np.asarray(points, dtype=np.float64).T
    ax.plot(steps, scale * values, marker="o", ms=4, lw=1.8, color=_COLORS.get(name, "#009E73"))
    if run.get("phases"):
        shade_phases(ax, [run])
    ax.margins(y=0.1)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(name + unit, parse_math=False)


def _traced(ax: Axes, result: Mapping[str, Any], name: str) -> None:
    """Draw a policy's trace as a comparison of one method and one seed does."""
    run = {"phases": {}, "target": None, **result["run"]}
    PANELS[name](ax, {"arms": {method_name(result): {"runs": [run]}}})
