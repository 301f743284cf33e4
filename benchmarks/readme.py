"""Rewrites README's tables from the recorded results that they name: ``python benchmarks/readme.py [--check]``.

A table stands between ``<!-- results: FILE -->`` and ``<!-- end -->``. With --check nothing is written, and
the exit code is 1 where README and results differ.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def speed_table(record: dict[str, Any]) -> str:
    """One line a benchmark: how many times faster than each peer, and what was aimed for."""
    lines = ["| benchmark | times faster than | aimed for |", "|---|---|---|"]
    for row in record["rows"]:
        peers = ", ".join(f"{name} {ratio:.1f}" for name, ratio in row["ratios"].items() if name != "read")
        aims = ", ".join(
            f"{name} {wanted:g} ({'met' if row['ratios'][name] >= wanted else 'missed'})"
            for name, wanted in row["targets"].items()
        )
        lines.append(f"| {row['case']} | {peers} | {aims or '-'} |")
    machine = record["machine"]
    lines += ["", f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, {record['created']}."]
    return "\n".join(lines)


def comparison_table(result: dict[str, Any]) -> str:
    """One line an arm of ``sparse-train compare``: accuracy, rows, and step speed beside its ceiling."""
    lines = [
        "| arm | accuracy % | clock s | wall s | rows trained | rate | step speed-up | ceiling |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, arm in result["arms"].items():
        summary, speed = arm["summary"], result["speedup"].get(name, {})
        deviation = summary["accuracy_std"]
        spread = "" if deviation is None else f" +- {100 * deviation:.2f}"
        rate = "-" if summary["rate_mean"] is None else f"{100 * summary['rate_mean']:.1f} %"
        lines.append(
            f"| {name} | {100 * summary['accuracy_mean']:.2f}{spread} | {summary['seconds_mean']:.1f} "
            f"| {summary['raw_seconds_mean']:.1f} | {summary['rows_trained_mean']:,.0f} | {rate} "
            f"| {speed.get('measured', 1.0):.2f} | {speed.get('ceiling', 1.0):.2f} |"
        )
    settings, environment = result["settings"], result["environment"]
    lines += [
        "",
        f"`{result['command']}`: {settings['model']} ({settings['parameters']:,} parameters), batches of "
        f"{settings['batch_size']}, {settings['seconds']:g} s an arm, {len(settings['seeds'])} seeds, "
        f"{environment['cpu']}, torch {environment['torch']}, {result['created'][:10]}.",
    ]
    return "\n".join(lines)


def render(path: str) -> str:
    """The table of one results file."""
    record = json.loads((ROOT / path).read_text())
    return comparison_table(record) if record.get("format") == "sparse-training-compare" else speed_table(record)


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text()
    made = BLOCK.sub(lambda m: f"{m[1]}{render(m[2])}\n{m[3]}", text)
    if "--check" in sys.argv[1:]:
        return int(made != text)
    readme.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
