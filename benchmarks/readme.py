"""Rewrites the tables of README and row_stats.md from the recorded results that they name.

    python benchmarks/readme.py [--check]

A table stands between ``<!-- results: FILE -->`` or ``<!-- roofline: FILE -->`` and ``<!-- end -->``. With --check
nothing is written, and the exit code is 1 where a page and its results differ.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from sparse_training.experiments.formats import COMPARISON, STUDY
from sparse_training.reporting.study import again_line, headings, score_line, study_rows

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "row_stats.md")
BLOCK = re.compile(r"(<!-- (results|roofline): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def source_line(record: dict[str, Any]) -> str:
    """Name the machine, the version of PyTorch and the date of a record."""
    machine = record["machine"]
    device = f"{machine['cpu']}, {machine['threads']} threads" if "cpu" in machine else machine["device"]
    return f"{device}, torch {machine['torch']}, {record['created']}."


def speed_table(record: dict[str, Any]) -> str:
    """One line a benchmark: how many times faster than each peer, and what was aimed for."""
    lines = ["| benchmark | times faster than | aimed for |", "|---|---|---|"]
    for row in record["rows"]:
        ratios = row["ratios"]
        peers = ", ".join(
            f"{name} {ratio:.{1 if ratio >= 1 else 2}f}" for name, ratio in ratios.items() if name != "read"
        )
        aims = ", ".join(
            f"{name} {wanted:g} ({'met' if ratios[name] >= wanted else 'missed'})"
            for name, wanted in row["targets"].items()
            if name in ratios
        )
        absent = next((f"{k}: {v}" for k, v in row["notes"].items() if k in ("not served", "left out", "failed")), "-")
        lines.append(f"| {row['case']} | {peers or absent} | {aims or '-'} |")
    return "\n".join([*lines, "", source_line(record)])


def roofline_table(record: dict[str, Any]) -> str:
    """One line a benchmark whose work is known: bytes, operations, the floors that they set, and what was measured."""
    lines = [
        "| benchmark | MB | MFLOP | floor by bytes, ms | floor by arithmetic, ms | measured, ms | share of the floor |",
        "|---|---|---|---|---|---|---|",
    ]
    rate = record["machine"].get("flops_per_second")
    for row in record["rows"]:
        notes, seconds = row["notes"], row["seconds"]
        read = [side["p50"] for name, side in seconds.items() if name.startswith("read: ")]
        if "flops" not in notes:
            continue
        if read:
            by_bytes = min(read) * notes["bytes"] / notes["logits"]
        else:
            by_bytes = notes["bytes"] / notes["copy, bytes per second"]
        by_flops = notes["flops"] / rate if rate else 0.0
        measured = seconds["ours"]["p50"]
        lines.append(
            f"| {row['case']} | {notes['bytes'] / 1e6:.4g} | {notes['flops'] / 1e6:.4g} | {1e3 * by_bytes:.4g} "
            f"| {f'{1e3 * by_flops:.4g}' if rate else '-'} | {1e3 * measured:.4g} "
            f"| {max(by_bytes, by_flops) / measured:.0%} |"
        )
    return "\n".join([*lines, "", source_line(record)])


def comparison_table(result: dict[str, Any]) -> str:
    """One line for each method of ``sparse-train compare``: accuracy, rows, and step speed-up beside its bound."""
    lines = [
        "| method | accuracy % | clock s | wall s | rows trained | rate | step speed-up | its bound |",
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
        f"{settings['batch_size']}, {settings['seconds']:g} s a method, {len(settings['seeds'])} seeds, "
        f"{environment['cpu']}, torch {environment['torch']}, {result['created'][:10]}.",
    ]
    return "\n".join(lines)


def study_table(result: dict[str, Any]) -> str:
    """One line for each task and method of ``sparse-train study``, as it prints them, and each method's score."""
    names = headings(result)
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in study_rows(result)]
    lines += ["", again_line(result), *(score_line(arm, score) for arm, score in result["score"].items())]
    settings, environment = result["settings"], result["environment"]
    lines += [
        "",
        f"`{result['command']}`: {settings['seconds']:g} s a run, {environment['cpu']}, "
        f"torch {environment['torch']}, {result['created'][:10]}.",
    ]
    # A line of its own each: a page would run them together.
    return "\n".join(f"{line}  " if line and not line.startswith("|") else line for line in lines)


def render(kind: str, path: str) -> str:
    """The table of one results file."""
    record = json.loads((ROOT / path).read_text())
    if kind == "roofline":
        return roofline_table(record)
    if record.get("format") == STUDY.name:
        return study_table(record)
    return comparison_table(record) if record.get("format") == COMPARISON.name else speed_table(record)


def main() -> int:
    differ = False
    for page in PAGES:
        text = page.read_text()
        made = BLOCK.sub(lambda m: f"{m[1]}{render(m[2], m[3])}\n{m[4]}", text)
        differ |= made != text
        if "--check" not in sys.argv[1:]:
            page.write_text(made)
    return int(differ and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
