"""The table of speed-up bounds."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparse_training.experiments.original import Claim, claim_at
from sparse_training.profiling.speedup import SpeedupBound

HEADINGS = (
    ("rate", ""),
    ("policy", ""),
    ("s", "measured"),
    ("3/(s+3r)", "ceiling"),
    ("speed-up", "measured"),
    ("reached", "of ceiling"),
    ("original", "claimed"),
)


def speedup_rows(found: Sequence[SpeedupBound]) -> list[tuple[str, ...]]:
    """The cells of the table, one row for each, under ``HEADINGS``; the rate and the claim at it once a rate."""
    rows: list[tuple[str, ...]] = []
    last = None
    for one in found:
        claim = None if one.rate == last else claim_at(one.rate)
        rows.append(
            (
                "" if one.rate == last else f"{100 * one.rate:g} %",
                one.policy,
                f"{one.scorer_cost:.2f}",
                f"{one.ceiling:.2f}×",
                f"{one.speedup:.2f}×",
                f"{100 * one.share:.0f} %",
                "" if claim is None else ", ".join(f"{speedup:g}×" for speedup in claim.speedups) or "none",
            )
        )
        last = one.rate
    return rows


def claimed(claim: Claim) -> str:
    """A claim of the original system in a sentence."""
    speedups = " and ".join(f"{speedup:g}×" for speedup in claim.speedups) or "no speed-up"
    return f"claimed at {100 * (claim.rate or 0.0):.3g} %: {speedups}, {claim.setting}. What it was: {claim.basis}"


def print_speedup_bounds(found: Sequence[SpeedupBound], console: Console | None = None) -> None:
    """Print a row for each policy and rate, the original's claim where it made one at that rate, and what they mean."""
    console = console or Console()
    signs = str.maketrans({} if console.encoding.startswith("utf") else {"×": "x"})
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading, how in HEADINGS:
        words = Text(f"{heading}\n{how}".translate(signs))
        left = heading in ("rate", "policy")
        table.add_column(words, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for row in speedup_rows(found):
        if row[0] and table.row_count:
            table.add_section()
        table.add_row(*(Text(cell.translate(signs)) for cell in row))
    console.print(table)
    notes = [
        "s: what scoring a batch costs, and training what scores, in forward passes (each a third of training on it). "
        "SpeedupBound: how many times as fast as a dense step a step at rate r can be. Speed-up: what it is, loading "
        "included. What a choice of rows is worth is not said here: compare and study measure that.",
        *(
            claimed(claim)
            for claim in dict.fromkeys(claim_at(rate) for rate in dict.fromkeys(one.rate for one in found))
            if claim is not None
        ),
    ]
    for note in notes:
        console.print(Text(note.translate(signs)))
