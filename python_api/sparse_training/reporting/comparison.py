"""A comparison in words and table rows.

Everything said here follows by rules from the numbers of the result, where accuracies and rates are fractions; here
they are percent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sparse_training.reporting.result import Result
from sparse_training.reporting.text import is_finite, join, mean, number, sentence, times
from sparse_training.training.clock import STAGES

# Heading, and how the number was obtained.
COLUMNS = (
    ("method", ""),
    ("accuracy, %", "measured"),
    ("clock, s", "calibrated"),
    ("wall, s", "measured"),
    ("rows trained", "counted"),
    ("rate, %\n(target)", "counted"),
    ("step speed-up", "measured"),
    ("its bound", "computed"),
    ("steps", "counted"),
)
STEP_COLUMNS = (
    ("method", ""),
    *((stage, "measured") for stage in (*STAGES, "total")),
    ("speed-up", "measured"),
    ("bound", "computed"),
    ("own bound", "from measured s"),
)
_DENSE = {"measured": 1.0, "ceiling": 1.0}  # the speed-up of dense over itself


def verdict(result: Result) -> str:
    """Say which method is ahead, and whether by more than chance would give, in a clause without a full stop.

    A lead counts when it is larger than the deviation of the difference over seeds, sqrt(a^2 + b^2) for methods with
    deviations a and b.
    """
    entries = result["arms"]
    means = {name: entry["summary"]["accuracy_mean"] for name, entry in entries.items()}
    ranked = [name for name in means if is_finite(means[name])]
    if not ranked:
        return "no method has a finite accuracy"
    if len(ranked) < 2:
        return f"there is nothing to compare {ranked[0]} with"
    best = max(ranked, key=lambda name: means[name])
    if _seeds(result) < 2:
        return f"{best} is highest; one seed says nothing about the deviation"
    clear: list[str] = []
    close: list[str] = []
    for name in ranked:
        if name != best:
            lead = 100 * (means[best] - means[name])
            larger = lead > math.hypot(_deviation(entries[best]), _deviation(entries[name]))
            (clear if larger else close).append(f"{name} ({lead:.2g} points)")
    if not close:
        return f"{best} is best; its lead over {join(clear)} is larger than the deviation"
    if not clear:
        return f"{best} is highest; its lead over {join(close)} is not larger than the deviation"
    return f"{best} is highest; its lead over {join(clear)} is larger than the deviation, over {join(close)} it is not"


def headline(result: Result) -> str:
    """State the result in one sentence, every method with its accuracy."""
    entries = result["arms"]
    seconds = {name: entry["summary"]["seconds_mean"] for name, entry in entries.items()}
    longest = max(seconds.values())
    if len(entries) < 2:
        time = f"In {longest:.3g} s"
    elif min(seconds.values()) >= 0.95 * longest:
        time = f"At equal time ({longest:.3g} s)"
    else:
        time = f"At unequal time ({join([f'{name} {s:.3g} s' for name, s in seconds.items()])})"
    scores = join(
        [
            f"{name} reached {_accuracy(entry)} %"
            if is_finite(entry["summary"]["accuracy_mean"])
            else f"{name} reached no finite accuracy"
            for name, entry in entries.items()
        ]
    )
    seeds = _seeds(result)
    over = f" (mean ± standard deviation over {seeds} seeds)" if seeds > 1 else " (one seed)"
    return f"{time}, {scores}{over}: {verdict(result)}."


def findings(result: Result) -> list[str]:
    """Further findings, a sentence each: rates against their targets, speed-ups, too few seeds."""
    sentences = []
    for name, entry in result["arms"].items():
        rate, target = entry["summary"]["rate_mean"], _target(entry)
        if rate is not None and target is not None:
            met = "met within" if abs(rate - target) <= 0.01 else "missed by more than"
            sentences.append(
                f"{name} trained on {100 * rate:.1f} % of the rows offered in its sparse phase "
                f"(counted); its target of {100 * target:.3g} % was {met} 1 point."
            )
    for name, speed in result["speedup"].items():
        if speed.get("measured"):
            sentences.append(
                f"A step of {name} is {speed['measured']:.2f} times as fast as a dense one "
                f"(measured); its speed-up bound is {number(speed.get('ceiling'), '.2f')}."
            )
    if 1 < _seeds(result) < 3:
        sentences.append("Fewer than 3 seeds were run: the deviation is itself uncertain.")
    return sentences


def titles(result: Result) -> dict[str, str]:
    """Title of each panel of the figure: what it shows, as a sentence."""
    settings, entries = result["settings"], result["arms"]
    runs = [run for entry in entries.values() for run in entry["runs"] if run["trace"]]
    ends = [run["trace"][-1]["threshold"] for run in runs]
    starts = [run["trace"][0]["threshold"] for run in runs]
    norms = {
        name: [norm for run in entry["runs"] for point in run["trace"] if is_finite(norm := point.get("mass"))]
        for name, entry in entries.items()
    }
    carried = [
        f"{name}'s rows carry {100 * mean(some):.0f} % of the gradient norm" for name, some in norms.items() if some
    ]
    gated = [
        f"{name} keeps {number(entry['summary']['rate_mean'], '.1f', 100)} % of rows, "
        f"target {number(_target(entry), '.3g', 100)} %"
        for name, entry in entries.items()
        if any(run["trace"] for run in entry["runs"]) and is_finite(entry["summary"]["rate_mean"])
    ]
    speeds = [f"{name} {speed['measured']:.2f}×" for name, speed in result["speedup"].items() if speed.get("measured")]
    validated = any("validation" in run for entry in entries.values() for run in entry["runs"])
    by_panel = {
        "figure": f"{settings['model']} on {settings['data']}, seeds per method: {_seeds(result)}",
        # The verdict is on test rows, which the curves may not be of.
        "accuracy": "Accuracy on validation rows" if validated else sentence(verdict(result)),
        "seeds": f"On test rows {verdict(result)}" if validated else "Each seed's final accuracy",
        "rate": sentence("; ".join(gated)) or "Rows kept, by step",
        "threshold": (
            f"The threshold goes from {mean(starts):.2g} to {mean(ends):.2g}"
            if runs and all(map(is_finite, starts + ends))
            else "Threshold, by step"
        ),
        "mass": sentence("; ".join(carried)) or "Share of the gradient norm that they carry, by step",
        "step": f"Step speed-up, measured: {', '.join(speeds)}" if speeds else "Time of a step",
    }
    return {name: title.replace(" %", "\xa0%") for name, title in by_panel.items()}


def table_rows(result: Result) -> list[tuple[str, ...]]:
    """Cells of the table, a row for each method under ``COLUMNS``; means over seeds."""
    rows: list[tuple[str, ...]] = []
    for name, entry in result["arms"].items():
        summary, target = entry["summary"], _target(entry)
        speed = _DENSE if name == "dense" else result["speedup"].get(name, {})
        rate = number(summary["rate_mean"], ".1f", 100)
        rows.append(
            (
                name,
                _accuracy(entry),
                number(summary["seconds_mean"], ".1f"),
                number(summary["raw_seconds_mean"], ".1f"),
                number(summary["rows_trained_mean"], ",.0f"),
                rate if target is None else f"{rate} ({100 * target:.3g})",
                times(speed.get("measured")),
                times(speed.get("ceiling")),
                number(mean([run["steps"] for run in entry["runs"]]), ",.0f"),
            )
        )
    return rows


def step_rows(result: Result) -> list[tuple[str, ...]]:
    """Cells of the table of a step, a row for each method under ``STEP_COLUMNS``; times in milliseconds."""
    rows = []
    for name, stages in result["calibration"]["arms"].items():
        speed = _DENSE if name == "dense" else result["speedup"].get(name, {})
        milliseconds = (number(stages.get(stage), ".3f", 1e3) for stage in (*STAGES, "total"))
        ratios = (times(speed.get(key)) for key in ("measured", "ceiling", "own_ceiling"))
        rows.append((name, *milliseconds, *ratios))
    return rows


def notes(result: Result) -> list[str]:
    """Lines below the table: the cost of scoring, and the backends that ran."""
    lines = []
    for name, speed in result["speedup"].items():
        own = speed.get("own_ceiling")
        if own:
            reached = number(speed.get("measured"), ".0f", 100 / own)
            lines.append(
                f"{name}: scoring costs s = {speed['scorer_cost']:.2f} of a full forward pass; "
                f"its own bound 3/(s+3r) = {own:.2f}×, of which {reached} % is reached"
            )
    backends = result["environment"].get("backends") or {}
    ran = ", ".join(f"{op} {backend}" for op, backend in backends.items())
    return [*lines, f"backends that ran: {ran or 'not recorded'}"]


def warnings(result: Result) -> list[str]:
    """Warnings of the runs, each once, with the method and the seeds that raised it."""
    seeds: dict[tuple[str, str], list[str]] = {}
    for name, entry in result["arms"].items():
        for run in entry["runs"]:
            for text in run["warnings"]:
                seeds.setdefault((name, text), []).append(str(run["seed"]))
    return [f"{name}, seed {', '.join(which)}: {text}" for (name, text), which in seeds.items()]


def _accuracy(entry: Mapping[str, Any]) -> str:
    """Mean and deviation in percent; the mean alone where the deviation is not known."""
    text = number(entry["summary"]["accuracy_mean"], ".1f", 100)
    deviation = _deviation(entry)
    return text if math.isnan(deviation) else f"{text} ± {deviation:.1f}"


def _deviation(entry: Mapping[str, Any]) -> float:
    """Standard deviation of the accuracy over seeds, in points; NaN where it is not known."""
    deviation = entry["summary"]["accuracy_std"]
    return 100 * deviation if is_finite(deviation) and len(entry["runs"]) > 1 else math.nan


def _seeds(result: Result) -> int:
    return min(len(entry["runs"]) for entry in result["arms"].values())


def _target(entry: Mapping[str, Any]) -> float | None:
    return next((run["target"] for run in entry["runs"] if run["target"] is not None), None)
