"""Comparison: methods side by side on one data set, with equal weights, order of data and seconds of one clock."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparse_training.data.splits import ImageData
from sparse_training.experiments.design import Design
from sparse_training.experiments.formats import COMPARISON
from sparse_training.experiments.gallery import most_and_least
from sparse_training.experiments.runner import Progress, Runner, Stop, step_costs
from sparse_training.precision import scoring_dtype
from sparse_training.profiling.speedup import speedup_bound
from sparse_training.selection.policies.base import Policy
from sparse_training.training.clock import Costs

METHODS = ("dense", "random", "infobatch", "gate")
GALLERY_METHOD = "gate"
_OF_THE_RUNNER = ("task", "arm", "fraction", "planted")  # entries of a run that this format does not have


def comparison_design(methods: Sequence[str] = METHODS, **options: Any) -> Design:
    """Design of a comparison: every method is offered ``batch_size`` rows a step of the data as they are.

    Args:
        methods: policies by name or policy@scorer, each once.
        options: further fields of ``Design``.
    """
    return Design(tuple(methods), **options)


def compare(
    data: ImageData,
    design: Design,
    *,
    device: torch.device | str = "cpu",
    folder: str | Path | None = None,
    resume: bool = False,
    command: str = "",
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Train every method with every seed for equal seconds of one calibrated clock.

    Example:
        >>> result = compare(load_data("digits"), comparison_design(("dense", "infobatch"), seconds=5.0))

    Args:
        data: data set to train and test on.
        design: methods, seeds and settings; see ``comparison_design``.
        device: PyTorch device to train on. Default: the processor.
        folder: folder that finished runs are kept in. Default: none; an interrupted comparison is lost.
        resume: True to go on with what is missing in ``folder``, by the same calibration.
        command: command line to record in the result.
        progress: called after every step of every run with its cell and status. Default: none.
        stop: asked after every step; true ends the comparison. Default: none.

    Returns:
        The result as it is written to compare.json; every time in seconds, every rate a fraction.

    Raises:
        UserError: a method that cannot run, or a folder made with other settings.
        Interrupted: ``stop`` returned true.
    """
    runner = comparison_runner(data, design, folder=folder, device=device, resume=resume, command=command)
    runner.run(progress, stop)
    return comparison_result(runner)


def comparison_runner(
    data: ImageData,
    design: Design,
    *,
    folder: str | Path | None = None,
    device: torch.device | str = "cpu",
    resume: bool = False,
    command: str = "",
) -> Runner:
    """Make the runner of a comparison.

    Args:
        data: data set to train and test on.
        design: methods, seeds and settings.
        folder: folder that finished runs are kept in. Default: none.
        device: PyTorch device to train on. Default: the processor.
        resume: True to go on with what is missing in ``folder``.
        command: command line to record in the result.

    Raises:
        UserError: a method that cannot run, or a folder made with other settings.
    """
    return Runner(
        design,
        data,
        settings=comparison_settings(design, data, torch.device(device)),
        kind=COMPARISON.kind,
        folder=folder,
        resume=resume,
        device=device,
        command=command,
    )


def comparison_settings(design: Design, data: ImageData, device: torch.device) -> dict[str, Any]:
    """Settings of a comparison, under the names that results have."""
    return {
        "data": data.name,
        "source": data.source,
        "model": design.model,
        "policies": list(design.methods),
        "rate": design.rate,
        "batch_size": design.batch_size,
        "seconds": design.seconds,
        "seeds": list(design.seeds),
        "lr": design.lr,
        "warmup": design.dense_start,
        "anneal": design.dense_end,
        "amp": design.amp,
        "precision": str(scoring_dtype(design.precision, device) or torch.get_default_dtype()).removeprefix("torch."),
        "validation": design.validation,
        "train_rows": len(data.train),
        "test_rows": len(data.test),
        "optimizer": design.optimizer,
        "weight_decay": design.weight_decay,
        "momentum": design.momentum,
        "schedule": design.schedule,
        "lr_warmup": design.lr_warmup,
        "augment": design.augment,
    }


def comparison_result(runner: Runner) -> dict[str, Any]:
    """The result of a runner whose runs are all finished."""
    design, costs, finished = runner.design, runner.costs(), runner.finished()
    policies = {method: runner.policy(method, design.seeds[0]) for method in design.methods}
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in design.methods}
    data = runner.task("clean").data
    assert isinstance(data, ImageData)
    # The gallery is of the first gate, whatever its significance and its scorer.
    gates = [method for method in design.methods if method.partition("@")[0].partition(":")[0] == GALLERY_METHOD]
    shown = next(iter(gates), GALLERY_METHOD)
    counts = torch.zeros(2, len(data.train), dtype=torch.int64)  # times selected, times seen
    for cell, (run, by_row) in finished.items():
        runs[cell.method].append({name: value for name, value in run.items() if name not in _OF_THE_RUNNER})
        if cell.method == shown and "selected" in by_row:
            counts += torch.stack((by_row["selected"], by_row["seen"])).cpu()
    summaries = {method: _summary(some) for method, some in runs.items()}
    shares = {method: policy.target or summaries[method]["rate_mean"] or 1.0 for method, policy in policies.items()}
    return {
        **COMPARISON.header(command=runner.command, device=runner.device),
        "settings": runner.settings,
        "calibration": {"rounds": costs.rounds, "arms": _stages(costs, policies, shares, design.batch_size)},
        "speedup": _speedups(costs, policies, shares, design.batch_size),
        "arms": {method: {"runs": some, "summary": summaries[method]} for method, some in runs.items()},
        "gallery": {"arm": shown, **most_and_least(data, *counts)},
    }


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Means over a method's runs, and the standard deviation of the accuracy."""

    def mean(name: str) -> float | None:
        values = [run[name] for run in runs if run[name] is not None]
        return statistics.fmean(values) if values else None

    accuracies = [run["accuracy"] for run in runs]
    return {
        "accuracy_mean": mean("accuracy"),
        "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "seconds_mean": mean("seconds"),
        "raw_seconds_mean": mean("raw_seconds"),
        "rows_trained_mean": mean("rows_trained"),
        "rate_mean": mean("rate"),
    }


def _stages(
    costs: Costs, policies: Mapping[str, Policy], shares: Mapping[str, float], batch_size: int
) -> dict[str, dict[str, float]]:
    """Seconds of each stage of a dense step, and of each method's that keeps exactly its share of the batch.

    A policy that skips some batches and takes whole ones in between is charged the average.
    """
    steps = {"dense": costs.step("dense", batch_size, batch_size)}
    for method, policy in policies.items():
        steps[method] = step_costs(costs, method, policy, batch_size, max(1, round(shares[method] * batch_size)))
    return steps


def _speedups(
    costs: Costs, policies: Mapping[str, Policy], shares: Mapping[str, float], batch_size: int
) -> dict[str, dict[str, float]]:
    """Measured speed-up of each method's step beside its bound, under the names that results have.

    A policy that chooses before loading could at best be 1/r times as fast. A dense step counts as three forward
    passes, so a policy that scores with the model's own forward cannot exceed 3/(1+3r); with scoring that costs s
    forward passes, its own bound is 3/(s+3r).
    """
    speedups = {}
    for method, policy in policies.items():
        if method == "dense":
            continue
        bound = speedup_bound(costs, policy, batch_size=batch_size, rate=shares[method])
        speedups[method] = {"measured": bound.speedup, "ceiling": 1.0 / shares[method]}
        if not policy.before_loading:
            speedups[method] |= {
                "ceiling": 3.0 / (1.0 + 3.0 * (1.0 if policy.masks else shares[method])),
                "scorer_cost": bound.scorer_cost,
                "own_ceiling": bound.ceiling,
            }
    return speedups
