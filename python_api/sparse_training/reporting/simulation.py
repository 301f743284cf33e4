"""Words, plots and page of a simulation of many ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from sparse_training.profiling.advise_result import aligned
from sparse_training.profiling.scale import METHODS, Simulated
from sparse_training.reporting.pages import render, write_page
from sparse_training.reporting.plots import svg

FILE = "simulation.json"
HEADINGS = ("method", "ranks", "table", "reduced", "rows", "imbalance", "step", "5% to 95%", "epoch", "speed-up")
_LOOKS = dict(
    zip(
        METHODS,
        (("#7f7f7f", "s"), ("#0072B2", "o"), ("#0072B2", "d"), ("#56B4E9", "X"), ("#009E73", "D"), ("#CC79A7", "v")),
        strict=True,
    )
)
LEGEND = (
    "Table: memory of a rank’s past scores. Reduced: bytes that a rank gives to a step’s collectives. Rows: mean rows "
    "that a rank trains on, and imbalance: those of the fullest rank by the mean rank’s. Step: mean time, and its "
    "spread. Speed-up: of an epoch, over dense. Balanced: a gate that keeps an exact number of rows on each rank; "
    "ranks that fill batches of their own (HistorySampler). Gradients are exchanged after the backward pass, not "
    "beside it."
)


@dataclass(frozen=True)
class Simulation:
    """Results of ``simulate``, and the settings that they are of.

    Args:
        settings: settings by name, as JSON takes them.
        results: results, of all methods for each number of samples and ranks.
    """

    settings: Mapping[str, Any]
    results: tuple[Simulated, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers, as JSON takes them."""
        return {"format": "simulation", "settings": dict(self.settings), "results": [asdict(r) for r in self.results]}

    def sections(self) -> list[tuple[str, list[tuple[str, ...]]]]:
        """A title and the cells of a table under ``HEADINGS``, for each number of samples."""
        return [
            (
                f"{samples:,} samples, {self.settings['batch_size']} rows a rank offered a step",
                [_cells(result) for result in self.results if result.samples == samples],
            )
            for samples in dict.fromkeys(result.samples for result in self.results)
        ]

    def __str__(self) -> str:
        return "\n\n".join(f"{title}\n{aligned([HEADINGS, *rows])}" for title, rows in self.sections())


def _cells(result: Simulated) -> tuple[str, ...]:
    low, _, high = (1e3 * seconds for seconds in result.spread)
    return (
        result.method,
        f"{result.ranks:,}",
        _bytes(result.table_bytes),
        _bytes(result.reduced_bytes),
        f"{result.rows:.1f}",
        f"{result.imbalance:.2f}",
        f"{1e3 * result.seconds:.4g} ms",
        f"{low:.4g} to {high:.4g}",
        _duration(result.epoch_seconds),
        f"{result.speedup:.2f}x",
    )


def _bytes(number: float) -> str:
    if not number:
        return "-"
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def write_simulation(simulation: Simulation, folder: str | Path) -> tuple[Path, Path]:
    """Write simulation.json and report.html; both are made before the first is written.

    Args:
        simulation: the simulation.
        folder: folder to write to, made if missing.

    Returns:
        The two paths.

    Raises:
        UserError: the folder cannot be written.
    """
    return write_page(folder, FILE, simulation.to_dict(), simulation_page(simulation))


def simulation_page(simulation: Simulation) -> str:
    """Render the page: one file with its style and curves inside."""
    most = max(result.samples for result in simulation.results)
    result = {"results": [asdict(one) for one in simulation.results if one.samples == most]}
    drawn = {
        "Seconds of a step, 5th to 95th percentile": _seconds,
        "Rows of the fullest rank by the mean rank’s": _imbalance,
        "Speed-up of an epoch over dense": _speedup,
        "Memory of a rank’s table": _memory,
    }
    figures = [(f"{title}; {most:,} samples", svg(draw, result)) for title, draw in drawn.items()]
    return render(
        "simulation.html.j2",
        figures=figures,
        headings=[(heading, "") for heading in HEADINGS],
        sections=simulation.sections(),
        legend=LEGEND,
        settings=[(name.replace("_", "-"), str(value)) for name, value in simulation.settings.items()],
    )


def _curves(ax: Axes, result: Mapping[str, Any], key: str, *, scale: float = 1.0, band: bool = False) -> None:
    for method, (color, marker) in _LOOKS.items():
        rows = [row for row in result["results"] if row["method"] == method and row[key]]
        ranks, values = [row["ranks"] for row in rows], [scale * row[key] for row in rows]
        ax.plot(ranks, values, marker, ls="--" if method.endswith("balanced") else "-", color=color, label=method, ms=4)
        if band:
            low, high = ([scale * row["spread"][end] for row in rows] for end in (0, 2))
            ax.fill_between(ranks, low, high, color=color, alpha=0.15, lw=0)
    ax.set_xscale("log", base=2)
    ax.set_xlabel("ranks")


def _seconds(ax: Axes, result: Mapping[str, Any]) -> None:
    _curves(ax, result, "seconds", scale=1e3, band=True)
    ax.set_ylabel("a step, ms")
    ax.set_ylim(bottom=0)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, handlelength=1.4, columnspacing=1.1)


def _imbalance(ax: Axes, result: Mapping[str, Any]) -> None:
    _curves(ax, result, "imbalance")
    ax.set_ylabel("fullest / mean")


def _speedup(ax: Axes, result: Mapping[str, Any]) -> None:
    _curves(ax, result, "speedup")
    ax.set_ylabel("dense / method")
    ax.set_ylim(bottom=0)


def _memory(ax: Axes, result: Mapping[str, Any]) -> None:
    _curves(ax, result, "table_bytes", scale=1e-6)
    ax.set_ylabel("MB a rank")
    ax.set_yscale("log")
