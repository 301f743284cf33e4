"""Table of speed-up bounds in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from sparse_training.experiments.original import Claim, claim_at
from sparse_training.profiling.speedup import SpeedupBound
from sparse_training.reporting.tables import for_console, new_table

HEADINGS = (
    ("rate", ""),
    ("policy", ""),
    ("s", "measured"),
    ("3/(s+3r)", "bound"),
    ("speed-up", "measured"),
    ("reached", "of bound"),
    ("original", "claimed"),
)


def speedup_rows(bounds: Sequence[SpeedupBound]) -> list[tuple[str, ...]]:
    """Cells of the table, a row for each bound, under ``HEADINGS``; rate and claim only in a rate's first row."""
    rows: list[tuple[str, ...]] = []
    last = None
    for bound in bounds:
        claim = None if bound.rate == last else claim_at(bound.rate)
        rows.append(
            (
                "" if bound.rate == last else f"{100 * bound.rate:g} %",
                bound.policy,
                f"{bound.scorer_cost:.2f}",
                f"{bound.ceiling:.2f}×",
                f"{bound.speedup:.2f}×",
                f"{100 * bound.share:.0f} %",
                "" if claim is None else ", ".join(f"{speedup:g}×" for speedup in claim.speedups) or "none",
            )
        )
        last = bound.rate
    return rows


def claimed(claim: Claim) -> str:
    """State a claim of the original system in a sentence."""
    speedups = " and ".join(f"{speedup:g}×" for speedup in claim.speedups) or "no speed-up"
    return f"claimed at {100 * (claim.rate or 0.0):.3g} %: {speedups}, {claim.setting}. What it was: {claim.basis}"


def print_speedup_bounds(bounds: Sequence[SpeedupBound], console: Console | None = None) -> None:
    """Print a row for each policy and rate, the original system's claim at that rate, and what the columns mean.

    Args:
        bounds: measured bounds, ordered by rate.
        console: where to print. Default: standard output.
    """
    console = console or Console()
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
    notes = [
        "s: cost of scoring a batch, and of training the scorer, in forward passes (each a third of training on it). "
        "Bound: largest speed-up over a dense step that a step at rate r can have. Speed-up: measured, loading "
        "included. Accuracy is not measured here: see compare and study.",
        *(
            claimed(claim)
            for claim in dict.fromkeys(claim_at(rate) for rate in dict.fromkeys(bound.rate for bound in bounds))
            if claim is not None
        ),
    ]
    for note in notes:
        console.print(for_console(note, console))
