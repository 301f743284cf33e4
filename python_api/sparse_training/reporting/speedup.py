"""Table of speed-up bounds in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from sparse_training.profiling.speedup import SpeedupBound
from sparse_training.reporting.tables import for_console, new_table

HEADINGS = (
    ("rate", ""),
    ("policy", ""),
    ("s", "measured"),
    ("3/(s+3r)", "bound"),
    ("speed-up", "measured"),
    ("reached", "of bound"),
)


def speedup_rows(bounds: Sequence[SpeedupBound]) -> list[tuple[str, ...]]:
    """Cells of the table, a row for each bound, under ``HEADINGS``; the rate only in its first row."""
    rows: list[tuple[str, ...]] = []
    last = None
    for bound in bounds:
        rows.append(
            (
                "" if bound.rate == last else f"{100 * bound.rate:g} %",
                bound.policy,
                f"{bound.scorer_cost:.2f}",
                f"{bound.ceiling:.2f}×",
                f"{bound.speedup:.2f}×",
                f"{100 * bound.share:.0f} %",
            )
        )
        last = bound.rate
    return rows


def speedup_sentence(bounds: Sequence[SpeedupBound]) -> str:
    """Say which step is the fastest, against a dense one."""
    best = max(bounds, key=lambda bound: bound.speedup)
    if best.speedup <= 1.0:
        return f"No step is faster than a dense one; the nearest, {best.policy} at {best.rate:.3g}, is not."
    share = 1.0 / best.speedup
    return f"Fastest: {best.policy} at a rate of {best.rate:.3g}, whose step takes {share:.0%} of a dense step's time."


def print_speedup_bounds(bounds: Sequence[SpeedupBound], console: Console | None = None, *, of: str = "") -> None:
    """Print a row for each policy and rate, what the columns mean, and which step is the fastest.

    Args:
        bounds: measured bounds, ordered by rate.
        console: where to print. Default: standard output.
        of: model, data and batches that were timed, in words, above the table. Default: none.
    """
    console = console or Console()
    if of:
        console.print(for_console(of, console))
    table = new_table()
    for heading, how in HEADINGS:
        left = heading in ("rate", "policy")
        words = for_console(f"{heading}\n{how}", console)
        table.add_column(words, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for row in speedup_rows(bounds):
        if row[0] and table.row_count:
            table.add_section()
        table.add_row(*(for_console(cell, console) for cell in row))
    console.print(table)
    for note in (
        "s: cost of scoring a batch, and of training the scorer, in forward passes (each a third of training on it). "
        "Bound: largest speed-up over a dense step that a step at rate r can have. Speed-up: measured, loading "
        "included. Accuracy is not measured here: see compare and study.",
        speedup_sentence(bounds),
    ):
        console.print(for_console(note, console))
