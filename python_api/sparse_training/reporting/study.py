"""A study in words and table rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from sparse_training.experiments.design import AGAIN, BASELINE
from sparse_training.experiments.original import CLAIMS
from sparse_training.reporting.result import Result
from sparse_training.reporting.text import DASH, points, sentence
from sparse_training.training.clock import STAGES

HEADINGS = ("task", "method", "n", "accuracy, %", f"- {BASELINE}", "95% of it", "p", f"time to {BASELINE}'s")
# Of the page: heading, and how the number was obtained.
TASK_COLUMNS = (
    ("method", ""),
    ("n", "seeds"),
    ("accuracy, %", "measured"),
    (f"−\xa0{BASELINE}", "points"),
    ("95% interval", "points"),
    ("p", "paired"),
    (f"{BASELINE}’s end", "at, of its time"),
)
SCORE_COLUMNS = (
    ("method", ""),
    ("not worse", "tasks"),
    ("worst, points", ""),
    ("above", "tasks"),
    ("above, p < 0.05", "tasks"),
    ("below, p < 0.05", "tasks"),
    ("as good in half", "by half runs"),
)
STEP_COLUMNS = (
    ("method", ""),
    ("rows offered", "counted"),
    *((stage, "measured") for stage in (*STAGES, "total")),
    ("speed-up", "measured"),
    ("s", "measured"),
    ("bound 3/(s+3r)", "from s"),
    ("reached", "of bound"),
)
CLAIM_COLUMNS = (
    ("setting", ""),
    ("rate", "claimed"),
    ("speed-up", "claimed"),
    ("accuracy, %", "claimed"),
    ("basis", ""),
)


def again_line(result: Result) -> str:
    """Say whether the study can tell methods apart: the A/A test, random against random with other draws."""
    again = result["again"]
    if again is None:
        return f"A/A: not run ({AGAIN} was left out); how large a difference chance makes is not known."
    whole = again["all"]
    difference, n = points(whole["mean"]), whole["n"]
    p = "" if whole["p"] is None else f", p = {whole['p']:.2f}"
    noise = (
        ""
        if again["noise"] is None
        else f" Chance alone moves a mean over the seeds by ±{100 * again['noise']:.2f} points."
    )
    if again["passed"]:
        return f"A/A: random against random, no difference detected ({difference} points over {n} pairs{p}).{noise}"
    where = f" on {', '.join(again['differs'])}" if again["differs"] else ""
    return (
        f"A/A FAILED: random against random differs{where} ({difference} points over {n} pairs{p}): "
        f"trust no difference of this study.{noise}"
    )


def passed(result: Result) -> bool:
    """True where the A/A test was run and detected no difference."""
    return result["again"] is not None and bool(result["again"]["passed"])


def study_rows(result: Result) -> list[tuple[str, ...]]:
    """Cells of the table, a row for each task and method, under ``headings``."""
    rows = []
    for row in result["table"]:
        deviation = "" if row["deviation"] is None else f" ± {100 * row['deviation']:.2f}"
        difference = row["difference"]
        cells = [row["task"], row["arm"], str(row["n"]), f"{100 * row['accuracy']:.2f}{deviation}"]
        if difference is None:
            cells += ["", "", ""]
        else:
            known = difference["low"] is not None
            cells += [
                f"{points(difference['mean'])}",
                f"{points(difference['low'])} to {points(difference['high'])}" if known else "–",
                "–" if difference["p"] is None else f"{difference['p']:.3f}",
            ]
        cells.append("never" if row["reached"] is None else f"{row['reached']:.2f}")
        for fraction in parts(result):
            part = row["parts"].get(fraction)
            cells.append(
                "–" if part is None else f"{points(part['difference']['mean'])}{' reaches' if part['reaches'] else ''}"
            )
        rows.append(tuple(cells))
    return rows


def parts(result: Result) -> list[str]:
    """Fractions below 1, under the names that the result has."""
    return [f"{fraction:g}" for fraction in result["settings"]["fractions"] if fraction != 1.0]


def headings(result: Result) -> list[str]:
    """Headings of the table: ``HEADINGS``, then one for each fraction below 1."""
    return [*HEADINGS, *(f"{fraction} of the time" for fraction in parts(result))]


def score_line(method: str, score: Mapping[str, Any]) -> str:
    """Sum a method up over tasks, in a line."""
    tasks = score["tasks"]
    half = "" if score["half_runs"] is None else f"; half as long a run reaches random's whole on {score['half_runs']}"
    return (
        f"{method}: within 0.1 points of random or above on {score['not_worse']} of {tasks} tasks "
        f"(worst {points(score['worst'])}), above on {score['better']} (p < 0.05: {score['surely_better']} above, "
        f"{score['surely_worse']} below){half}"
    )


def notes(result: Result) -> list[str]:
    """Notes below the table: what n, p and the times mean, and what was held equal."""
    settings, tests = result["settings"], sum(row["difference"] is not None for row in result["table"])
    lines = [
        f"n: seeds that both methods have finished. p: paired t-test over them, two-sided, n - 1 degrees of freedom, "
        f"not adjusted; of {tests} tests {0.05 * tests:.1f} are below 0.05 by chance alone.",
        f"time to random's: when the mean curve first reaches random's final accuracy, as a fraction of "
        f"{settings['seconds']:g} s. Under a cosine schedule curves meet at their ends. Whether a method needs less "
        "time is shown by the runs of a smaller budget, whose whole schedule is shorter.",
        f"Every method trains on about {settings['batch_size']} rows a step; methods that keep the fraction "
        f"{settings['rate']:g} are offered {1 / settings['rate']:g} times as many.",
    ]
    if result["missing"]:
        lines.insert(0, _unfinished(result))
    return lines


def _unfinished(result: Result) -> str:
    return f"Unfinished: {result['missing']} runs are still to be done."


def headline(result: Result) -> str:
    """State the study in one sentence: which methods are never worse than random, and where they are better."""
    score = result["score"]
    if not score:
        return f"Only {BASELINE} has finished runs."
    tasks = len({row["task"] for row in result["table"]})
    safe = [method for method, one in score.items() if one["not_worse"] == one["tasks"] == tasks]
    best = max(score, key=lambda method: (score[method]["not_worse"], score[method]["better"], score[method]["worst"]))
    counts = score[best]
    said = (
        f"At equal cost {best} is above random on {counts['better']} of {counts['tasks']} tasks "
        f"({counts['surely_better']} with p < 0.05); its worst difference is {points(counts['worst'])} points"
    )
    if not safe:
        return f"{said}; no method stays within a tenth of a point of random on every task."
    return f"{said}. Within a tenth of a point of random or above on every task: {', '.join(safe)}."


def score_rows(result: Result) -> list[tuple[str, ...]]:
    """Cells of the table of scores, a row for each method under ``SCORE_COLUMNS``."""
    return [
        (
            method,
            f"{score['not_worse']} of {score['tasks']}",
            f"{points(score['worst'])}",
            str(score["better"]),
            str(score["surely_better"]),
            str(score["surely_worse"]),
            DASH if score["half_runs"] is None else str(score["half_runs"]),
        )
        for method, score in result["score"].items()
    ]


def step_rows(result: Result) -> list[tuple[str, ...]]:
    """Cells of the table of a step, a row for each method under ``STEP_COLUMNS``; times in milliseconds."""
    timed = result["calibration"]
    rows = []
    for method, stages in timed["arms"].items():
        ends = (DASH,) * 4
        if (bound := timed["ceilings"].get(method)) is not None:
            ends = (
                f"{bound['speedup']:.2f}×",
                f"{bound['scorer_cost']:.2f}",
                f"{bound['ceiling']:.2f}×",
                f"{100 * bound['share']:.0f} %",
            )
        milliseconds = (f"{1e3 * stages[stage]:.2f}" for stage in (*STAGES, "total"))
        rows.append((method, f"{timed['offered'][method]:,}", *milliseconds, *ends))
    return rows


def claim_rows() -> list[tuple[str, ...]]:
    """Cells of the table of the original system's claims, under ``CLAIM_COLUMNS``."""
    return [
        (
            claim.setting,
            DASH if claim.rate is None else f"{100 * claim.rate:.3g} %",
            ", ".join(f"{speedup:g}×" for speedup in claim.speedups) or DASH,
            DASH if claim.accuracy is None else f"{100 * claim.accuracy:.2f}",
            claim.basis,
        )
        for claim in CLAIMS
    ]


def warnings(result: Result) -> list[str]:
    """Warnings of the whole runs, with the method and the tasks; those that differ in numbers alone are one."""
    raised: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name, task in result["tasks"].items():
        for method, by_fraction in task["arms"].items():
            for run in by_fraction["1"]:
                for text in run["warnings"]:
                    raised.setdefault((method, re.sub(r"[\d.,]+", "", text)), []).append((name, text))
    lines = []
    for (method, _), cases in raised.items():
        tasks, (_, first), more = ", ".join(dict.fromkeys(name for name, _ in cases)), cases[0], len(cases) - 1
        lines.append(f"{method} on {tasks}: {first}" + (f" (and so in {more} more runs)" if more else ""))
    if result["missing"]:
        lines.insert(0, _unfinished(result))
    return lines


def precision_rows(task: Mapping[str, Any]) -> tuple[list[tuple[str, ...]], list[tuple[str, str]]]:
    """Precision at 100 of each ranking of the rows: a row for each method and one for chance; and the headings."""
    by_method = {
        method: [run["planted"] for run in runs["1"] if run["planted"]] for method, runs in task["arms"].items()
    }
    orders = list(dict.fromkeys(order for some in by_method.values() for planted in some for order in planted))
    rows = []
    for method, some in by_method.items():
        if some:
            shares = ([planted[order] for planted in some if order in planted] for order in orders)
            rows.append((method, *(f"{100 * fmean(share):.0f} %" if share else DASH for share in shares)))
    if rows:
        rows.append(("by chance", *(f"{100 * task['planted_share']:.0f} %" for _ in orders)))
    return rows, [("method", ""), *((order, "") for order in orders)]


def galleries(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Title and pictures of each method's rankings, methods that choose at random last; the most telling is open."""
    shown: list[dict[str, Any]] = [
        {
            "title": f"{method}: {order}",
            "rows": [{**row, "said": _caption(row)} for row in rows],
            "planted": sum(bool(row["planted"]) for row in rows),
        }
        for method, gallery in sorted(task["galleries"].items(), key=lambda item: item[0] in (BASELINE, AGAIN))
        for order, rows in gallery.items()
    ]
    most = max(shown, key=lambda gallery: gallery["planted"], default=None)
    return [{**gallery, "open": gallery is most} for gallery in shown]


def _caption(row: Mapping[str, Any]) -> str:
    """Counts and loss of a picture in a gallery."""
    parts = []
    if "seen" in row:
        parts.append(f"{row['selected']:.0f} of {row['seen']:.0f}")
    elif "selected" in row:
        parts.append(f"{row['selected']:.0f} times")
    if row.get("losses") is not None:
        parts.append(f"loss {row['losses']:.2f}")
    return ", ".join(parts)


def task_sections(result: Result) -> list[dict[str, Any]]:
    """Entries of the page for each task, without its figures."""
    rows = study_rows(result)
    sections = []
    for name, task in result["tasks"].items():
        precision, precision_headings = precision_rows(task)
        sections.append(
            {
                "name": name,
                "says": sentence(task["says"]),
                "rows": f"{task['rows']:,}",
                "planted_name": task["planted_name"],
                "share": "" if task["planted_share"] is None else f"{100 * task['planted_share']:.3g} %",
                "table": [row[1:] for row in rows if row[0] == name],
                "precision": precision,
                "precision_headings": precision_headings,
                "galleries": galleries(task),
            }
        )
    return sections


def raw_seconds_line(result: Result) -> str:
    """Raw seconds of each method's whole runs, the least and the most, as shares of the seconds charged."""
    shares = {
        method: [run["raw_seconds"] / run["seconds"] for run in runs] for method, runs in whole_runs(result).items()
    }
    ranges = [f"{method} {min(some):.2f} to {max(some):.2f}" for method, some in shares.items() if some]
    return f"{', '.join(ranges)} of the charged seconds"


def whole_runs(result: Result) -> dict[str, list[Any]]:
    """Each method's whole runs, of all tasks."""
    return {
        method: [run for task in result["tasks"].values() for run in task["arms"].get(method, {"1": []})["1"]]
        for method in result["settings"]["arms"]
    }
