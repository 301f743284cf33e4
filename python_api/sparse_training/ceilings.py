"""How fast a policy's step is beside a dense one, and how fast it could be at best.

A dense step costs about three forward passes. A scorer that costs s of them leaves a policy at rate r at most
3/(s+3r) times as fast: 2.3 at 10% with the whole model's own forward, 10 with a table of past losses. What is lost to
small batches, packing and control is the distance from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparse_training.clock import Costs, calibrate
from sparse_training.original import Claim, claim_at
from sparse_training.policies import Policy, make_policy

if TYPE_CHECKING:
    from sparse_training.trainer import SparseTrainer


class Ceiling(NamedTuple):
    """A policy's step, by the clock."""

    policy: str
    rate: float  # fraction of the batch that is kept
    scorer: str | None  # None where nothing is asked of any
    scorer_cost: float  # s, in forward passes: a third of what training on a whole batch costs
    ceiling: float  # 3 / (s + 3 rate)
    speedup: float  # measured: seconds of a dense step, loading included, over those of the policy's

    @property
    def share(self) -> float:
        """Of the ceiling that is reached."""
        return self.speedup / self.ceiling


def ceiling(costs: Costs, policy: Policy, *, batch_size: int, rate: float) -> Ceiling:
    """By measured costs, for a policy that keeps ``rate`` of batches of that size.

    What is trained beside the model is a part of s, as scoring is.
    """
    kept = batch_size if policy.masks else max(1, round(rate * batch_size))
    dense = costs.step("dense", batch_size, batch_size)
    step = costs.step(policy.name, kept if policy.before_loading else batch_size, kept, batch_size)
    s = 3.0 * (step["score"] + costs.beside(policy.name, kept)) / dense["train"]
    speedup = dense["total"] / step["total"]
    scorer = policy.scorer.name if policy.scored_by is not None else None
    trained = 1.0 if policy.masks else rate
    return Ceiling(policy.name, rate, scorer, s, 3.0 / (s + 3.0 * trained), speedup)


def ceilings(
    trainer: SparseTrainer,
    data: Iterable[Any],
    policies: Iterable[str | Policy],
    rates: Iterable[float],
    *,
    rounds: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[Ceiling]:
    """Measures policies on the trainer's model and data, interleaved, beside dense steps.

    Args:
        trainer: stays as it is. data: as for ``fit``; its batches are of one size, but for the last.
        policies: names, policy@scorer, or policies; each is measured at each of the rates.
        rounds: as for ``clock.calibrate``.
        progress: called with the share done, 0 to 1.

    Raises:
        UserError: no such policy, scorer or rate; or one that cannot score this model's batches.
    """
    loader = trainer.loader(data)
    batch_size = loader.load(next(loader.probe())).rows
    found = []
    named, wanted = list(policies), list(rates)
    for done, rate in enumerate(wanted):
        arms = [make_policy(policy, rate=rate, seed=trainer.seed, loss=trainer.criterion.loss) for policy in named]

        def tell(share: float, before: int = done) -> None:
            if progress is not None:
                progress((before + share) / len(wanted))

        costs = calibrate(trainer, loader, {arm.name: arm for arm in arms}, rounds=rounds, progress=tell)
        found += [ceiling(costs, arm, batch_size=batch_size, rate=rate) for arm in arms]
    return found


HEADINGS = (
    ("rate", ""),
    ("policy", ""),
    ("s", "measured"),
    ("3/(s+3r)", "ceiling"),
    ("speed-up", "measured"),
    ("reached", "of ceiling"),
    ("original", "claimed"),
)


def ceiling_rows(found: Sequence[Ceiling]) -> list[tuple[str, ...]]:
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


def print_ceilings(found: Sequence[Ceiling], console: Console | None = None) -> None:
    """Print a row for each policy and rate, the original's claim where it made one at that rate, and what they mean."""
    console = console or Console()
    signs = str.maketrans({} if console.encoding.startswith("utf") else {"×": "x"})
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading, how in HEADINGS:
        words = Text(f"{heading}\n{how}".translate(signs))
        left = heading in ("rate", "policy")
        table.add_column(words, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for row in ceiling_rows(found):
        if row[0] and table.row_count:
            table.add_section()
        table.add_row(*(Text(cell.translate(signs)) for cell in row))
    console.print(table)
    notes = [
        "s: what scoring a batch costs, and training what scores, in forward passes (each a third of training on it). "
        "Ceiling: how many times as fast as a dense step a step at rate r can be. Speed-up: what it is, loading "
        "included. What a choice of rows is worth is not said here: compare and study measure that.",
        *(
            claimed(claim)
            for claim in dict.fromkeys(claim_at(rate) for rate in dict.fromkeys(one.rate for one in found))
            if claim is not None
        ),
    ]
    for note in notes:
        console.print(Text(note.translate(signs)))
