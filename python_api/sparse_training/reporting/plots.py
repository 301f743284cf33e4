"""Figures of a comparison: each panel as an SVG for the page, all of them as one PNG.

Only matplotlib's object API is used, so the caller's pyplot state and style are left alone.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from sparse_training.experiments.statistics import common_curve
from sparse_training.reporting.result import Result

INK = "#1c2733"  # becomes `currentColor` in the SVGs, which so follow the page's light or dark mode
# Okabe and Ito's palette: colour-blind readers can tell it apart, and it is legible on white and on black.
_METHODS = {
    "dense": ("#7f7f7f", "s"),
    "random": ("#D55E00", "^"),
    "random-again": ("#E69F00", "P"),
    "gate": ("#0072B2", "o"),
    "adaptive": ("#009E73", "D"),
    "adaptive+denoise": ("#009E73", "D"),
    "adaptive+deduplicate": ("#CC79A7", "v"),
    "adaptive+balance": ("#9467bd", "h"),
    "adaptive+denoise+deduplicate+balance": ("#0072B2", "o"),
    "importance": ("#CC79A7", "v"),
    "infobatch": ("#56B4E9", "X"),
}
_OTHERS = (("#9467bd", "h"), ("#8c6d31", "d"), ("#17becf", "<"), ("#b5332e", ">"))
_PARTS = {"load": "#b4b9be", "score": "#CC79A7", "select": "#F0C000", "train": "#009E73"}

_RC = {
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
}

FAR = 10.0  # points of accuracy: a method that is further from the others does not set the scale


def png(result: Result, titles: Mapping[str, str]) -> bytes:
    """Draw every panel in one figure of 1800 x 1152 pixels.

    Args:
        result: a comparison.
        titles: title of each panel and, under "figure", of the whole.

    Returns:
        The PNG file's content.
    """
    with figure_style():
        figure = Figure(figsize=(12.5, 8), dpi=144, layout=ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.12))
        FigureCanvasAgg(figure)
        axes = figure.subplot_mosaic("ABC;DEF")
        for (name, draw), ax in zip(PANELS.items(), axes.values(), strict=True):
            draw(ax, result)
            title = textwrap.fill(titles[name], 36)
            pad = 26 if ax.get_legend() or ax.patches else None  # what stands above a panel is between them
            ax.set_title(title, pad=pad, parse_math=False)
        figure.suptitle(titles["figure"], x=0.012, ha="left", fontsize=13, parse_math=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def svgs(result: Result) -> dict[str, Markup]:
    """Draw each panel as an `<svg>` element for an HTML page, without title, background or URL."""
    return {name: svg(draw, result) for name, draw in PANELS.items()}


def svg(draw: Callable[[Axes, Result], None], result: Result, height: float = 3.1) -> Markup:
    """Draw one panel as an `<svg>` element, safe in a page as it is: matplotlib escapes what it writes into it.

    Args:
        draw: function that draws a result on axes.
        result: a comparison, or those parts of one that the panel shows.
        height: height in inches; the width is 4.6. Default 3.1.
    """
    with figure_style():
        figure = Figure(figsize=(4.6, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot(), result)
        buffer = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = re.sub(r"<!--.*?-->", "", buffer.getvalue(), flags=re.DOTALL)
    box, body = re.search(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>(.*)', text, re.DOTALL).groups()  # type: ignore[union-attr]
    return Markup(f"<svg {box}>{body}".replace(INK, "currentColor"))


def figure_style() -> AbstractContextManager[None]:
    """Context in which figures have the report's style."""
    return style.context(["default", _RC])


def looks(result: Result) -> dict[str, tuple[str, str]]:
    """Colour and marker of each method; known methods always have the same."""
    others = [method for method in result["arms"] if method not in _METHODS]
    spare = {method: _OTHERS[i % len(_OTHERS)] for i, method in enumerate(others)}
    return {method: _METHODS.get(method) or spare[method] for method in result["arms"]}


def _short(method: str) -> str:
    method = method.replace("adaptive+", "+")
    return method if len(method) <= 16 else f"{method[:15]}…"


def _finite(values: Any) -> np.ndarray:
    """A float64 array in which None has become NaN."""
    return np.asarray([np.nan if v is None else v for v in values], dtype=np.float64)


def _empty(ax: Axes, text: str) -> None:
    ax.set_axis_off()
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes)


# --- accuracy -----------------------------------------------------------------------------------


def _curve(run: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Seconds and accuracy (percent) of a run's evaluations, ending with the final one of the same rows."""
    points = [(e["seconds"], e["accuracy"]) for e in run["evals"] if e["seconds"] < run["seconds"]]
    points.append((run["seconds"], run.get("validation", run["accuracy"])))
    seconds, accuracy = (_finite(column) for column in zip(*points, strict=True))
    good = np.isfinite(seconds) & np.isfinite(accuracy)
    return seconds[good], 100 * accuracy[good]


def _accuracy(ax: Axes, result: Result) -> None:
    ends: list[tuple[float, float, str, str]] = []  # seconds, percent, label, colour
    for method, (color, marker) in looks(result).items():
        curves = [_curve(run) for run in result["arms"][method]["runs"]]
        seconds, mean, deviation = common_curve(curves)
        ax.plot(seconds, mean, color=color, lw=1.8)
        ax.fill_between(seconds, mean - deviation, mean + deviation, color=color, alpha=0.16, lw=0)
        if len(seconds) < 2:  # no line to see: show the points themselves
            for t, a in curves:
                ax.plot(t, a, marker, color=color, ms=4, alpha=0.6)
        final = [(t[-1], a[-1]) for t, a in curves if len(t)]
        if final:
            x, y = map(float, np.mean(final, axis=0))
            ax.plot(x, y, marker, color=color, ms=6)
            ends.append((x, y, f"{_short(method)} {y:.1f} %", color))
    if not ends:
        return _empty(ax, "no finite accuracy")
    ax.margins(y=0.1)
    low, high = ax.get_ylim()
    last = max(end[0] for end in ends)
    if (late := result.get("late")) is not None:
        # Neither a run's beginning nor a method that failed may squeeze the others into one line.
        bottom = float(np.median([end[1] for end in ends])) - FAR
        lines = [np.asarray(line.get_data(), np.float64) for line in ax.get_lines()]
        kept = [y.item() for x, line in lines if len(x) and line[-1] >= bottom for y in line[x >= late * last]]
        if kept:
            margin = 0.12 * max(max(kept) - min(kept), 1.0)
            low, high = max(low, min(kept) - margin), min(high, max(kept) + margin)
        ends = [(x, y, label if y >= low else f"{label} ↓", color) for x, y, label, color in ends]
    width = 1.28 * last  # room for the labels
    ticks = MaxNLocator(6).tick_values(0, last)
    ax.set(xlim=(0, width), ylim=(low, high), xticks=[tick for tick in ticks if tick <= last])
    ends.sort(key=lambda end: end[1])
    places = _spread([max(0.05, (end[1] - low) / (high - low)) for end in ends], 0.08)
    for place, (_, _, label, color) in zip(places, ends, strict=True):
        ax.text(
            last / width + 0.03,
            place,
            label,
            color=color,
            weight="bold",
            va="center",
            transform=ax.transAxes,
            parse_math=False,
        )
    ax.set_xlabel("training time, s (calibrated clock)")
    validated = any("validation" in run for arm in result["arms"].values() for run in arm["runs"])
    ax.set_ylabel(f"{'validation' if validated else 'test'} {result.get('measure', 'accuracy')}, %")


def _spread(places: list[float], gap: float) -> list[float]:
    """Move ascending places apart, both neighbours equally, until they are `gap` apart."""
    places = list(places)
    for _ in range(50):
        for i in range(1, len(places)):
            push = max(0.0, gap - (places[i] - places[i - 1])) / 2
            places[i - 1] -= push
            places[i] += push
    return places


def _seeds(ax: Axes, result: Result) -> None:
    methods = looks(result)
    drawn = False
    for row, (method, (color, marker)) in enumerate(methods.items()):
        values = 100 * _finite([run["accuracy"] for run in result["arms"][method]["runs"]])
        values = values[np.isfinite(values)]
        if not len(values):
            continue
        drawn = True
        mean = values.mean()
        if len(values) > 1:
            spread = values.std(ddof=1)
            ax.barh(row, 2 * spread, 0.5, left=mean - spread, color=color, alpha=0.16)
        ax.plot([mean, mean], [row - 0.25, row + 0.25], color=color, lw=2)
        ax.plot(values, np.full(len(values), row), marker, color=color, ms=5, alpha=0.75, mew=0)
    if not drawn:
        return _empty(ax, "no finite accuracy")
    method_rows(ax, list(methods))
    ax.use_sticky_edges = False
    ax.margins(x=0.1)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.set_xlabel("test accuracy at the end, %")


def method_rows(ax: Axes, methods: list[str]) -> None:
    """Make the vertical axis one row for each method, from the top."""
    ax.set_yticks(range(len(methods)), [_short(method) for method in methods])
    for label in ax.get_yticklabels():
        label.set_parse_math(False)
    ax.set_ylim(len(methods) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


# --- the gate -----------------------------------------------------------------------------------


def _traces(ax: Axes, result: Result, field: str, scale: float) -> list[np.ndarray]:
    """Draw an entry of every run's trace over steps, one thin line for each seed, and return the values drawn."""
    drawn = []
    for method, (color, _) in looks(result).items():
        for run in result["arms"][method]["runs"]:
            values = scale * _finite([point.get(field) for point in run["trace"]])
            if np.isfinite(values).any():
                drawn.append(values)
                steps = [point["step"] for point in run["trace"]]
                marker = "." if len(steps) == 1 else ""
                ax.plot(steps, values, marker=marker, color=color, lw=1.1, alpha=0.75)
    if drawn:
        shade_phases(ax, [run for method in result["arms"].values() for run in method["runs"] if run["trace"]])
        ax.set_xlabel("optimizer step")
    return drawn


def shade_phases(ax: Axes, runs: Sequence[Mapping[str, Any]]) -> None:
    """Shade the dense phases over an axis of steps, with their mean length over some runs."""
    warmup, sparse, anneal = (
        float(np.mean([run["phases"].get(name, 0) for run in runs])) for name in ("warmup", "sparse", "anneal")
    )
    end = warmup + sparse
    for name, start, stop in (("start", 0.0, warmup), ("end", end, end + anneal)):
        if stop > start:
            ax.axvspan(start, stop, color=INK, alpha=0.07, lw=0)
            # Above the shade, which may be too narrow for it, and towards the middle.
            x, side = (start, "left") if start == 0.0 else (stop, "right")
            above = ax.get_xaxis_transform()
            ax.text(x, 1.02, f"dense {name}", ha=side, va="bottom", fontsize=8, alpha=0.75, transform=above)
    ax.set_xlim(0, end + anneal)


def _rate(ax: Axes, result: Result) -> None:
    drawn = _traces(ax, result, "rate", 100)
    if not drawn:
        return _empty(ax, "no rate was recorded")
    targets = {
        100 * run["target"]
        for method in result["arms"].values()
        for run in method["runs"]
        if run["trace"] and run["target"] is not None
    }
    for target in targets:
        ax.axhline(target, color=INK, lw=1.1, ls=(0, (4, 3)), label=f"target {target:.3g} %")
    ax.set_ylim(0, 1.15 * max([*targets, *(np.nanmax(values) for values in drawn)]))
    ax.set_ylabel("rows kept, % (smoothed)")
    if targets:
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 0.98))


def _threshold(ax: Axes, result: Result) -> None:
    drawn = _traces(ax, result, "threshold", 1)
    if not drawn:
        return _empty(ax, "no threshold was recorded")
    low, high = min(map(np.nanmin, drawn)), max(map(np.nanmax, drawn))
    logarithmic = low > 0 and high / low > 10
    if logarithmic:
        ax.set_yscale("log")
    ax.set_ylabel("threshold of significance" + (" (log scale)" if logarithmic else ""))


def _mass(ax: Axes, result: Result) -> None:
    drawn = _traces(ax, result, "mass", 100)
    if not drawn:
        return _empty(ax, "no gradient-norm share was recorded")
    ax.set_ylim(0, 1.15 * max(np.nanmax(values) for values in drawn))
    ax.set_ylabel("gradient norm that they carry, %")


# --- the step -----------------------------------------------------------------------------------


def _step(ax: Axes, result: Result) -> None:
    methods = {name: parts for name, parts in result["calibration"]["arms"].items() if parts["total"]}
    if not methods:
        return _empty(ax, "no step was timed")
    longest = max(parts["total"] for parts in methods.values())
    unit, scale = ("s", 1.0) if longest >= 1 else ("ms", 1e3) if longest >= 1e-3 else ("µs", 1e6)
    left = np.zeros(len(methods))
    for part, color in _PARTS.items():
        width = scale * _finite([parts.get(part) or 0.0 for parts in methods.values()])
        ax.barh(range(len(methods)), width, 0.42, left=left, color=color, label=part)
        left += width
    dense = scale * methods["dense"]["total"] if "dense" in methods else None
    for row, (method, parts) in enumerate(methods.items()):
        speed = result["speedup"].get(method, {})
        label = f"{scale * parts['total']:.3g} {unit}"
        if speed.get("measured"):
            label += f"\n{speed['measured']:.2f}×"
        end = left[row]
        for key, name, side in (("ceiling", "bound", -1), ("own_ceiling", "own bound", 1)):
            if dense and speed.get(key):
                x = dense / speed[key]
                end = max(end, x)
                ax.plot([x, x], [row, row + 0.3 * side], color=INK, lw=1.6, solid_capstyle="butt")
                ax.text(
                    x,
                    row + 0.32 * side,
                    f" {name} {speed[key]:.2f}×",
                    va="bottom" if side < 0 else "top",
                    ha="left" if x < 0.6 * left.max() else "right",
                    fontsize=8,
                )
        ax.text(end + 0.02 * left.max(), row, label, va="center", fontsize=9)
    method_rows(ax, list(methods))
    ax.set_xlim(0, 1.22 * left.max())
    ax.set_xlabel(f"one step, {unit} (median, measured interleaved)")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, handlelength=0.9, columnspacing=1.1)


PANELS: dict[str, Callable[[Axes, Result], None]] = {
    "accuracy": _accuracy,
    "seeds": _seeds,
    "step": _step,
    "rate": _rate,
    "threshold": _threshold,
    "mass": _mass,
}
