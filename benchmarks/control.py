"""How well a rate is held: ``python benchmarks/control.py [--small] [--out benchmarks/results/control-<date>.json]``.

Ours against the controllers of baselines.py, over targets, batch sizes and four signals. Errors are in percentage
points of the population (its law is known) that would be kept, before each batch; several seeds, whose batches all
controllers see. Writes the record as JSON, a figure of the same name as PNG, and prints the tables. Not a timing.

Settling: batches from the start, or from the jump, until the mean error of 25 batches stays within a point, or
within one deviation of a single batch's own rate where that is more. Overshoot: the furthest mean of 5 batches on
the other side of the target. Mean and RMS: over the second half of the signal (after the jump: of what follows).
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from baselines import Array, Package, Quantile, Standalone, Sundew, share_above

import sparse_kernels as sk
from sparse_kernels.control_law import initial_state

RESULTS = Path(__file__).parent / "results"
TARGETS = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9)
SHOWN = 0.1  # the target, and below the rows, of the curves
ROWS_SHOWN = 512
SUNDEW_ROWS = 512  # the largest batches that it is run on
POPULATION = 400  # quantiles of the law that stand for it
WINDOW = 25


class Signal(NamedTuple):
    """A law of significance over time: quantile function, scale at batch t of all, and where it jumps."""

    quantile: Callable[[Array], Array]
    scale: Callable[[float], float]  # of the share of the signal that is past
    batches: int
    jump: float = 0.0  # share of the signal


def lognormal(u: Array) -> Array:
    return torch.special.ndtri(torch.from_numpy(u)).exp().numpy()


def lomax(u: Array) -> Array:
    """A tail of x^-1.5: no variance."""
    return (1 - u) ** (-1 / 1.5) - 1


SIGNALS = {
    "stationary": Signal(lognormal, lambda _: 1.0, 300),
    "drifting": Signal(lognormal, lambda past: 0.01**past, 1000),
    "jumping": Signal(lognormal, lambda past: 1.0 if past < 0.5 else 0.1, 400, 0.5),
    "heavy-tailed": Signal(lomax, lambda _: 1.0, 300),
}


class Ours:
    """The gate's law, from the automatic start."""

    def __init__(self, target: Array) -> None:
        self.target = torch.from_numpy(target).float()
        self.state = initial_state(torch.full(target.shape, -math.inf))

    def observe(self, rows: Array, ordered: Array) -> None:
        del ordered
        seeds, targets = self.target.shape
        every = torch.from_numpy(rows).float()[:, None].expand(seeds, targets, -1).contiguous()
        sk.control(self.state, every, self.target)

    def kept(self, population: Array) -> Array:
        threshold = self.state.value("threshold").double().numpy()
        return share_above(np.broadcast_to(population, (len(threshold), population.size)), threshold)


CONTROLLERS = {
    "ours": Ours,
    "quantile": Quantile,
    "package": Package,
    "standalone": Standalone,
    "sundew": Sundew,
}


def controllers(rows: int, seeds: int) -> dict[str, Any]:
    target = np.tile(np.array(TARGETS), (seeds, 1))
    return {name: make(target) for name, make in CONTROLLERS.items() if name != "sundew" or rows <= SUNDEW_ROWS}


def follow(signal: Signal, batches: int, rows: int, sides: dict[str, Any], seeds: int) -> dict[str, Array]:
    """Errors in points, side -> [batches, seeds, targets]."""
    random = np.random.default_rng([rows, batches])
    # The finer one tells a share of 1% to a fortieth of itself; Sundew's smooth gate needs it less.
    population = signal.quantile((np.arange(10 * POPULATION) + 0.5) / (10 * POPULATION))
    sparse = signal.quantile((np.arange(POPULATION) + 0.5) / POPULATION)
    errors: dict[str, list[Array]] = {name: [] for name in sides}
    for t in range(batches):
        scale = signal.scale(t / batches)
        batch = scale * signal.quantile(random.random((seeds, rows)))
        ordered = np.sort(batch)
        for name, side in sides.items():
            kept = side.kept(scale * (sparse if name == "sundew" else population))
            errors[name].append(100 * (kept - np.array(TARGETS)))
            side.observe(batch, ordered)
    return {name: np.stack(found) for name, found in errors.items()}


def moving(errors: Array, window: int) -> Array:
    sums = np.cumsum(np.concatenate((np.zeros_like(errors[:1]), errors)), axis=0)
    return (sums[window:] - sums[:-window]) / window


def judge(errors: Array, rows: int) -> dict[str, list[float | None]]:
    """Per target: settling, overshoot, mean and RMS of errors [batches, seeds, targets] from a start or a jump."""
    targets = np.array(TARGETS)
    tolerance = np.maximum(1.0, 100 * np.sqrt(targets * (1 - targets) / rows))
    outside = np.abs(moving(errors, min(WINDOW, len(errors)))) > tolerance
    last = np.where(outside.any(0), len(outside) - np.argmax(outside[::-1], axis=0), 0)  # [seeds, targets]
    settled = np.median(np.where(last == len(outside), np.inf, last), axis=0)
    side = np.sign(errors[0])
    overshoot = np.maximum(-side * moving(errors, 5), 0).max(0).mean(0)
    steady = errors[len(errors) // 2 :]
    return {
        "settling": [None if math.isinf(x) else float(x) for x in settled],
        "overshoot": overshoot.round(3).tolist(),
        "mean": np.abs(steady.mean((0, 1))).round(3).tolist(),
        "rms": np.sqrt(np.square(steady).mean((0, 1))).round(3).tolist(),
    }


def study(small: bool) -> dict[str, Any]:
    sizes = (16, 64) if small else (16, 128, 512, 4096, 65536)
    seeds, shown = (2, 64) if small else (4, ROWS_SHOWN)
    found: list[dict[str, Any]] = []
    traces: dict[str, dict[str, list[float]]] = {}
    column = TARGETS.index(SHOWN)

    def keep_trace(name: str, errors: dict[str, Array]) -> None:
        traces[name] = {
            side: (100 * SHOWN + error[:, :, column].mean(1)).round(3).tolist() for side, error in errors.items()
        }

    for rows in sizes:
        runs = 2 if rows > 4096 else seeds  # so large a batch is hardly noisy
        for name, signal in SIGNALS.items():
            batches = 40 if small else signal.batches
            errors = follow(signal, batches, rows, controllers(rows, runs), runs)
            begin = round(signal.jump * batches)
            for side, error in errors.items():
                found.append({"signal": name, "rows": rows, "controller": side, **judge(error[begin:], rows)})
            if rows == shown:
                keep_trace(name, errors)
    # Nothing to choose from: every row is 0. Then the signal begins.
    sides = controllers(shown, seeds)
    zeros = np.zeros((seeds, shown))
    idle = 40 if small else 1000
    for _ in range(idle):
        for side in sides.values():
            side.observe(zeros, zeros)
    errors = follow(SIGNALS["stationary"], 40 if small else 300, shown, sides, seeds)
    for side, error in errors.items():
        found.append({"signal": "after zeros", "rows": shown, "controller": side, **judge(error, shown)})
    keep_trace("after zeros", errors)
    return {
        "created": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "small": small,
        "targets": list(TARGETS),
        "seeds": seeds,
        "idle": idle,
        "shown": {"rows": shown, "target": SHOWN},
        "results": found,
        "traces": traces,
    }


def table(record: dict[str, Any]) -> list[str]:
    """Markdown, a row for each signal and controller at the rows shown, then RMS against the rows of a batch."""
    shown = record["shown"]["rows"]
    count = len(record["targets"])
    lines = [
        f"| {shown} rows | controller | settled, of {count} targets | settling, batches | overshoot | mean | RMS |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["results"]:
        if row["rows"] == shown:
            settled = [x for x in row["settling"] if x is not None]
            worst = f"{max(settled):.0f}" if settled else "-"
            errors = " | ".join(f"{max(row[name]):.2f}" for name in ("overshoot", "mean", "rms"))
            lines.append(f"| {row['signal']} | {row['controller']} | {len(settled)} | {worst} | {errors} |")
    sizes = sorted({row["rows"] for row in record["results"]})
    lines += ["", f"| RMS, all targets | controller | {' | '.join(f'{size:,} rows' for size in sizes)} |"]
    lines += ["|---|---|" + "---|" * len(sizes)]
    for signal in SIGNALS:
        for controller in CONTROLLERS:
            cells = [f"{x:.2f}" if x is not None else "-" for x in (rms(record, signal, controller, n) for n in sizes)]
            lines.append(f"| {signal} | {controller} | {' | '.join(cells)} |")
    return lines


def rms(record: dict[str, Any], signal: str, controller: str, rows: int) -> float | None:
    """Over all targets."""
    for row in record["results"]:
        if (row["signal"], row["controller"], row["rows"]) == (signal, controller, rows):
            return float(np.sqrt(np.square(row["rms"]).mean()))
    return None


STYLE = {
    "ours": ("#0072B2", "o", "this gate"),
    "quantile": ("#009E73", "D", "smoothed batch quantile"),
    "package": ("#D55E00", "^", "package 1.0.1"),
    "standalone": ("#CC79A7", "v", "standalone gate"),
    "sundew": ("#E69F00", "s", "Sundew's core"),
}


def draw(record: dict[str, Any], path: Path) -> None:
    """The record as one figure. Whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure = Figure(figsize=(15, 7.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 4)
    rows, target = record["shown"]["rows"], 100 * record["shown"]["target"]
    sizes = sorted({row["rows"] for row in record["results"]})
    titles = {
        "stationary": "stationary",
        "drifting": "drifting: shrinks a hundredfold",
        "jumping": "jumping: a tenth from the middle on",
        "heavy-tailed": "heavy-tailed: no variance",
        "after zeros": f"after {record['idle']:,} batches of zeros",
    }
    for ax, (name, sides) in zip(axes.flat, record["traces"].items(), strict=False):
        ax.axhline(target, color="#1c2733", linewidth=0.8, linestyle=":")
        for side in reversed(sides):
            kept = np.maximum(sides[side], 0.1)
            ax.plot(kept, color=STYLE[side][0], linewidth=1.9 if side == "ours" else 1.1)
        ax.set(yscale="log", ylim=(0.8, 115), title=titles[name], xlabel="batch", ylabel="% of the rows kept")
        ax.yaxis.set_major_locator(FixedLocator([1, 3, 10, 30, 100]))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    by_target, by_rows, settling = axes.flat[5:]
    for side, (color, marker, label) in STYLE.items():
        style = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.9 if side == "ours" else 1.1}
        found = {row["signal"]: row for row in record["results"] if row["controller"] == side and row["rows"] == rows}
        if not found:
            continue
        x = 100 * np.array(record["targets"])
        by_target.plot(x, found["stationary"]["rms"], label=label, **style)
        settled = [found["jumping"]["settling"][k] for k in range(len(x))]
        settling.plot(x, [math.nan if y is None else max(y, 1) for y in settled], **style)
        curve = [(n, value) for n in sizes if (value := rms(record, "drifting", side, n)) is not None]
        by_rows.plot(*zip(*curve, strict=True), **style)
    for ax in (by_target, settling):
        ax.set(xscale="log", xlabel="target, %")
        ax.xaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 25, 50, 90]))
        ax.xaxis.set_minor_locator(NullLocator())
    by_rows.set(xscale="log", xlabel="rows of a batch")
    by_rows.xaxis.set_major_locator(FixedLocator(sizes))
    by_rows.xaxis.set_minor_locator(NullLocator())
    for ax in (by_target, by_rows):
        ax.set(yscale="log", ylim=(0.03, 100), ylabel="RMS error, points")
        ax.yaxis.set_major_locator(FixedLocator([0.1, 1, 10, 100]))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    for ax in (by_target, by_rows, settling):
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    by_target.set_title("steady error, stationary")
    by_rows.set_title("error while drifting, all targets")
    settling.set(title="settling after the jump (absent: never)", ylabel="batches", ylim=(0, None))
    for ax in axes.flat:
        ax.grid(alpha=0.15)
        ax.spines[["top", "right"]].set_visible(False)
        ax.title.set_fontsize(10.5)
    figure.suptitle(
        f"Holding a rate: {target:g}% in the curves, batches of {rows} where nothing else is said, "
        f"means over {record['seeds']} seeds", fontsize=13,
    )  # fmt: skip
    figure.legend(*by_target.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    figure.savefig(temporary, format="png", facecolor="white")
    os.replace(temporary, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="sizes that show nothing but that every line runs")
    parser.add_argument("--out", type=Path, help="the record; its figure stands beside it")
    options = parser.parse_args()
    record = study(options.small)
    out = options.out or RESULTS / f"control-{record['created']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record) + "\n")
    os.replace(temporary, out)
    draw(record, out.with_suffix(".png"))
    print("\n".join(table(record)))
    print(f"\n{out}\n{out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
