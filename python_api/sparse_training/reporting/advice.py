"""Page of an advice: its tables, where a step's time goes, and what each method saves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from sparse_training.profiling.advise_result import HEADINGS, LEGEND, Advice
from sparse_training.profiling.advise_rows import TOP
from sparse_training.profiling.advise_steps import STAGES
from sparse_training.reporting.pages import render, write_page
from sparse_training.reporting.plots import INK, method_rows, svg

FILE = "advice.json"
_COLORS = {"load": "#b4b9be", "forward": "#56B4E9", "backward": "#009E73", "optimizer": "#E69F00"}
_CURVES = {"losses": ("#D55E00", "o"), "gradients": ("#0072B2", "s")}


def write_advice(advice: Advice, folder: str | Path) -> tuple[Path, Path]:
    """Write advice.json and report.html; both are made before the first is written.

    Args:
        advice: the advice.
        folder: folder to write to, made if missing.

    Returns:
        The two paths.

    Raises:
        UserError: the folder cannot be written.
    """
    return write_page(folder, FILE, advice.to_dict(), advice_page(advice))


def advice_page(advice: Advice) -> str:
    """Render the page: one file with its style and curves inside."""
    result = advice.to_dict()
    drawn = {"Where a step’s time goes": _step, "How much of the sum the largest rows hold": _concentration}
    if advice.methods:
        drawn["What each method saves of a run’s time"] = _savings
    return render(
        "advice.html.j2",
        advice=advice,
        figures=[(title, svg(draw, result)) for title, draw in drawn.items()],
        stages=advice.stage_rows(),
        facts=advice.fact_rows(),
        shares=advice.shares(),
        share_headings=[
            ("share of the sum in", ""),
            *((f"top {number} %", "") for number in TOP),
            ("effective", "sample size"),
        ],
        headings=[(heading, "") for heading in HEADINGS],
        methods=advice.method_rows(),
        legend=LEGEND,
    )


def _step(ax: Axes, result: Mapping[str, Any]) -> None:
    left = 0.0
    for stage in STAGES:
        width = 1e3 * result["times"][stage]
        ax.barh(0, width, 0.42, left=left, color=_COLORS[stage], label=stage)
        left += width
    ax.set_yticks([])
    ax.set_ylim(-0.6, 0.6)
    ax.set_xlabel("one step, ms")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, handlelength=0.9, columnspacing=1.1)


def _concentration(ax: Axes, result: Mapping[str, Any]) -> None:
    rows = [0, *TOP, 100]
    ax.plot(rows, rows, color=INK, lw=1, ls=(0, (4, 3)), label="all rows alike")
    for name, (color, marker) in _CURVES.items():
        if result[name] is not None:
            held = [0.0, *(100 * result[name]["top"][str(percent)] for percent in TOP), 100.0]
            label = "losses" if name == "losses" else "gradient norms"
            ax.plot(rows, held, marker, ls="-", color=color, label=label)
    ax.set_xlabel("rows, largest first, %")
    ax.set_ylabel("share of the sum, %")
    ax.legend(loc="lower right")


def _savings(ax: Axes, result: Mapping[str, Any]) -> None:
    for row, bound in enumerate(result["methods"]):
        color = "#009E73" if bound["method"] == result["method"] else "#b4b9be"
        ax.barh(row, 100 * bound["saving"], 0.42, color=color)
        ax.text(max(0.0, 100 * bound["saving"]), row, f" {100 * bound['saving']:.0f} %", va="center", fontsize=9)
    method_rows(ax, [bound["method"] for bound in result["methods"]])
    ax.axvline(0, color=INK, lw=0.8)
    ax.margins(x=0.15)
    ax.set_xlabel("time saved, % of the run")
