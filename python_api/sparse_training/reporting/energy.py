"""Energy and floating-point operations of runs, as table rows and a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparse_training.reporting.text import DASH, mean, number

# Of a run: the entry, how its amount was obtained, and heading, unit and scale in the table.
_AMOUNTS = (("joules", "measured", "joules", "measured", 1.0), ("flops", "counted", "FLOPs", "counted, 10⁹", 1e-9))


def energy_rows(runs: Mapping[str, Sequence[Any]]) -> tuple[list[tuple[str, ...]], list[tuple[str, str]]]:
    """Joules and FLOPs of a run, as means over each method's runs.

    Args:
        runs: runs of each method.

    Returns:
        A row for each method, and the headings. There are no rows where no run has either amount, and no column for
        an amount that none has.
    """
    present = [kind for kind in _AMOUNTS if any(_amount(run, *kind[:2]) is not None for run in _all(runs))]
    rows: list[tuple[str, ...]] = []
    for method, some in runs.items() if present else ():
        cells = [method]
        for entry, how, _, _, scale in present:
            known = [value for run in some if (value := _amount(run, entry, how)) is not None]
            cells.append(number(mean(known), ",.4g", scale) if known else DASH)
        rows.append(tuple(cells))
    return rows, [("method", ""), *((heading, unit) for _, _, heading, unit, _ in present)]


def energy_line(runs: Mapping[str, Sequence[Any]]) -> str:
    """Say whether energy was measured, and by which meter."""
    meters = dict.fromkeys(
        run["joules"].get("by") or "a meter" for run in _all(runs) if _amount(run, "joules", "measured") is not None
    )
    if not meters:
        return "No energy was measured, and a skipped row is not counted as energy."
    return f"Joules are measured ({', '.join(meters)}), without evaluation; a skipped row is not counted as energy."


def _all(runs: Mapping[str, Sequence[Any]]) -> list[Any]:
    return [run for some in runs.values() for run in some]


def _amount(run: Mapping[str, Any], entry: str, how: str) -> float | None:
    """An amount of a run; None where it was neither measured nor counted."""
    amounts = run.get(entry)
    amount: float | None = amounts.get(how) if isinstance(amounts, Mapping) else None
    return amount
