"""Verdicts of a study: every method against the baseline, task by task and over tasks.

Claims are of two families, each adjusted by Holm's method over all of a study's claims: that a method differs from
the baseline, two-sided, and that it is not worse by more than a margin, one-sided. The A/A test is not adjusted: there
an adjustment would hide a difference that should not be.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparse_training.experiments.design import AGAIN, BASELINE, RANDOM
from sparse_training.experiments.ladder import ladders
from sparse_training.experiments.statistics import LEVEL, Paired, crossed, holm, not_worse, paired

MARGIN = 0.005  # half a point: a method that loses no more counts as not worse
BETTER, WORSE, NOT_WORSE, UNDECIDED = "better", "worse", "not worse", "undecided"
WITHIN = "worse, within the margin"

Scores = Mapping[tuple[str, str, int], np.ndarray]  # of each test row, by task, method and seed


def verdicts(
    tasks: Mapping[str, Any], scores: Scores | None = None, *, margin: float = MARGIN, seconds: Mapping[str, float] = {}
) -> dict[str, Any]:
    """Compare every method with the baseline.

    Args:
        tasks: of each task, under "arms", the runs of each method by fraction, as in a study's result.
        scores: score of each test row in whole runs; where a run's are missing, intervals are of the seeds alone.
        margin: largest loss that counts as none, above 0. Default 0.005.
        seconds: budget of a whole run of each task. Default: not known.

    Returns:
        ``table``: a row for each task and method, with the paired test over the seeds that both have finished.
        ``again``: ``AGAIN`` against ``RANDOM``, which is the study's noise; None without it.
        ``score``: counts of tasks for each method.
        ``ladders``: times to a measure, by task, of tasks with several budgets.
    """
    scores = {} if scores is None else scores
    table = []
    for task, of_task in tasks.items():
        arms = {method: by_fraction["1"] for method, by_fraction in of_task["arms"].items()}
        base = {run["seed"]: run for run in arms.get(BASELINE, [])}
        rows = (_row(task, method, runs, base, scores, margin) for method, runs in arms.items() if base)
        table += [row for row in rows if row is not None]
    _judge(table, margin)
    timed = {task: ladders(of_task["arms"], seconds.get(task, 1.0), margin) for task, of_task in tasks.items()}
    return {
        "margin": margin,
        "baseline": BASELINE,
        "again": _again(tasks, scores),
        "score": _score(table),
        "table": table,
        "ladders": {task: ladder for task, ladder in timed.items() if ladder is not None},
    }


def _row(
    task: str,
    method: str,
    runs: Sequence[Mapping[str, Any]],
    base: Mapping[int, Mapping[str, Any]],
    scores: Scores,
    margin: float,
) -> dict[str, Any] | None:
    """One method on one task, against the baseline's whole runs by seed; None without a run of such a seed."""
    runs = [run for run in runs if run["seed"] in base]
    if not runs:
        return None
    accuracies = [run["accuracy"] for run in runs]
    row: dict[str, Any] = {
        "task": task,
        "arm": method,
        "n": len(runs),
        "accuracy": statistics.fmean(accuracies),
        "deviation": statistics.stdev(accuracies) if len(runs) > 1 else None,
        "validation": statistics.fmean(run["validation"] for run in runs),
        "difference": None,
        "validation_difference": None,
        "not_worse": None,
        "verdict": None,
    }
    if method != BASELINE:
        test = compared(task, method, BASELINE, runs, base, scores)
        chosen = (run["validation"] - base[run["seed"]]["validation"] for run in runs)
        safe = not_worse(test, margin)
        row["difference"], row["validation_difference"] = test.to_dict(), statistics.fmean(chosen)
        row["not_worse"] = None if safe is None else safe.to_dict()
    return row


def compared(
    task: str,
    ours: str,
    theirs: str,
    runs: Sequence[Mapping[str, Any]],
    base: Mapping[int, Mapping[str, Any]],
    scores: Scores,
) -> Paired:
    """Test one method against another on a task, by seeds and test rows, or by seeds alone where rows are unknown."""
    seeds = [run["seed"] for run in runs]
    pairs = [(scores.get((task, ours, seed)), scores.get((task, theirs, seed))) for seed in seeds]
    known = [one - other for one, other in pairs if one is not None and other is not None]
    if len(known) == len(pairs):
        return crossed(np.stack(known))
    return paired([run["accuracy"] for run in runs], [base[seed]["accuracy"] for seed in seeds])


def _judge(table: Sequence[dict[str, Any]], margin: float) -> None:
    """Adjust the claims' p-values for their number, and enter them and the verdicts into the rows."""
    claims = [row for row in table if row["arm"] not in (BASELINE, AGAIN)]
    differs = holm([row["difference"]["p"] for row in claims])
    safe = holm([None if row["not_worse"] is None else row["not_worse"]["p"] for row in claims])
    for row, p, p_safe in zip(claims, differs, safe, strict=True):
        row["difference"]["p_holm"] = p
        holds = p_safe is not None and p_safe < LEVEL / 2
        if row["not_worse"] is not None:
            row["not_worse"] |= {"p_holm": p_safe, "holds": holds}
        if p is None:
            continue
        mean = row["difference"]["mean"]
        if p < LEVEL:
            row["verdict"] = BETTER if mean > 0.0 else WITHIN if holds else WORSE
        else:
            row["verdict"] = NOT_WORSE if holds else UNDECIDED


def _again(tasks: Mapping[str, Any], scores: Scores) -> dict[str, Any] | None:
    """Test AGAIN against RANDOM: a difference between them is chance.

    ``differs`` names the tasks whose p is below 5%, unadjusted. ``all`` is the test over the pairs of all tasks
    together, by the spread of the pairs. ``noise`` is the largest half width of a task's 95% interval.
    """
    tests, pairs = {}, []
    for task, of_task in tasks.items():
        arms = of_task["arms"]
        base = {run["seed"]: run for run in arms.get(RANDOM, {}).get("1", [])}
        runs = [run for run in arms.get(AGAIN, {}).get("1", []) if run["seed"] in base]
        if runs:
            tests[task] = compared(task, AGAIN, RANDOM, runs, base, scores)
            pairs += [(run["accuracy"], base[run["seed"]]["accuracy"]) for run in runs]
    if not tests:
        return None
    whole = paired(*zip(*pairs, strict=True))
    differs = [task for task, test in tests.items() if test.p is not None and test.p < LEVEL]
    halves = [(test.high - test.low) / 2 for test in tests.values() if test.high is not None and test.low is not None]
    return {
        "tests": {task: test.to_dict() for task, test in tests.items()},
        "differs": differs,
        "all": whole.to_dict(),
        "noise": max(halves, default=None),
        "largest": max(abs(test.mean) for test in tests.values()),
        "passed": not differs and not (whole.p is not None and whole.p < LEVEL),
    }


def _score(table: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Count each method's verdicts over tasks; the mean difference on validation rows is what methods are chosen by."""
    score: dict[str, dict[str, Any]] = {}
    for method in dict.fromkeys(row["arm"] for row in table if row["arm"] not in (BASELINE, AGAIN)):
        rows = [row for row in table if row["arm"] == method]
        said = [row["verdict"] for row in rows]
        score[method] = {
            "tasks": len(rows),
            "better": said.count(BETTER),
            "not_worse": sum(row["not_worse"] is not None and row["not_worse"]["holds"] for row in rows),
            "undecided": said.count(UNDECIDED) + said.count(None),
            "worse": said.count(WORSE) + said.count(WITHIN),
            "worst": min(row["difference"]["mean"] for row in rows),
            "validation": statistics.fmean(row["validation_difference"] for row in rows),
        }
    return score
