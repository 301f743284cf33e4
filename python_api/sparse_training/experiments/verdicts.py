"""Verdicts of a study: every method against the baseline, task by task and over tasks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparse_training.experiments.design import AGAIN, BASELINE
from sparse_training.experiments.statistics import Curve, Paired, holm, paired, time_to_reach

ROUNDING = 1e-6  # of accuracies: runs keep six digits
MARGIN = 0.001  # a tenth of a point: a method that loses no more counts as not worse


def verdicts(tasks: Mapping[str, Any], fractions: Sequence[float]) -> dict[str, Any]:
    """Compare every method with the baseline.

    Args:
        tasks: of each task, under "arms", the runs of each method by fraction, as in a study's result.
        fractions: budgets of a run, as fractions of a whole one.

    Returns:
        ``table``: a row for each task and method, with the paired test over the seeds that both have finished.
        ``again``: ``AGAIN`` against the baseline, which is the study's noise; None without it.
        ``score``: counts of tasks for each method.
    """
    table = []
    for task, of_task in tasks.items():
        base = {run["seed"]: run for run in of_task["arms"][BASELINE]["1"]}
        if base:
            rows = (_row(task, method, runs, base, fractions) for method, runs in of_task["arms"].items())
            table += [row for row in rows if row is not None]
    return {"again": _again(tasks, table), "score": _score(table), "table": table}


def _row(
    task: str,
    method: str,
    by_fraction: Mapping[str, Sequence[Mapping[str, Any]]],
    base: Mapping[int, Mapping[str, Any]],
    fractions: Sequence[float],
) -> dict[str, Any] | None:
    """One method on one task, against the baseline's whole runs by seed; None without a run of such a seed."""
    runs = [run for run in by_fraction["1"] if run["seed"] in base]
    if not runs:
        return None
    accuracies = [run["accuracy"] for run in runs]
    aim = statistics.fmean(run["accuracy"] for run in base.values()) - ROUNDING
    row: dict[str, Any] = {
        "task": task,
        "arm": method,
        "n": len(runs),
        "accuracy": statistics.fmean(accuracies),
        "deviation": statistics.stdev(accuracies) if len(runs) > 1 else None,
        "difference": None,
        "reached": time_to_reach([curve(run) for run in runs], aim),
        "parts": {},
    }
    if method != BASELINE:
        row["difference"] = _paired_by_seed(runs, base).to_dict()
    for fraction in fractions:
        part = [run for run in by_fraction.get(f"{fraction:g}", []) if run["seed"] in base]
        if fraction == 1.0 or not part:
            continue
        test = _paired_by_seed(part, base)
        row["parts"][f"{fraction:g}"] = {
            "accuracy": statistics.fmean(run["accuracy"] for run in part),
            "reaches": test.mean >= 0.0,
            "difference": test.to_dict(),
        }
    return row


def _paired_by_seed(runs: Sequence[Mapping[str, Any]], base: Mapping[int, Mapping[str, Any]]) -> Paired:
    return paired([run["accuracy"] for run in runs], [base[run["seed"]]["accuracy"] for run in runs])


def curve(run: Mapping[str, Any]) -> Curve:
    """Accuracy of a run's evaluations, by the fraction of its budget that was spent."""
    end = run["evals"][-1]["seconds"]
    return (
        np.array([point["seconds"] / end for point in run["evals"]]),
        np.array([np.nan if point["accuracy"] is None else point["accuracy"] for point in run["evals"]]),
    )


def _again(tasks: Mapping[str, Any], table: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Test AGAIN against the baseline: a difference between them is chance.

    ``differs`` names the tasks whose p is below 5% after Holm's adjustment for the number of tasks. ``all`` is the
    test over the pairs of all tasks together. ``noise`` is the half width of the 95% interval of a mean over the
    seeds, from the deviation pooled over tasks.
    """
    rows = [row for row in table if row["arm"] == AGAIN]
    if not rows:
        return None
    pairs = []
    for row in rows:
        arms = tasks[row["task"]]["arms"]
        base = {run["seed"]: run["accuracy"] for run in arms[BASELINE]["1"]}
        pairs += [(run["accuracy"], base[run["seed"]]) for run in arms[AGAIN]["1"] if run["seed"] in base]
    whole = paired(*zip(*pairs, strict=True))
    adjusted = holm([row["difference"]["p"] for row in rows])
    differs = [row["task"] for row, p in zip(rows, adjusted, strict=True) if p is not None and p < 0.05]
    noise = None
    if whole.high is not None and whole.low is not None:
        noise = (whole.high - whole.low) / 2 * (whole.n / min(row["n"] for row in rows)) ** 0.5
    return {
        "differs": differs,
        "all": whole.to_dict(),
        "noise": noise,
        "largest": max(abs(row["difference"]["mean"]) for row in rows),
        "passed": not differs and not (whole.p is not None and whole.p < 0.05),
    }


def _score(table: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Count, for each method, the tasks on which it is not worse than the baseline, better, or as good in half."""
    score: dict[str, dict[str, Any]] = {}
    for method in dict.fromkeys(row["arm"] for row in table if row["arm"] not in (BASELINE, AGAIN)):
        rows = [row for row in table if row["arm"] == method]
        means = [row["difference"]["mean"] for row in rows]
        halves = [row["parts"]["0.5"]["reaches"] for row in rows if "0.5" in row["parts"]]
        score[method] = {
            "tasks": len(rows),
            "not_worse": sum(mean >= -MARGIN for mean in means),
            "worst": min(means),
            "better": sum(mean > 0.0 for mean in means),
            "surely_better": sum(mean > 0.0 and _below(row, 0.05) for mean, row in zip(means, rows, strict=True)),
            "surely_worse": sum(mean < 0.0 and _below(row, 0.05) for mean, row in zip(means, rows, strict=True)),
            "in_half": sum(row["reached"] is not None and row["reached"] <= 0.5 for row in rows),
            "half_runs": sum(halves) if halves else None,
        }
    return score


def _below(row: Mapping[str, Any], level: float) -> bool:
    p = row["difference"]["p"]
    return p is not None and p < level
