"""Study: methods on several tasks, each against dense training at equal cost, pair by pair of seeds and test rows.

Every method trains on about ``batch_size`` rows a step: one that keeps the fraction r of what it is offered is offered
``batch_size / r`` rows, one without a target ``batch_size``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparse_training.data.splits import ImageData
from sparse_training.errors import UserError
from sparse_training.experiments.design import AGAIN, BASELINE, RANDOM, Cell, Design, Plan
from sparse_training.experiments.formats import STUDY
from sparse_training.experiments.gallery import task_gallery
from sparse_training.experiments.runner import TEST_SCORES, Runner, step_costs
from sparse_training.experiments.store import Counts
from sparse_training.experiments.tasks import DEFAULT_TASKS
from sparse_training.experiments.verdicts import MARGIN, verdicts
from sparse_training.precision import PRECISIONS, scoring_dtype
from sparse_training.profiling.speedup import SpeedupBound, speedup_bound
from sparse_training.selection.policies.base import Policy

METHODS = (
    *(BASELINE, RANDOM, AGAIN, "infobatch"),
    *("adaptive+denoise", "adaptive+deduplicate", "adaptive+balance", "adaptive+denoise+deduplicate+balance"),
)
CHECKPOINT_STEPS = 500
LONGEST_CALIBRATION = 60.0  # seconds
TRACE_POINTS = 25
_FIXED = ("seconds", "batch_size", "lr", "evaluations")  # of a task's plan: they may not change when a study grows


def study_design(
    *,
    methods: Sequence[str] = METHODS,
    tasks: Sequence[str] = DEFAULT_TASKS,
    fractions: Sequence[float] = (1.0,),
    seeds: Sequence[int] = (0, 1, 2),
    amp: str = "auto",
    device: torch.device | str = "cpu",
    evaluations: int = 8,
    plans: Mapping[str, Plan] | None = None,
    **options: Any,
) -> Design:
    """Design of a study.

    Args:
        methods: policies by name or policy@scorer, and ``AGAIN``; ``BASELINE`` is always among them, and ``RANDOM``
            where ``AGAIN`` is.
        tasks: names in ``TASKS``. Default: those that any data set of images can give.
        fractions: budgets of a run, as fractions of ``seconds``; 1 is always among them.
        seeds: seeds of the runs.
        amp: precision of training and scoring; "auto" is bfloat16 where the hardware multiplies it natively.
        device: PyTorch device to train on.
        evaluations: number of evaluations of a whole run.
        plans: settings of single tasks that differ, by the task's name; their methods and fractions are completed in
            the same way. Default: none.
        options: further fields of ``Design``.

    Raises:
        UserError: a value out of range.
    """
    dtype = scoring_dtype(amp, torch.device(device))
    amp = next(name for name, known in PRECISIONS.items() if known == dtype)
    whole = {
        name: plan._replace(
            methods=None if plan.methods is None else _with_references(plan.methods),
            fractions=None if plan.fractions is None else _with_whole(plan.fractions),
        )
        for name, plan in (plans or {}).items()
    }
    return Design(
        methods=_with_references(methods),
        tasks=tuple(dict.fromkeys(tasks)),
        fractions=_with_whole(fractions),
        plans=whole,
        seeds=tuple(dict.fromkeys(seeds)),
        precision=amp,
        amp=None if amp == "float32" else amp,
        evaluations=evaluations,
        batch_size_counts="trained",
        checkpoint_interval=CHECKPOINT_STEPS,
        trace_points=TRACE_POINTS,
        calibration_limit=LONGEST_CALIBRATION,
        run_name="{task}-{method}-{fraction:g}-{seed}",
        **options,
    )


def _with_references(methods: Sequence[str]) -> tuple[str, ...]:
    """Methods, each once, behind those that they are compared with."""
    random = (RANDOM,) if RANDOM in methods or AGAIN in methods else ()
    return tuple(dict.fromkeys((BASELINE, *random, *methods)))


def _with_whole(fractions: Sequence[float]) -> tuple[float, ...]:
    """Fractions, the largest first, the whole among them."""
    return tuple(sorted({1.0, *fractions}, reverse=True))


def study_runner(
    data: ImageData,
    design: Design,
    *,
    folder: str | Path,
    device: torch.device | str = "cpu",
    resume: bool = False,
    command: str = "",
    shard: tuple[int, int] = (1, 1),
) -> Runner:
    """Make the runner of a study.

    Args:
        data: data set that the tasks are made of.
        design: see ``study_design``. Methods, tasks, fractions and seeds may grow when a study is resumed.
        folder: folder that everything is kept in.
        device: PyTorch device to train on. Default: the processor.
        resume: True to go on with what ``folder`` holds.
        command: command line to record in the result.
        shard: (i, n) to do every n-th missing run, from the i-th. Default: all of them.

    Raises:
        UserError: a method that cannot run, or a folder made with other settings.
    """
    return Runner(
        design,
        data,
        settings=study_settings(design, data, torch.device(device)),
        kind=STUDY.kind,
        folder=folder,
        resume=resume,
        device=device,
        command=command,
        shard=shard,
    )


def study_settings(design: Design, data: ImageData, device: torch.device) -> dict[str, Any]:
    """Settings of a study that may not change, under the names that results have."""
    return {
        "data": data.name,
        "source": data.source,
        "train_rows": len(data.train),
        "test_rows": len(data.test),
        "model": design.model,
        "rate": design.rate,
        "batch_size": design.batch_size,
        "seconds": design.seconds,
        "lr": design.lr,
        "schedule": design.schedule,
        "warmup": design.dense_start,
        "anneal": design.dense_end,
        "amp": design.precision,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "evaluations": design.evaluations,
        "validation": design.validation,
        "plans": {
            name: {key: value for key, value in plan._asdict().items() if key in _FIXED and value is not None}
            for name, plan in design.plans.items()
        },
    }


def study_result(runner: Runner, *, margin: float = MARGIN) -> dict[str, Any]:
    """The result of the finished runs, as it is written to study.json; times in seconds, the rest fractions.

    Args:
        runner: runner of the study.
        margin: largest loss against the baseline that counts as none, above 0. Default 0.005.

    Raises:
        UserError: no run of the baseline is finished yet.
    """
    design, finished = runner.design, runner.finished()
    if not any(cell.method == BASELINE and cell.fraction == 1.0 for cell in finished):
        raise UserError(f"{runner.folder} has no finished run of {BASELINE} yet; resume it")
    tasks = {name: _task_result(runner, name, finished) for name in design.tasks}
    scores = {
        (cell.task, cell.method, cell.seed): counts[TEST_SCORES].numpy()
        for cell, (_, counts) in finished.items()
        if TEST_SCORES in counts
    }
    benches = {bench: _calibration(runner, bench) for bench in runner.benches()}
    return {
        **STUDY.header(command=runner.command, device=runner.device),
        "settings": {
            **runner.settings,
            "tasks": list(design.tasks),
            "arms": list(design.every_method),
            "fractions": list(design.fractions),
            "seeds": list(design.seeds),
        },
        "missing": len(design.cells) - len(finished),
        "calibration": next(iter(benches.values())),
        "benches": benches,
        **verdicts(tasks, scores, margin=margin, seconds={name: design.plan(name).seconds for name in design.tasks}),
        "tasks": tasks,
    }


def _task_result(runner: Runner, name: str, finished: Mapping[Cell, tuple[dict[str, Any], Counts]]) -> dict[str, Any]:
    """One task: its description, its runs by method and fraction, and the galleries."""
    task, plan = runner.task(name), runner.design.plan(name)

    def runs(method: str, fraction: float) -> list[tuple[dict[str, Any], Counts]]:
        return [run for cell, run in finished.items() if cell[:3] == (name, method, fraction)]

    galleries = {method: task_gallery(task, [counts for _, counts in runs(method, 1.0)]) for method in plan.methods}
    return {
        "says": task.says,
        "measure": task.measure.name,
        "rows": len(task.data.train),
        "validation_rows": len(task.validation),
        "test_rows": len(task.data.test),
        "seconds": plan.seconds,
        "planted_name": task.planted_name,
        "planted_share": None if task.planted is None else task.planted.float().mean().item(),
        "arms": {
            method: {f"{fraction:g}": [run for run, _ in runs(method, fraction)] for fraction in plan.fractions}
            for method in plan.methods
        },
        "galleries": {method: gallery for method, gallery in galleries.items() if gallery},
    }


def _calibration(runner: Runner, bench: str) -> dict[str, Any]:
    """Each method's step that trains on exactly ``batch_size`` rows, and its bound, on a bench's first task."""
    costs, tasks = runner.costs(bench), runner.benches()[bench]
    task, plan = runner.task(tasks[0]), runner.design.plan(tasks[0])
    policies = {method: runner.policy(method) for method in plan.methods}
    offered = {method: runner.offered(policy, task) for method, policy in policies.items()}

    def stages(method: str, policy: Policy) -> dict[str, float]:
        return step_costs(costs, method, policy, offered[method], min(plan.batch_size, offered[method]))

    bounds = {
        method: speedup_bound(costs, policy, batch_size=offered[method], rate=policy.target)
        for method, policy in policies.items()
        if method != AGAIN and policy.target is not None and costs.reaches(offered[method])
    }
    return {
        "tasks": tasks,
        "rounds": costs.rounds,
        "arms": {method: stages(method, policy) for method, policy in policies.items()},
        "offered": offered,
        "ceilings": {method: _bound_entries(bound) for method, bound in bounds.items()},
    }


def _bound_entries(bound: SpeedupBound) -> dict[str, Any]:
    """A speed-up bound under the names that results have."""
    return {
        "policy": bound.policy,
        "rate": bound.rate,
        "scorer": bound.scorer,
        "scorer_cost": bound.scorer_cost,
        "ceiling": bound.ceiling,
        "speedup": bound.speedup,
        "share": bound.share,
    }
