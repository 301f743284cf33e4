"""Draws the figure of README and the documentation from the recorded results: a light and a dark SVG.

    python benchmarks/figure.py [--check]

Left: each method's measure minus the baseline's at equal time, with 95% intervals, over the tasks of a study.
Right: the measured speed-up of a training step over a dense one by rate and scorer, beside its bound 3/(s + 3r).
With --check nothing is drawn, and the exit code is 1 where a figure was drawn from other numbers than the records hold.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from readme import TASKS

from sparse_training.experiments.formats import STUDY as STUDY_FORMAT
from sparse_training.reporting.result import read_result

ROOT = Path(__file__).parents[1]
STUDY = "benchmarks/results/study-2026-11-29.json"
STEPS = "benchmarks/results/cpu-2026-11-29.json"
FOLDER = ROOT / "docs" / "_static"

METHODS = {  # light colour, dark colour, marker; those that a record has are drawn
    "adaptive": ("#0b6e4f", "#4fd1a5", "o"),
    "infobatch": ("#1f5fb4", "#7ab8ff", "s"),
    "dense": ("#6b7280", "#b0b7c3", "D"),
    "random": ("#6b7280", "#b0b7c3", "D"),
    "adaptive+denoise": ("#0b6e4f", "#4fd1a5", "o"),
    "adaptive+deduplicate": ("#9a6700", "#e3b341", "^"),
    "adaptive+balance": ("#c0392b", "#ff8a7a", "v"),
    "importance": ("#9a6700", "#e3b341", "^"),
    "gate": ("#c0392b", "#ff8a7a", "v"),
}
SCORERS = {
    "history": ("past losses", "#0b6e4f", "#4fd1a5", "o"),
    "proxy": ("small model", "#1f5fb4", "#7ab8ff", "s"),
    "early": ("early layer", "#9a6700", "#e3b341", "^"),
    "self": ("model itself", "#c0392b", "#ff8a7a", "v"),
}
THEMES = {  # ink, grid, background of the labels' halos; the figures themselves are transparent
    "light": ("#1f2328", "#d0d7de", "#ffffff"),
    "dark": ("#e6edf3", "#3d444d", "#0d1117"),
}
LOWEST = -2.6  # least point shown; what lies below is written beside an arrow
MARK = 5.5  # size of a mark


def plotted() -> dict[str, Any]:
    """The numbers of both panels, from the records."""
    study = read_result(ROOT / STUDY, STUDY_FORMAT)
    differences: dict[str, dict[str, list[float]]] = {}
    for row in study["table"]:
        if row["task"] in TASKS and row["arm"] in METHODS and row["difference"] is not None:
            numbers = [100 * row["difference"][name] for name in ("mean", "low", "high")]
            differences.setdefault(row["task"], {})[row["arm"]] = numbers
    steps = {}
    for row in json.loads((ROOT / STEPS).read_text())["rows"]:
        if not (match := re.fullmatch(r"step-cnn-620k-(\w+)", row["case"])):
            continue
        costs, found = [], []
        for rate in ("1.2%", "6%", "10%", "30%"):
            cost, kept = re.match(r"s ([\d.]+), ceiling [\d.]+, kept ([\d.]+)%", row["notes"][rate]).groups()
            costs.append(float(cost))
            found.append([float(kept) / 100, row["ratios"][f"dense at {rate}"]])
        steps[match[1]] = {"s": statistics.median(costs), "points": found}
    return {"baseline": study["baseline"], "differences": differences, "steps": steps}


def digest(numbers: dict[str, Any]) -> str:
    """What a figure carries, to tell whether it was drawn from these numbers."""
    rounded = json.dumps(numbers, sort_keys=True)
    return f"numbers {hashlib.sha256(rounded.encode()).hexdigest()[:16]}"


def draw_differences(axes: Any, numbers: dict[str, Any], theme: str) -> None:
    """Left panel: a dot and its interval for each task and method."""
    ink, grid, halo = THEMES[theme]
    which = 0 if theme == "light" else 1
    axes.axvline(0, color=ink, linewidth=1.2, zorder=1)
    tasks = [task for task in TASKS if task in numbers["differences"]]
    methods = [name for name in METHODS if any(name in numbers["differences"][task] for task in tasks)]
    for place, task in enumerate(tasks):
        if place % 2:
            axes.axhspan(place - 0.5, place + 0.5, color=grid, alpha=0.28, linewidth=0, zorder=0)
        for order, method in enumerate(methods):
            if (found := numbers["differences"][task].get(method)) is None:
                continue
            mean, low, high = found
            style = METHODS[method]
            y, colour = place + 0.15 * (order - (len(methods) - 1) / 2), style[which]
            if mean < LOWEST:
                axes.annotate(
                    f"{mean:.1f}".replace("-", "−"), (LOWEST, y), (LOWEST + 0.5, y), color=colour, va="center",
                    fontsize=9, fontweight="bold", arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.6},
                )  # fmt: skip
                continue
            axes.plot([max(low, LOWEST), high], [y, y], color=colour, linewidth=1.6, solid_capstyle="round", zorder=2)
            name = {"gate": "gate 10%"}.get(method, method.replace("adaptive+", "+"))
            axes.plot(mean, y, style[2], color=colour, markersize=MARK, markeredgecolor=halo, zorder=3,
                      label=name if place == 0 else None)  # fmt: skip
    ends = [end for of_task in numbers["differences"].values() for _, *interval in of_task.values() for end in interval]
    axes.set_xlim(max(LOWEST, min(ends) - 0.1), max(ends) + 0.1)
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.set_yticks(range(len(tasks)), [TASKS[task] for task in tasks])
    compared = {"random": "a random subset", "dense": "dense training"}[numbers["baseline"]]
    axes.set_xlabel(f"points above {compared}, at equal time")
    axes.set_title("What is learned in the same time", loc="left", fontsize=11, fontweight="bold", color=ink, pad=24)
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 0.995), ncol=5, frameon=False, handletextpad=0.1, columnspacing=0.9,
        fontsize=8.4, labelcolor=ink, borderaxespad=0.2,
    )  # fmt: skip


def draw_steps(axes: Any, numbers: dict[str, Any], theme: str) -> None:
    """Right panel: measured points on the curves of their bounds."""
    ink, _, halo = THEMES[theme]
    for scorer, (words, *colours, marker) in SCORERS.items():
        colour = colours[0 if theme == "light" else 1]
        steps = numbers["steps"][scorer]
        rates = [0.0078 * (0.42 / 0.0078) ** (index / 60) for index in range(61)]
        bound = [3 / (steps["s"] + 3 * rate) for rate in rates]
        axes.plot(rates, bound, color=colour, linewidth=1.4, alpha=0.75, zorder=1)
        axes.plot(*zip(*steps["points"], strict=True), marker, color=colour, markersize=MARK, markeredgecolor=halo,
                  linestyle="none", zorder=2)  # fmt: skip
        at = 0.022 if scorer == "history" else 0.0079
        y = 3 / (steps["s"] + 3 * at)
        text = f"{words}, s = {steps['s']:.1g}" if scorer != "history" else f"{words}: 1/r"
        axes.annotate(text, (at, y), (4, 7), textcoords="offset points", color=colour, fontsize=8.6, fontweight="bold")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(0.0078, 0.42)
    axes.set_ylim(1.2, 62)
    axes.minorticks_off()
    axes.set_xticks([0.01, 0.03, 0.1, 0.3], ["1%", "3%", "10%", "30%"])
    axes.set_yticks([2, 5, 10, 20, 50], ["2×", "5×", "10×", "20×", "50×"])
    axes.set_xlabel("rows kept")
    axes.set_title("How fast a step gets, by who scores", loc="left", fontsize=11, fontweight="bold", color=ink, pad=24)
    axes.text(0, 1.03, "lines: bound 3/(s + 3r); marks: measured", transform=axes.transAxes,
              fontsize=8.6, color=ink)  # fmt: skip


def draw(theme: str, numbers: dict[str, Any], path: Path) -> None:
    """One figure, transparent, its text as paths so that it looks the same everywhere."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    ink, grid, _ = THEMES[theme]
    style = {
        "svg.fonttype": "path", "svg.hashsalt": "sparse-kernels", "font.family": "DejaVu Sans", "font.size": 9.5,
        "text.color": ink, "axes.edgecolor": grid, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": grid,
        "grid.linewidth": 0.6, "axes.axisbelow": True, "savefig.transparent": True,
    }  # fmt: skip
    with plt.rc_context(style):
        figure, (left, right) = plt.subplots(
            1,
            2,
            figsize=(10.4, max(4.5, 0.62 * len(numbers["differences"]))),
            width_ratios=(1.15, 1),
            layout="constrained",
        )
        figure.get_layout_engine().set(wspace=0.08)
        draw_differences(left, numbers, theme)
        left.grid(axis="y", visible=False)
        left.tick_params(axis="y", length=0)
        draw_steps(right, numbers, theme)
        figure.savefig(path, metadata={"Date": None, "Description": digest(numbers)})
        plt.close(figure)


def main() -> int:
    """Draw both figures, or check what they were drawn from."""
    numbers = plotted()
    wrong = 0
    for theme in THEMES:
        path = FOLDER / f"overview-{theme}.svg"
        if "--check" not in sys.argv[1:]:
            draw(theme, numbers, path)
        elif not path.exists() or digest(numbers) not in path.read_text():
            print(f"{path.relative_to(ROOT)} was drawn from other numbers", file=sys.stderr)
            wrong = 1
    return wrong


if __name__ == "__main__":
    sys.exit(main())
