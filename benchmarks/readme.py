"""Rewrites the tables of README and the documentation from the recorded results that they name.

    python benchmarks/readme.py [--check]

A table stands between ``<!-- KIND: FILE -->`` or ``<!-- KIND ARGUMENT: FILE -->`` and ``<!-- end -->``. With --check
nothing is written, and the exit code is 1 where a page and its results differ. Kinds:

    results   the whole table of a record
    summary   at most six rows of it
    method    one method of a study, the argument, against the baseline
    roofline  bytes, operations and floors of a record of benchmarks
    memory    what each side of a record of the head takes besides its gradients
    original  one setting of a record of original_tables.py, the argument; or, as "claims", what was published
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import original_page

from sparse_training.experiments.formats import COMPARISON, STUDY
from sparse_training.reporting.result import read_result
from sparse_training.reporting.study import (
    again_line,
    headings,
    is_adjusted,
    ladder_lines,
    score_line,
    study_rows,
)
from sparse_training.reporting.text import interval, points, probability

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
BLOCK = re.compile(
    r"(<!-- (results|summary|method|roofline|memory|original)(?: (\S+))?: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL
)
TASKS = {  # of a study, as a reader knows them
    "clean": "clean",
    "noise": "wrong labels",
    "longtail": "long tail",
    "duplicated": "duplicates",
    "finetune": "fine-tuning",
    "imbalanced": "95:5",
    "longtail-alike": "long tail, test alike",
    "tabular": "table",
    "text": "text",
    "long": "long runs",
}
SUMMARY = ("clean", "noise", "longtail", "imbalanced", "text", "long")  # tasks of a study's summary
METHODS = (  # of a study's summary, where it has them
    *("dense", "random", "infobatch", "adaptive", "adaptive+denoise", "adaptive+deduplicate", "adaptive+balance"),
    *("importance", "gate"),
)
CASES = {  # of a summary of benchmarks: a few rows of the many
    "gate_rows-float32-1024x32000": "score 1,024×32,000, float32",
    "gate_rows-float32-4096x1000": "score 4,096×1,000, float32",
    "forward-backward-kept-bfloat16-1024x32000": "loss, entropy, gradient; 1,024×32,000, bfloat16",
    "row_stats-bfloat16-2048x151936-packages": "loss, entropy; 2,048×151,936, bfloat16",
    "compact-16M-flags": "indices of 16M flags",
}
STEP = "step-"  # beginning of the names of benchmarks of a training step
MEMORY = "MB besides the gradients"  # the note of a row that measured it
REFERENCES = ("best", "read", "copy")  # sides of a benchmark that do not do the same work, or repeat another


def source_line(record: Mapping[str, Any]) -> str:
    """Machine, version and date of a record of benchmarks."""
    machine = record["machine"]
    device = f"{machine['cpu']}, {machine['threads']} threads" if "cpu" in machine else machine["device"]
    return f"{device}, torch {machine['torch']}, {record['created']}."


def ratio_text(ratio: float) -> str:
    """Two significant digits where a ratio is below 1, one decimal above."""
    return f"{ratio:.{1 if ratio >= 1 else 2}f}"


def speed_table(record: Mapping[str, Any]) -> str:
    """One line per benchmark: how many times faster than each peer, and the targets; then the table of steps."""
    lines = ["| benchmark | times faster than | target |", "|---|---|---|"]
    for row in record["rows"]:
        ratios = row["ratios"]
        if MEMORY in row["notes"] or row["case"].startswith(STEP):
            continue
        peers = ", ".join(f"{name} {ratio_text(ratio)}" for name, ratio in ratios.items() if name != "read")
        targets = ", ".join(
            f"{name} {target:g} ({'met' if ratios[name] >= target else 'missed'})"
            for name, target in row["targets"].items()
            if name in ratios
        )
        absent = next((f"{k}: {v}" for k, v in row["notes"].items() if k in ("not served", "left out", "failed")), "-")
        lines.append(f"| {row['case']} | {peers or absent} | {targets or '-'} |".replace("ceiling", "bound"))
    return "\n".join([*lines, *step_table(record), "", source_line(record)])


def step_table(record: Mapping[str, Any]) -> list[str]:
    """One line per model and scorer, a column for each rate: times faster than dense, and the share of the bound."""
    steps = [row for row in record["rows"] if row["case"].startswith(STEP)]
    if not steps:
        return []
    rates = list(dict.fromkeys(name.partition(" at ")[2] for row in steps for name in row["ratios"]))
    heads = " | ".join(f"{rate} of the rows" for rate in rates)
    lines = ["", f"| step of a gate | {heads} | targets met |", "|---" * (2 + len(rates)) + "|"]
    for row in steps:
        ratios, targets = row["ratios"], row["targets"]
        cells = [f"{ratio_text(ratios[f'dense at {at}'])} ({ratios[f'share of ceiling at {at}']:.0%})" for at in rates]
        met = sum(ratios[name] >= target for name, target in targets.items())
        said = f"{met} of {len(targets)}" if targets else "-"
        lines.append(f"| {row['case'].removeprefix(STEP)} | {' | '.join(cells)} | {said} |")
    return lines


def speed_summary(record: Mapping[str, Any]) -> str:
    """One line for each of CASES: the ratio to the first peer, which is the usual form, and to the fastest."""
    lines = ["| operation | times as fast as | as the fastest form |", "|---|---|---|"]
    rows = {row["case"]: row for row in record["rows"]}
    for case, words in CASES.items():
        ratios = {
            name: ratio
            for name, ratio in rows[case]["ratios"].items()
            if not any(reference in name for reference in REFERENCES)
        }
        usual, fastest = next(iter(ratios)), min(ratios, key=lambda name: ratios[name])
        said = "eager" if usual == "eager" else usual
        lines.append(f"| {words} | {said}: {ratio_text(ratios[usual])} | {ratio_text(ratios[fastest])} |")
    return "\n".join([*lines, "", source_line(record)])


def roofline_table(record: Mapping[str, Any]) -> str:
    """One line per benchmark whose work is known: bytes, operations, their floors, and the measured time."""
    lines = [
        "| benchmark | MB | MFLOP | floor by bytes, ms | floor by arithmetic, ms | measured, ms | bound | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rate = record["machine"].get("flops_per_second")
    for row in record["rows"]:
        notes, seconds = row["notes"], row["seconds"]
        if "bytes" not in notes:
            continue
        by_bytes = floor_by_bytes(notes, seconds)
        flops = notes.get("flops")  # none where rows are only moved
        by_flops = flops / rate if flops and rate else 0.0
        measured = seconds["ours"]["p50"]
        lines.append(
            f"| {row['case']} | {notes['bytes'] / 1e6:.4g} | {f'{flops / 1e6:.4g}' if flops else '-'} "
            f"| {1e3 * by_bytes:.4g} | {f'{1e3 * by_flops:.4g}' if by_flops else '-'} | {1e3 * measured:.4g} "
            f"| {'bytes' if by_bytes >= by_flops else 'arithmetic'} | {max(by_bytes, by_flops) / measured:.0%} |"
        )
    return "\n".join([*lines, "", source_line(record)])


def memory_table(record: Mapping[str, Any]) -> str:
    """One line per side whose memory was measured, and the column of each shape."""
    rows = {row["case"].removeprefix("memory-head-"): row["notes"].get(MEMORY) for row in record["rows"]}
    taken = {shape: sides for shape, sides in rows.items() if sides}
    lines = [f"| MB besides the gradients | {' | '.join(taken)} |", "|---" * (1 + len(taken)) + "|"]
    names = dict.fromkeys(name for sides in taken.values() for name in sides)
    lines += [
        f"| {name} | {' | '.join(f'{sides[name]:,.0f}' if name in sides else '-' for sides in taken.values())} |"
        for name in names
    ]
    return "\n".join([*lines, "", source_line(record)])


def floor_by_bytes(notes: Mapping[str, Any], seconds: Mapping[str, Any]) -> float:
    """Seconds in which a benchmark's bytes can be moved: by its fastest read, its copy, or a copy of the device's."""
    if read := [side["p50"] for name, side in seconds.items() if name.startswith("read: ")]:
        return min(read) * notes["bytes"] / notes["logits"]
    if "copy" in seconds:  # of the same bytes
        return seconds["copy"]["p50"]
    return notes["bytes"] / notes["copy, bytes per second"]


def comparison_table(result: Mapping[str, Any]) -> str:
    """One line per method of ``sparse-train compare``: accuracy, rows, and step speed beside its bound."""
    lines = [
        "| method | accuracy % | clock s | raw s | rows trained | rate | step speed-up | bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, arm in result["arms"].items():
        summary, speed = arm["summary"], result["speedup"].get(name, {})
        deviation = summary["accuracy_std"]
        spread = "" if deviation is None else f" ± {100 * deviation:.2f}"
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
        f"{settings['batch_size']}, {settings['seconds']:g} s per method, {len(settings['seeds'])} seeds, "
        f"{environment['cpu']}, torch {environment['torch']}, {result['created'][:10]}.",
    ]
    return "\n".join(lines)


def study_source(result: Mapping[str, Any]) -> str:
    """Command, machine and date of a study."""
    settings, environment = result["settings"], result["environment"]
    return (
        f"`{result['command']}`: {settings['seconds']:g} s a run, {environment['cpu']}, "
        f"torch {environment['torch']}, {result['created'][:10]}."
    )


def study_table(result: Mapping[str, Any]) -> str:
    """One line per task and method of ``sparse-train study``, as it prints them, and the verdict on each method."""
    names = headings(result)
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in study_rows(result)]
    verdicts = [again_line(result), *(score_line(arm, score, result) for arm, score in result["score"].items())]
    lines += ["", *(f"- {verdict}" for verdict in (*verdicts, *ladder_lines(result))), "", study_source(result)]
    return "\n".join(lines)


def study_summary(result: Mapping[str, Any]) -> str:
    """One line per method: its difference from the baseline on each task, bold where chance does not explain it."""
    rows = {(row["task"], row["arm"]): row for row in result["table"]}
    tasks, baseline = [task for task in SUMMARY if task in result["tasks"]], result["baseline"]
    lines = [f"| method | {' | '.join(TASKS[task] for task in tasks)} |", "|---" * (1 + len(tasks)) + "|"]
    base = (f"{100 * rows[task, baseline]['accuracy']:.2f}%" for task in tasks)
    lines.append(f"| {baseline} | {' | '.join(base)} |")
    for method in METHODS:
        if method == baseline or not any((task, method) in rows for task in tasks):
            continue
        cells = (difference_cell(result, rows.get((task, method))) for task in tasks)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    settings = result["settings"]
    source = f"{len(settings['seeds'])} seeds, {settings['seconds']:g} s a run, {result['environment']['cpu']}"
    return "\n".join([*lines, "", f"{source}, {result['created'][:10]}."])


def difference_cell(result: Mapping[str, Any], row: Mapping[str, Any] | None) -> str:
    """A difference in points: bold where it is a claim that holds, "?" where neither it nor "not worse" is shown."""
    if row is None:
        return ""
    difference = row["difference"]
    text = points(difference["mean"])
    if is_adjusted(result):
        certain = row["verdict"] is not None and row["verdict"].startswith(("better", "worse"))
        text += "?" if row["verdict"] == "undecided" else ""
    else:
        certain = difference["low"] > 0.0 or difference["high"] < 0.0
    return f"**{text}**" if certain else text


def method_table(result: Mapping[str, Any], method: str) -> str:
    """One line per task: a method's measure, and its difference from the baseline's with interval, p and verdict."""
    baseline, adjusted = result["baseline"], is_adjusted(result)
    if method == baseline:
        method = "random"  # of the baseline's own page: the one against the other
    ends = "p (Holm) | verdict" if adjusted else "p"
    lines = [f"| task | {baseline}, % | {method}, % | difference, points | 95% interval | {ends} |"]
    lines.append("|---" * (7 if adjusted else 6) + "|")
    rows = {(row["task"], row["arm"]): row for row in result["table"]}
    for task, words in TASKS.items():
        if (row := rows.get((task, method))) is None:
            continue
        difference = row["difference"]
        p = probability(difference.get("p_holm", difference["p"]))
        cells = [
            words,
            f"{100 * rows[task, baseline]['accuracy']:.2f}",
            f"{100 * row['accuracy']:.2f}",
            points(difference["mean"]),
            interval(difference["low"], difference["high"]),
            p,
            *([row["verdict"] or "-"] if adjusted else []),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = len(result["settings"]["seeds"])
    lines += [
        "",
        f"Equal time, {seeds} seeds, {result['created'][:10]}; all methods: "
        "[training at equal time](../benchmarks/training.md).",
    ]
    return "\n".join(lines)


def render(kind: str, argument: str | None, path: str) -> str:
    """The table of one results file."""
    record = json.loads((ROOT / path).read_text())
    if record.get("format") == STUDY.name:
        record = read_result(ROOT / path, STUDY)
    if kind == "original":
        return original_page.claims_table() if argument == "claims" else original_page.table(record, argument or "")
    if kind == "memory":
        return memory_table(record)
    if kind == "roofline":
        return roofline_table(record)
    if kind == "method":
        return method_table(record, argument or "")
    if record.get("format") == STUDY.name:
        return study_summary(record) if kind == "summary" else study_table(record)
    if record.get("format") == COMPARISON.name:
        return comparison_table(record)
    return speed_summary(record) if kind == "summary" else speed_table(record)


def main() -> int:
    """Rewrite or check every page; 1 where --check finds a difference."""
    check, differ = "--check" in sys.argv[1:], False
    for page in PAGES:
        text = page.read_text()
        made = BLOCK.sub(lambda m: f"{m[1]}{render(m[2], m[3], m[4])}\n{m[5]}", text)
        if made != text:
            differ = True
            if check:
                print(f"{page.relative_to(ROOT)} differs from the recorded results", file=sys.stderr)
            else:
                page.write_text(made)
    return int(differ and check)


if __name__ == "__main__":
    sys.exit(main())
