"""A study's result as a table in the terminal and a self-contained HTML page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from sparse_training.errors import UserError
from sparse_training.experiments.original import CLAIMS
from sparse_training.experiments.study import AGAIN, BASE, FORMAT, RESULT, VERSION
from sparse_training.reporting import study_plots
from sparse_training.reporting.report import energy_line, energy_rows, jsonable, plain, read_result, replace, templates
from sparse_training.training.clock import STAGES, Costs

Result = Mapping[str, Any]


def points(value: float) -> str:
    """A difference of fractions in points; its minus is as wide as a plus."""
    return f"{100 * value:+.2f}".replace("-", "−")


def again_line(result: Result) -> str:
    """Whether the study can tell arms apart: random against random."""
    again = result["again"]
    if again is None:
        return f"A/A: not run ({AGAIN} was left out): nothing says how large a difference chance makes here."
    whole = again["all"]
    mean, n = points(whole["mean"]), whole["n"]
    p = "" if whole["p"] is None else f", p = {whole['p']:.2f}"
    noise = (
        ""
        if again["noise"] is None
        else f" Chance alone moves a mean over the seeds by ±{100 * again['noise']:.2f} points."
    )
    if again["passed"]:
        return f"A/A: random against random shows no difference ({mean} points over {n} pairs{p}).{noise}"
    where = f" on {', '.join(again['differs'])}" if again["differs"] else ""
    return (
        f"A/A FAILED: random against random differs{where} ({mean} points over {n} pairs{p}): "
        f"believe no difference of this study.{noise}"
    )


HEADINGS = ("task", "arm", "n", "accuracy, %", f"- {BASE}", "95% of it", "p", f"time to {BASE}'s")


def study_rows(result: Result) -> list[tuple[str, ...]]:
    """The cells of the table, a row for each task and arm: `HEADINGS`, then one for each shorter fraction."""
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
    """The fractions below 1, as they are named in the result."""
    return [f"{fraction:g}" for fraction in result["settings"]["fractions"] if fraction != 1.0]


def score_line(arm: str, score: Mapping[str, Any]) -> str:
    """What an arm comes to, over tasks."""
    tasks = score["tasks"]
    half = "" if score["half_runs"] is None else f"; half as long a run reaches random's whole on {score['half_runs']}"
    return (
        f"{arm}: within 0.1 points of random or above on {score['not_worse']} of {tasks} tasks "
        f"(worst {points(score['worst'])}), above on {score['better']} (p < 0.05: {score['surely_better']} above, "
        f"{score['surely_worse']} below){half}"
    )


def notes(result: Result) -> list[str]:
    """What a reader of the table must know."""
    settings, tests = result["settings"], sum(row["difference"] is not None for row in result["table"])
    out = [
        f"n: seeds that both arms have finished. p: paired t-test over them, two-sided, n - 1 degrees of freedom, not "
        f"adjusted; of {tests} tests {0.05 * tests:.1f} are below 0.05 by chance alone.",
        f"time to random's: when the mean of the curves first is at random's final accuracy, as a share of "
        f"{settings['seconds']:g} s. Under a cosine schedule curves meet at their ends: it is the runs of a smaller "
        "budget, whose whole schedule is shorter, that say whether an arm needs less time.",
        f"Every arm trains on about {settings['batch_size']} rows a step; arms that keep the fraction "
        f"{settings['rate']:g} are offered {1 / settings['rate']:g} times as many.",
    ]
    if result["missing"]:
        out.insert(0, f"Unfinished: {result['missing']} runs are still to be done.")
    return out


def print_study(result: Result, console: Console | None = None) -> None:
    """Print the A/A line, a row for each task and arm, what each arm comes to, and the notes."""
    console = console or Console()
    signs = {} if console.encoding.startswith("utf") else {"±": "+-", "–": "-", "−": "-"}
    plain = str.maketrans(signs)
    console.print(Text(again_line(result).translate(plain), style="" if _passed(result) else "bold red"))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    headings = [*HEADINGS, *(f"{fraction} of the time" for fraction in parts(result))]
    for heading in headings:
        table.add_column(heading, justify="left" if heading in HEADINGS[:2] else "right", vertical="bottom")
    last = None
    for row in study_rows(result):
        if last not in (None, row[0]):
            table.add_section()
        table.add_row(*(Text(cell.translate(plain)) for cell in (row if row[0] != last else ("", *row[1:]))))
        last = row[0]
    # At its own width even where the console is narrower: a digit is never cut.
    width = console.measure(table, options=console.options.update(max_width=1000)).maximum
    lines = console.render(table, console.options.update(width=width))
    console.print(Segments(lines), crop=False, end="")
    console.print()
    for line in (*(score_line(arm, score) for arm, score in result["score"].items()), *notes(result)):
        console.print(Text(line.translate(plain)))


def print_calibration(costs: Costs, console: Console | None = None) -> None:
    """Print the largest step of each arm that was timed, in milliseconds."""
    console = console or Console()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("arm", "rows offered", *STAGES[1:3]):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm, own in costs.own.items():
        rows = max(own["select"][0])
        table.add_row(arm, str(rows), *(f"{1e3 * own[stage][1][-1]:.3f}" for stage in ("score", "select")))
    console.print(table)
    train = ", ".join(f"{rows} rows {1e3 * seconds:.2f}" for rows, seconds in zip(*costs.shared["train"], strict=True))
    console.print(f"ms, medians over {costs.rounds} rounds; to train on {train}")


def _passed(result: Result) -> bool:
    return result["again"] is not None and bool(result["again"]["passed"])


# --- the page -----------------------------------------------------------------------------------

PAGE = "report.html"
TABLE = (
    ("arm", ""),
    ("n", "seeds"),
    ("accuracy, %", "measured"),
    (f"−\xa0{BASE}", "points"),
    ("95% interval", "points"),
    ("p", "paired"),
    (f"{BASE}’s end", "at, of its time"),
)
SCORES = (
    ("arm", ""),
    ("not worse", "tasks"),
    ("worst, points", ""),
    ("above", "tasks"),
    ("above, p < 0.05", "tasks"),
    ("below, p < 0.05", "tasks"),
    ("as good in half", "by half runs"),
)
STEPS = (
    ("arm", ""),
    ("rows offered", "counted"),
    *((stage, "measured") for stage in (*STAGES, "total")),
    ("speed-up", "measured"),
    ("s", "measured"),
    ("3/(s+3r)", "from s"),
    ("reached", "of it"),
)
CLAIMED = (
    ("setting", ""),
    ("rate", "claimed"),
    ("speed-up", "claimed"),
    ("accuracy, %", "claimed"),
    ("what it was", ""),
)


def headline(result: Result) -> str:
    """The study in one sentence: which arms are never worse than random, and where they are better."""
    score = result["score"]
    if not score:
        return f"Only {BASE} has finished runs."
    tasks = len({row["task"] for row in result["table"]})
    safe = [arm for arm, found in score.items() if found["not_worse"] == found["tasks"] == tasks]
    best = max(score, key=lambda arm: (score[arm]["not_worse"], score[arm]["better"], score[arm]["worst"]))
    found = score[best]
    said = (
        f"At equal cost {best} is above random on {found['better']} of {found['tasks']} tasks "
        f"({found['surely_better']} with p < 0.05), at worst {points(found['worst'])} points beside it"
    )
    if not safe:
        return f"{said}; no arm stays within a tenth of a point of random on every task."
    return f"{said}. Within a tenth of a point of random or above on every task: {', '.join(safe)}."


def _score_rows(result: Result) -> list[tuple[str, ...]]:
    return [
        (
            arm,
            f"{found['not_worse']} of {found['tasks']}",
            f"{points(found['worst'])}",
            str(found["better"]),
            str(found["surely_better"]),
            str(found["surely_worse"]),
            "–" if found["half_runs"] is None else str(found["half_runs"]),
        )
        for arm, found in result["score"].items()
    ]


def _step_rows(result: Result) -> list[tuple[str, ...]]:
    timed = result["calibration"]
    rows = []
    for arm, stages in timed["arms"].items():
        ends = ("–",) * 4
        if (found := timed["ceilings"].get(arm)) is not None:
            ends = (
                f"{found['speedup']:.2f}×",
                f"{found['scorer_cost']:.2f}",
                f"{found['ceiling']:.2f}×",
                f"{100 * found['share']:.0f} %",
            )
        times = (f"{1e3 * stages[stage]:.2f}" for stage in (*STAGES, "total"))
        rows.append((arm, f"{timed['offered'][arm]:,}", *times, *ends))
    return rows


def _claim_rows() -> list[tuple[str, ...]]:
    return [
        (
            claim.setting,
            "–" if claim.rate is None else f"{100 * claim.rate:.3g} %",
            ", ".join(f"{speedup:g}×" for speedup in claim.speedups) or "–",
            "–" if claim.accuracy is None else f"{100 * claim.accuracy:.2f}",
            claim.basis,
        )
        for claim in CLAIMS
    ]


def warnings(result: Result) -> list[str]:
    """The warnings of the whole runs, those that differ in numbers alone as one, with the arm and the tasks."""
    raised: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name, task in result["tasks"].items():
        for arm, by_fraction in task["arms"].items():
            for run in by_fraction["1"]:
                for text in run["warnings"]:
                    raised.setdefault((arm, re.sub(r"[\d.,]+", "", text)), []).append((name, text))
    out = []
    for (arm, _), found in raised.items():
        tasks, (_, first), more = ", ".join(dict.fromkeys(name for name, _ in found)), found[0], len(found) - 1
        out.append(f"{arm} on {tasks}: {first}" + (f" (and so in {more} more runs)" if more else ""))
    if result["missing"]:
        out.insert(0, f"Unfinished: {result['missing']} runs are still to be done.")
    return out


def _tasks(result: Result, figures: Mapping[str, Markup]) -> list[dict[str, Any]]:
    rows = study_rows(result)
    found = []
    for name, task in result["tasks"].items():
        planted, orders = _precision_rows(task)
        found.append(
            {
                "name": name,
                "says": task["says"][:1].upper() + task["says"][1:],
                "rows": f"{task['rows']:,}",
                "planted_name": task["planted_name"],
                "share": "" if task["planted_share"] is None else f"{100 * task['planted_share']:.3g} %",
                "figures": [
                    (title, figures[f"{kind} {name}"])
                    for kind, title in (("accuracy", "Test accuracy"), ("differences", f"AuxiliaryNetwork {BASE}"))
                    if f"{kind} {name}" in figures
                ],
                "table": [row[1:] for row in rows if row[0] == name],
                "precision": planted,
                "precision_headings": [("arm", ""), *((order, "") for order in orders)],
                "galleries": _galleries(task),
            }
        )
    return found


def _galleries(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Title and pictures of each arm's orders, those of arms that choose at random last; the most telling is open."""
    found: list[dict[str, Any]] = [
        {
            "title": f"{arm}: {order}",
            "rows": [{**row, "said": _said(row)} for row in shown],
            "planted": sum(bool(row["planted"]) for row in shown),
        }
        for arm, gallery in sorted(task["galleries"].items(), key=lambda item: item[0] in (BASE, AGAIN))
        for order, shown in gallery.items()
    ]
    most = max(found, key=lambda gallery: gallery["planted"], default=None)
    return [{**gallery, "open": gallery is most} for gallery in found]


def _precision_rows(task: Mapping[str, Any]) -> tuple[list[tuple[str, ...]], list[str]]:
    """A row an arm and one for chance, a column an order of the rows; and the orders."""
    by_arm = {arm: [run["planted"] for run in runs["1"] if run["planted"]] for arm, runs in task["arms"].items()}
    orders = list(dict.fromkeys(order for some in by_arm.values() for planted in some for order in planted))
    rows = []
    for arm, some in by_arm.items():
        if some:
            shares = ([planted[order] for planted in some if order in planted] for order in orders)
            rows.append((arm, *(f"{100 * fmean(share):.0f} %" if share else "–" for share in shares)))
    if rows:
        rows.append(("by chance", *(f"{100 * task['planted_share']:.0f} %" for _ in orders)))
    return rows, orders


def _said(row: Mapping[str, Any]) -> str:
    """What is known of a row of a gallery."""
    out = []
    if "seen" in row:
        out.append(f"{row['selected']:.0f} of {row['seen']:.0f}")
    elif "selected" in row:
        out.append(f"{row['selected']:.0f} times")
    if row.get("losses") is not None:
        out.append(f"loss {row['losses']:.2f}")
    return ", ".join(out)


def _raw(result: Result) -> str:
    """Raw seconds of each arm's whole runs, from the least to the most, as shares of the seconds charged."""
    shares = {arm: [run["raw_seconds"] / run["seconds"] for run in runs] for arm, runs in _whole(result).items()}
    said = [f"{arm} {min(some):.2f} to {max(some):.2f}" for arm, some in shares.items() if some]
    return f"{', '.join(said)} of the charged seconds"


def _whole(result: Result) -> dict[str, list[Any]]:
    """Each arm's whole runs, of all tasks."""
    return {
        arm: [run for task in result["tasks"].values() for run in task["arms"].get(arm, {"1": []})["1"]]
        for arm in result["settings"]["arms"]
    }


def page(result: Result) -> str:
    """The page: one file with its style, curves and images inside."""
    # matplotlib escapes what it writes into an SVG, so these strings are safe as they are.
    figures = {name: Markup(svg) for name, svg in study_plots.figures(result).items()}
    energy, energy_headings = energy_rows(_whole(result))
    text: str = (
        templates()
        .get_template("study.html.j2")
        .render(
            result=result,
            headline=headline(result),
            again=again_line(result),
            passed=_passed(result),
            warnings=warnings(result),
            seconds=f"{result['settings']['seconds']:g}",
            score_headings=SCORES,
            scores=_score_rows(result),
            headings=(*TABLE, *((f"{fraction} of the time", f"−\xa0{BASE}’s whole") for fraction in parts(result))),
            tasks=_tasks(result, figures),
            figures=figures | {name: "" for name in ("rate", "threshold", "mass") if name not in figures},
            traced=study_plots.traced_task(result),
            step_headings=STEPS,
            steps=_step_rows(result),
            claim_headings=CLAIMED,
            claims=_claim_rows(),
            notes=notes(result),
            raw=_raw(result),
            energy=energy,
            energy_headings=energy_headings,
            energy_line=energy_line(_whole(result)),
            facts=[
                (title, [(key.replace("_", " "), plain(value)) for key, value in result[part].items()])
                for title, part in (("Settings", "settings"), ("Environment", "environment"))
            ],
        )
    )
    return text


def write_study(result: Result, folder: str | Path) -> None:
    """Write study.json and report.html into `folder`; both are made before the first is written.

    Raises:
        UserError: if the folder cannot be written.
    """
    data, text = (json.dumps(jsonable(result), allow_nan=False) + "\n").encode(), page(result).encode()
    try:
        replace(Path(folder, RESULT), data)
        replace(Path(folder, PAGE), text)
    except OSError as error:
        raise UserError(f"cannot write the report to {str(folder)!r}: {error.strerror}") from error


def load_study(path: str | Path) -> dict[str, Any]:
    """Read a study.json.

    Raises:
        UserError: if it cannot be read, is not a study's result, or is of another version.
    """
    return read_result(path, kind="study", file="study.json", format=FORMAT, version=VERSION)
