"""A study's result as a table in the terminal and a self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from .clock import STAGES, Costs
from .errors import UserError
from .report import jsonable, replace
from .study import AGAIN, BASE, FORMAT, RESULT, VERSION

Result = Mapping[str, Any]


def again_line(result: Result) -> str:
    """Whether the study can tell arms apart: random against random."""
    again = result["again"]
    if again is None:
        return f"A/A: not run ({AGAIN} was left out): nothing says how large a difference chance makes here."
    whole = again["all"]
    mean, n = 100 * whole["mean"], whole["n"]
    p = "" if whole["p"] is None else f", p = {whole['p']:.2f}"
    noise = (
        ""
        if again["noise"] is None
        else f" Chance alone moves a mean over the seeds by ±{100 * again['noise']:.2f} points."
    )
    if again["passed"]:
        return f"A/A: random against random shows no difference ({mean:+.2f} points over {n} pairs{p}).{noise}"
    where = f" on {', '.join(again['differs'])}" if again["differs"] else ""
    return (
        f"A/A FAILED: random against random differs{where} ({mean:+.2f} points over {n} pairs{p}): "
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
                f"{100 * difference['mean']:+.2f}",
                f"{100 * difference['low']:+.2f} to {100 * difference['high']:+.2f}" if known else "–",
                "–" if difference["p"] is None else f"{difference['p']:.3f}",
            ]
        cells.append("never" if row["reached"] is None else f"{row['reached']:.2f}")
        for fraction in parts(result):
            part = row["parts"].get(fraction)
            cells.append(
                "–"
                if part is None
                else f"{100 * part['difference']['mean']:+.2f}{' reaches' if part['reaches'] else ''}"
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
        f"(worst {100 * score['worst']:+.2f}), above on {score['better']} (p < 0.05: {score['surely_better']} above, "
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
    signs = {} if console.encoding.startswith("utf") else {"±": "+-", "–": "-"}
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


def write_study(result: Result, folder: str | Path) -> None:
    """Write study.json and report.html into `folder`.

    Raises:
        UserError: if the folder cannot be written.
    """
    try:
        replace(Path(folder, RESULT), (json.dumps(jsonable(result), allow_nan=False) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write the report to {str(folder)!r}: {error.strerror}") from error


def load_study(path: str | Path) -> dict[str, Any]:
    """Read a study.json.

    Raises:
        UserError: if it cannot be read, is not a study's result, or is of another version.
    """
    name = str(path)
    try:
        result = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {name!r}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name!r} is not JSON; wanted a study.json: {error}") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise UserError(f"{name!r} is not the result of a study (format {FORMAT!r})")
    if result.get("version") != VERSION:
        raise UserError(f"{name!r} has version {result.get('version')!r}; wanted {VERSION}")
    return result
