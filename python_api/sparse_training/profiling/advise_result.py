"""Answer of ``advise``: what was measured, what each method could save, and a recommendation."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparse_training.profiling.advise_methods import LEAST_SAVING, MethodBound, PlannedRun
from sparse_training.profiling.advise_rows import TOP, Concentration
from sparse_training.profiling.advise_steps import STAGES, StepTimes

WIDTH = 100  # characters of a line of text
HEADINGS = ("method", "kept", "scoring", "at most", "measured", "noise", "saves")
FACTS = {
    "ignored": "targets that are ignored",
    "padded": "positions that are padding",
    "no_gradient": "targets that count, with no gradient",
    "copies": "rows that are exact copies",
    "below_mean": "rows whose loss is below the mean",
}
_DOES = {
    "infobatch": "leave out half of the rows below the mean loss and weight the others",
    "importance@self": "score each batch and draw rows in proportion to their losses",
    "head": "run the last layer and the loss on the targets that count alone",
}


@dataclass(frozen=True)
class Advice:
    """Measurements of a model, its loader and its loss, and a recommendation.

    ``str()`` gives a table in plain text.

    Attributes:
        times: seconds of a dense step by stage.
        batch_size: rows of a whole batch.
        device: device that was measured on.
        steps: number of training steps taken, on copies.
        rows: number of rows that were looked at.
        epochs: length of the run that savings are of, in passes.
        facts: shares in [0, 1], or None where unknown: "ignored" targets, "padded" positions, "no_gradient" (targets
            that count and whose gradient is exactly 0), "copies" (rows whose inputs an earlier row has, among those
            seen), "below_mean" (rows whose loss is below the mean).
        losses: concentration of the rows' losses; None where all are 0.
        gradients: concentration of the norms of the rows' gradients in the model's output; None where unknown.
        methods: what each method could save.
        method: name of the recommended method; "dense" where there is nothing to gain.
        recommendation: the recommendation in a sentence.
        code: line of code that follows it.
        notes: further remarks.
    """

    times: StepTimes
    batch_size: int
    device: str
    steps: int
    rows: int
    epochs: float
    facts: dict[str, float | None]
    losses: Concentration | None
    gradients: Concentration | None
    methods: tuple[MethodBound, ...]
    method: str
    recommendation: str
    code: str
    notes: tuple[str, ...]

    @property
    def saving(self) -> float:
        """Fraction of a run's time that the recommended method saves; 0 for a dense run."""
        return next((bound.saving for bound in self.methods if bound.method == self.method), 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers, as JSON takes them."""
        plain = asdict(self)
        plain["times"]["total"] = self.times.total
        for bound, given in zip(plain["methods"], self.methods, strict=True):
            bound["efficiency"] = given.efficiency
        plain["methods"], plain["notes"] = list(plain["methods"]), list(self.notes)
        for name in ("losses", "gradients"):
            if plain[name] is not None:
                plain[name]["top"] = {str(percent): share for percent, share in plain[name]["top"].items()}
        return {**plain, "saving": self.saving}

    def __str__(self) -> str:
        parts = [
            f"A step on {self.batch_size} rows takes {milliseconds(self.times.total)} ({self.device}, "
            f"{self.times.steps} steps timed).",
            aligned(self.stage_rows()),
            f"Of {self.rows:,} rows looked at:",
            aligned(self.fact_rows()),
            aligned([("share of the sum in", *(f"top {percent}%" for percent in TOP), "effective"), *self.shares()]),
            aligned([HEADINGS, *self.method_rows()]) if self.methods else "No method can be used on this data.",
            *([textwrap.fill(LEGEND, WIDTH)] if self.methods else []),
            textwrap.fill(self.recommendation, WIDTH),
            f"    {self.code}",
            *(textwrap.fill(note, WIDTH) for note in self.notes),
        ]
        return "\n\n".join(parts)

    def stage_rows(self) -> list[tuple[str, ...]]:
        """Cells of a table: each stage, its seconds and its share of a step."""
        seconds = {stage: getattr(self.times, stage) for stage in STAGES}
        return [(stage, milliseconds(spent), f"{spent / self.times.total:.0%}") for stage, spent in seconds.items()]

    def fact_rows(self) -> list[tuple[str, str]]:
        """Cells of a table: each fact and its share."""
        return [(words, percent(self.facts[name])) for name, words in FACTS.items()]

    def shares(self) -> list[tuple[str, ...]]:
        """Cells of a table: of losses and gradient norms, the shares of the largest rows and the effective size."""
        measured = (("losses", self.losses), ("gradient norms", self.gradients))
        return [
            (name, *(percent(found.top[number]) for number in TOP), percent(found.effective))
            for name, found in measured
            if found is not None
        ]

    def method_rows(self) -> list[tuple[str, ...]]:
        """Cells of a table under ``HEADINGS``, a row for each method."""
        return [
            (
                bound.method,
                percent(bound.rate),
                f"{bound.scorer_cost:.2f}",
                f"{bound.bound:.2f}x",
                f"{bound.speedup:.2f}x",
                "biased" if not bound.unbiased else "-" if bound.noise is None else f"{bound.noise:.2f}",
                percent(bound.saving),
            )
            for bound in self.methods
        ]


LEGEND = (
    "Kept: share of the rows trained on (of the targets, for head). Scoring: its cost in forward passes. At most: the "
    "largest speed-up of a sparse step here; measured: with the smaller batch's own time. Noise: mean square of the "
    "gradient over the dense one's; random rows have 1/kept. Saves: share of the whole run's time, its dense start and "
    "end included."
)


def recommend(times: StepTimes, methods: Sequence[MethodBound], run: PlannedRun) -> tuple[str, str, str]:
    """Choose the method that saves most without a bias or an assumption.

    Args:
        times: seconds of a step.
        methods: what each method could save.
        run: the run that savings are of.

    Returns:
        The method's name, the recommendation and the line of code that follows it.
    """
    shares = {stage: getattr(times, stage) / times.total for stage in STAGES}
    slowest = max(shares, key=shares.__getitem__)
    names = {"load": "waiting for the loader", "forward": "forward", "backward": "backward", "optimizer": "optimizer"}
    bound_by = f"{shares[slowest]:.0%} of a step is {names[slowest]}"
    worthwhile = [bound for bound in methods if bound.worthwhile]
    if not worthwhile:
        return "dense", f"Nothing to gain here: {_why_nothing(methods)}; {bound_by}.", run.code("dense")
    best = max(worthwhile, key=lambda bound: bound.saving)
    unread = ", and rows left out are not even read" if slowest == "load" and best.method == "infobatch" else ""
    text = (
        f"{_DOES[best.method].capitalize()} ({best.method}): it saves {best.saving:.0%} of the time of {run.epochs:g} "
        f"epochs without a bias; {bound_by}{unread}."
    )
    return best.method, text, best.code


def _why_nothing(methods: Sequence[MethodBound]) -> str:
    """Say why no method is worthwhile."""
    usable = [bound for bound in methods if bound.unbiased and not bound.assumes]
    if not usable:
        return "no method can leave rows out of these batches"
    if all(bound.noise is None for bound in usable):
        return "the rows' gradients were not seen, so nothing tells which of them matter"
    cheap = [bound for bound in usable if bound.saving >= LEAST_SAVING]
    if not cheap:
        return (
            "scoring costs as much as leaving rows out would save, and rows cannot be left out before they are loaded"
        )
    return "rows are too alike, so that leaving some out is no better than a shorter run"


def percent(share: float | None) -> str:
    """Format a share in percent; a dash where it is unknown."""
    return "-" if share is None else f"{share:.1%}"


def milliseconds(seconds: float) -> str:
    """Format seconds in milliseconds."""
    return f"{1e3 * seconds:.3g} ms"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lay cells out in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  " + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
