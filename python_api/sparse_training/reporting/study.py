"""A study in words and table rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from sparse_training.experiments.design import AGAIN, RANDOM
from sparse_training.experiments.original import CLAIMS
from sparse_training.reporting.result import Result
from sparse_training.reporting.text import DASH, interval, number, points, probability, sentence
from sparse_training.training.clock import STAGES

SCORE_COLUMNS = (
    ("method", ""),
    ("better", "tasks"),
    ("not worse", "tasks"),
    ("undecided", "tasks"),
    ("worse", "tasks"),
    ("worst, points", "test"),
    ("mean, points", "validation"),
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
    p = "" if whole["p"] is None else f", p = {probability(whole['p'])}"
    half = again["noise"]
    noise = "" if half is None else f" Chance alone moves a mean over the seeds by up to ±{100 * half:.2f} points."
    if again["passed"]:
        return f"A/A: random against random, no difference detected ({difference} points over {n} pairs{p}).{noise}"
    tests = again["tests"]
    found = (f"{task} (p = {probability(tests[task]['p'])})" if task in tests else task for task in again["differs"])
    where = f" on {', '.join(found)}" if again["differs"] else ""
    chance = (
        f" Not adjusted: of {len(tests)} such tests {0.05 * len(tests):.1f} are below 0.05 by chance." if tests else ""
    )
    return (
        f"A/A FAILED: random against random differs{where} ({difference} points over {n} pairs{p}): "
        f"trust no smaller difference of this study there.{chance}{noise}"
    )


def passed(result: Result) -> bool:
    """True where the A/A test was run and detected no difference."""
    return result["again"] is not None and bool(result["again"]["passed"])


def columns(result: Result) -> tuple[tuple[str, str], ...]:
    """Headings of a task's table, and how each number was obtained."""
    return (
        ("method", ""),
        ("n", "seeds"),
        ("measure, %", "test"),
        (f"−\xa0{result['baseline']}", "points"),
        ("95% interval", "points"),
        ("p", "Holm" if is_adjusted(result) else "paired"),
        ("p, not worse", "Holm"),
        ("power", f"{100 * result['margin']:g} points"),
        ("verdict", ""),
    )


def headings(result: Result) -> list[str]:
    """Headings of the table of all tasks in a terminal or a page of text."""
    named = (f"{name} ({how})" if how in ("Holm", "paired") else name for name, how in columns(result)[1:])
    return ["task", "method", *(name.replace("\xa0", " ").replace("−", "-") for name in named)]


def is_adjusted(result: Result) -> bool:
    """True where p-values are adjusted for the number of claims, as they are since version 2 of the format."""
    return any("p_holm" in (row["difference"] or {}) for row in result["table"])


def study_rows(result: Result) -> list[tuple[str, ...]]:
    """Cells of the table, a row for each task and method, under ``headings``."""
    rows = []
    for row in result["table"]:
        deviation = "" if row["deviation"] is None else f" ± {100 * row['deviation']:.2f}"
        cells = [row["task"], row["arm"], str(row["n"]), f"{100 * row['accuracy']:.2f}{deviation}"]
        if (difference := row["difference"]) is None:
            cells += [""] * 6
        else:
            # No claim is made of AGAIN: it stands against RANDOM, in the A/A line.
            safe = None if row["arm"] == AGAIN else row["not_worse"]
            p = None if row["arm"] == AGAIN and is_adjusted(result) else difference.get("p_holm", difference["p"])
            cells += [
                points(difference["mean"]),
                interval(difference["low"], difference["high"]),
                probability(p),
                DASH if safe is None else probability(safe.get("p_holm", safe["p"])),
                DASH if safe is None else number(safe["power"], ".0%"),
                row["verdict"] or DASH,
            ]
        rows.append(tuple(cells))
    return rows


def overall_rows(result: Result) -> tuple[list[tuple[str, ...]], list[tuple[str, str]]]:
    """Difference from the baseline with interval and verdict, a row for each method and a column for each task."""
    by_place = {(row["arm"], row["task"]): row for row in result["table"]}
    tasks = list(dict.fromkeys(row["task"] for row in result["table"]))
    rows = []
    for method in dict.fromkeys(row["arm"] for row in result["table"]):
        cells = [method]
        for task in tasks:
            row = by_place.get((method, task))
            if row is None:
                cells.append("")
            elif row["difference"] is None:
                cells.append(f"{100 * row['accuracy']:.2f} %")
            else:
                difference = row["difference"]
                known = difference["high"] is not None
                half = f" ± {100 * (difference['high'] - difference['mean']):.2f}" if known else ""
                cells.append(f"{points(difference['mean'])}{half} {row['verdict'] or ''}".rstrip())
        rows.append(tuple(cells))
    measures = {name: task["measure"] for name, task in result["tasks"].items()}
    return rows, [("method", ""), *((task, measures[task]) for task in tasks)]


def ladder_rows(ladder: Mapping[str, Any]) -> tuple[list[tuple[str, ...]], list[tuple[str, str]]]:
    """Means on the rungs of a ladder and the time to X, a row for each method; and the headings."""
    rungs = sorted({float(rung) for own in ladder["arms"].values() for rung in own["rungs"]})
    rows = []
    for method, own in ladder["arms"].items():
        values = (number(own["rungs"].get(f"{rung:g}"), ".2f", 100) for rung in rungs)
        at = (
            "never"
            if own["time"] is None
            else f"{'≤ ' if own['at_most'] else ''}{own['time'] * ladder['seconds']:.1f} s"
        )
        ratio = "never" if own["ratio"] is None else f"{own['ratio']:.2f}"
        span = (
            DASH
            if own["low"] is None
            else f"{own['low']:.2f} to {'never' if own['high'] is None else format(own['high'], '.2f')}"
        )
        rows.append((method, *values, at, ratio, span))
    heads = [(f"{rung * ladder['seconds']:.3g} s", "validation, %") for rung in rungs]
    return rows, [("method", ""), *heads, ("time to X", ""), ("of dense’s", ""), ("95% interval", "bootstrap")]


def ladder_lines(result: Result) -> list[str]:
    """State each method's time to X on each ladder, in a line a ladder."""
    lines = []
    for task, ladder in result["ladders"].items():
        parts = []
        for method, own in ladder["arms"].items():
            if method == result["baseline"]:
                continue
            span = "" if own["low"] is None else f" ({own['low']:.2f} to {number(own['high'], '.2f')})"
            parts.append(f"{method} never" if own["ratio"] is None else f"{method} {own['ratio']:.2f}{span}")
        lines.append(
            f"{task}: time to X = {100 * ladder['x']:.2f} % on validation rows, dense's best less "
            f"{100 * ladder['margin']:g} points, over dense's own time: {', '.join(parts)}"
        )
    return lines


def score_line(method: str, score: Mapping[str, Any], result: Result) -> str:
    """Sum a method up over tasks, in a line."""
    tasks, base = score["tasks"], result["baseline"]
    return (
        f"{method}: better than {base} on {score['better']} of {tasks} tasks, not worse by "
        f"{100 * result['margin']:g} points on {score['not_worse']}, worse on {score['worse']} "
        f"(worst {points(score['worst'])}), undecided on {score['undecided']}"
    )


def notes(result: Result) -> list[str]:
    """Notes below the table: what n, p and the times mean, and what was held equal."""
    settings, base = result["settings"], result["baseline"]
    tests = sum(row["difference"] is not None and row["arm"] != AGAIN for row in result["table"])
    lines = [
        f"Every method trains on about {settings['batch_size']} rows a step; methods that keep the fraction "
        f"{settings['rate']:g} are offered {1 / settings['rate']:g} times as many.",
    ]
    if is_adjusted(result):
        lines = [
            f"Choices are made on validation rows, {settings['validation']:.0%} of the training rows; the test rows "
            "are read once, at the end of each run.",
            f"p: two-sided test of the difference from {base}, paired by seed and test row; its error includes "
            "the sampling of both: (MS seeds + MS rows - MS rest) / (seeds × rows), with Satterthwaite's freedom.",
            f"p, not worse: one-sided test that the difference is above −{100 * result['margin']:g} points, at 2.5%; "
            "power: its chance to find two equal methods not worse, before the adjustment.",
            f"Both are adjusted by Holm's method for {tests} claims each; intervals and the A/A test are not.",
            *lines,
        ]
    else:
        chance = f"of {tests} tests {0.05 * tests:.1f} are below 0.05 by chance alone"
        lines = [
            f"p: paired t-test over the seeds, two-sided, not adjusted; {chance}.",
            "This record is of version 1, in which methods were chosen on the test rows.",
            *lines,
        ]
    if result["missing"]:
        lines.insert(0, _unfinished(result))
    return lines


def _unfinished(result: Result) -> str:
    return f"Unfinished: {result['missing']} runs are still to be done."


def headline(result: Result) -> str:
    """State the study in one sentence: the method that is best on validation rows, and what the test rows say of it."""
    score = {method: one for method, one in result["score"].items() if method != RANDOM} or result["score"]
    base = result["baseline"]
    if not score:
        return f"Only {base} has finished runs."
    known = all(one["validation"] is not None for one in score.values())
    best = max(score, key=lambda method: score[method]["validation" if known else "worst"])
    counts = score[best]
    chosen = (
        f"best on validation rows ({points(counts['validation'])} points on average)" if known else "never far below"
    )
    return (
        f"At equal cost {best} is {chosen}; on test rows it is better than {base} on {counts['better']} of "
        f"{counts['tasks']} tasks, not worse by {100 * result['margin']:g} points on {counts['not_worse']}, worse on "
        f"{counts['worse']}; its worst difference is {points(counts['worst'])} points."
    )


def score_rows(result: Result) -> list[tuple[str, ...]]:
    """Cells of the table of scores, a row for each method under ``SCORE_COLUMNS``."""
    return [
        (
            method,
            *(f"{score[name]} of {score['tasks']}" for name in ("better", "not_worse", "undecided", "worse")),
            points(score["worst"]),
            DASH if score["validation"] is None else points(score["validation"]),
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
        for method, gallery in sorted(task["galleries"].items(), key=lambda item: item[0] in (RANDOM, AGAIN))
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
        ladder = result["ladders"].get(name)
        timed, ladder_headings = ([], []) if ladder is None else ladder_rows(ladder)
        counts = {"to choose by": task["validation_rows"], "to test on": task["test_rows"]}
        others = "".join(f", {count:,} {what}" for what, count in counts.items() if count is not None)
        sections.append(
            {
                "name": name,
                "says": sentence(task["says"]),
                "rows": f"{task['rows']:,} rows to train on{others}",
                "measure": task["measure"],
                "ladder": timed,
                "ladder_headings": ladder_headings,
                "x": "" if ladder is None else f"{100 * ladder['x']:.2f} %",
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
