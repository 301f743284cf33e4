"""Tables in the terminal: of a comparison, of a study, and of a calibration."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from sparse_training.reporting import comparison, study
from sparse_training.reporting.result import Result
from sparse_training.training.clock import STAGES, Costs

# What a stream that carries ASCII alone is given in place of the signs.
_ASCII = str.maketrans({"±": "+-", "×": "x", "–": "-", "−": "-", "’": "'", "≤": "<=", "²": "2"})


def new_table(gap: int = 1) -> Table:
    """Make an empty table with a rule under its heading and ``gap`` spaces between columns."""
    return Table(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False, show_edge=False)


def for_console(text: str, console: Console) -> Text:
    """Text with the signs that the console's stream can carry."""
    return Text(text if console.encoding.startswith("utf") else text.translate(_ASCII))


def print_comparison(result: Result, console: Console | None = None) -> None:
    """Print a row for each method, then the cost of scoring, the backends that ran and the warnings.

    Args:
        result: a comparison.
        console: where to print. Default: standard output.
    """
    console = console or Console()
    table = new_table(gap=int(console.width >= 100))
    for heading, _ in comparison.COLUMNS:
        # The words of a heading stand above one another: nine columns in 80 characters.
        header = Text(heading if "\n" in heading else heading.replace(" ", "\n"))
        if heading == "method":
            table.add_column(header, vertical="bottom", overflow="fold", max_width=12)
        else:
            table.add_column(header, vertical="bottom", justify="right", no_wrap=True)
    for row in comparison.table_rows(result):
        table.add_row(*(for_console(cell, console) for cell in row))
    _print_whole(table, console)
    for note in comparison.notes(result):
        console.print(for_console(note, console))
    for warning in comparison.warnings(result):
        console.print(for_console(f"warning: {warning}", console), style="yellow")


def print_study(result: Result, console: Console | None = None) -> None:
    """Print the A/A line, a row for each task and method, each method's score, and the notes.

    Args:
        result: a study.
        console: where to print. Default: standard output.
    """
    console = console or Console()
    style = None if study.passed(result) else "bold red"
    console.print(for_console(study.again_line(result), console), style=style)
    table = new_table()
    for heading in study.headings(result):
        words = heading in ("task", "method", "verdict")
        table.add_column(heading, justify="left" if words else "right", vertical="bottom")
    last = None
    for row in study.study_rows(result):
        if last not in (None, row[0]):
            table.add_section()
        table.add_row(*(for_console(cell, console) for cell in (row if row[0] != last else ("", *row[1:]))))
        last = row[0]
    _print_whole(table, console)
    scores = (study.score_line(method, score, result) for method, score in result["score"].items())
    for line in (*scores, *study.ladder_lines(result), *study.notes(result)):
        console.print(for_console(line, console))


def print_calibration(costs: Costs, console: Console | None = None) -> None:
    """Print the largest step of each method that was timed, in milliseconds.

    Args:
        costs: measured costs.
        console: where to print. Default: standard output.
    """
    console = console or Console()
    table = new_table()
    for heading in ("method", "rows offered", *STAGES[1:3]):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method, own in costs.own.items():
        rows = max(own["select"][0])
        table.add_row(method, str(rows), *(f"{1e3 * own[stage][1][-1]:.3f}" for stage in ("score", "select")))
    console.print(table)
    train = ", ".join(f"{rows} rows {1e3 * seconds:.2f}" for rows, seconds in zip(*costs.shared["train"], strict=True))
    console.print(f"ms, medians over {costs.rounds} rounds; to train on {train}")


def _print_whole(table: Table, console: Console) -> None:
    """Print a table at its own width even where the console is narrower: a digit is never cut."""
    width = console.measure(table, options=console.options.update(max_width=1000)).maximum
    lines = console.render(table, console.options.update(width=width))
    console.print(Segments(lines), crop=False, end="")
    console.print()
