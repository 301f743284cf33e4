"""Tables of a record of ``original_tables.py``, for docs/benchmarks/original.md."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from original_tables import SETTINGS, Method

from sparse_training.experiments.original import CLAIMS

COMMAND = "python benchmarks/original_tables.py"
WORDS = {  # of methods whose name says too little
    "infobatch": "unbiased pruning (`infobatch`)",
    "masked": "the original's step (`masked`)",
    "coin": "random rows, a step each (`coin`)",
    "probe": "every hundredth row, a step each (`probe`)",
    "sundew": "the original's gate (`sundew`)",
    "standalone": "the original's gate (`standalone`)",
}


def table(record: Mapping[str, Any], name: str) -> str:
    """One line per method of a setting: rows trained on, accuracy, measured time, and the arguments that run it."""
    times = {(t["setting"], t["method"], t["rate"]): t["ratio"] for t in record.get("times", ())}
    lines = [
        "| method | target, % | trained on, % | accuracy, % | seconds an epoch, dense = 1 | arguments |",
        "|---|---|---|---|---|---|",
    ]
    for method in SETTINGS[name].methods:
        runs = [r for r in record["runs"] if (r["setting"], r["method"], r["rate"]) == (name, method.name, method.rate)]
        if not runs:
            continue
        found = [100 * run["accuracy"] for run in runs]
        spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
        kept = 100 * sum(run["trained"] for run in runs) / sum(run["offered"] for run in runs)
        ratio = times.get((name, method.name, method.rate))
        cells = [
            WORDS.get(method.name, f"`{method.name}`"),
            "-" if method.rate is None else f"{100 * method.rate:.1f}",
            f"{kept:.1f}",
            f"{statistics.mean(found):.1f}{spread}",
            "-" if ratio is None else f"{ratio:.2f}",
            f"`{_arguments(name, method)}`",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = len({run["seed"] for run in record["runs"]})
    environment = record["environment"]
    lines += [
        "",
        f"`{COMMAND}`: {record['rows']:,} training rows of {record['data']}, its whole test set, {seeds} seeds, "
        f"{record['threads']} thread, {environment['cpu']}, torch {environment['torch']}, {record['created']}.",
    ]
    return "\n".join(lines)


def _arguments(name: str, method: Method) -> str:
    rate = "" if method.rate is None else f" --rate {method.rate:g}"
    return f"--setting {name} --method {method.name}{rate}"


def claims_table() -> str:
    """One line per published claim."""
    lines = ["| setting | active, % | speed-up | accuracy, % | what it was |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        cells = [
            claim.setting,
            "-" if claim.rate is None else f"{100 * claim.rate:.1f}",
            " or ".join(f"{speedup:g}" for speedup in claim.speedups) or "-",
            "-" if claim.accuracy is None else f"{100 * claim.accuracy:.2f}",
            claim.basis,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
