"""Policies side by side: the same weights, the same order of data, the same seconds of one clock."""

from __future__ import annotations

import base64
import datetime
import io
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import sparse_kernels
from sparse_training.data.resident import ResidentLoader
from sparse_training.data.splits import ImageData
from sparse_training.errors import UserError
from sparse_training.experiments.store import Store
from sparse_training.models.build import build_model
from sparse_training.profiling.calibration import CALIBRATION_SECONDS, calibrate
from sparse_training.profiling.speedup import speedup_bound
from sparse_training.selection.policies.base import Policy
from sparse_training.selection.registry import make_policy, uses_rate
from sparse_training.trainer import SparseTrainer
from sparse_training.training.clock import Clock, Costs
from sparse_training.training.log import Status, TrainingLog
from sparse_training.training.settings import TrainerSettings

FORMAT, VERSION = "sparse-training-compare", 1
RESULT = "compare.json"
GALLERY_ROWS = 16
EVALUATION_BATCH = 1000
CALIBRATION_SHARE = 0.1

Progress = Callable[[str, int, Status], None]  # arm, seed, where its run is


class Interrupted(Exception):
    """A comparison was stopped; the runs it had finished are in its folder."""


def compare(
    data: ImageData,
    *,
    model: str = "cnn-620k",
    policies: Sequence[str] = ("dense", "random", "gate"),
    rate: float = 0.1,
    seeds: Sequence[int] = (0, 1, 2),
    seconds: float = 20.0,
    batch_size: int = 128,
    lr: float = 1e-3,
    dense_start: float = 0.05,
    dense_end: float = 0.125,
    precision: str = "auto",
    device: torch.device | str = "cpu",
    evaluations: int = 20,
    folder: str | Path | None = None,
    resume: bool = False,
    command: str = "",
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Train every policy with every seed for equal seconds of one calibrated clock.

    Args:
        data: what to train and test on.
        model: as for ``build_model``.
        policies: names in POLICIES, the arms.
        rate: fraction of rows that arms other than dense aim for.
        seconds: of the clock, for each run; evaluation is not charged.
        folder: where each finished run is kept, so that with ``resume`` an interrupted comparison
            goes on with what is missing, by the same calibration.
        command: what to record as having made the result.
        progress: called after every step of every run.
        stop: asked after every step.

    Returns:
        The result as it is written to compare.json; every time in seconds, every rate a fraction.

    Raises:
        UserError: an argument out of range, or a folder made with other settings.
        Interrupted: ``stop`` said so.
    """
    if not policies or len(set(policies)) != len(policies):
        raise UserError(f"policies {', '.join(policies) or 'none'}: wanted each name once, at least one")
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(f"seeds {', '.join(map(str, seeds)) or 'none'}: wanted each once, at least one")
    if not 0.0 < seconds < float("inf"):
        raise UserError(f"seconds {seconds}: wanted more than 0")
    device = torch.device(device)
    test = ResidentLoader(
        data.test,
        batch_size=min(EVALUATION_BATCH, len(data.test)),
        mean=data.mean,
        std=data.std,
        device=device,
        shuffle=False,
    )

    def make(policy: str, seed: int) -> tuple[SparseTrainer, ResidentLoader]:
        """Equal for equal seeds but for the policy."""
        torch.manual_seed(seed)
        network = build_model(model, shape=data.shape, classes=len(data.classes))
        trainer = SparseTrainer(
            network,
            policy=policy,
            rate=rate if uses_rate(policy) else None,
            dense_start=dense_start,
            dense_end=dense_end,
            lr=lr,
            device=device,
            seed=seed,
            settings=TrainerSettings(scoring_precision=precision),
        )
        loader = ResidentLoader(
            data.train,
            batch_size=batch_size,
            seed=seed,
            mean=data.mean,
            std=data.std,
            device=device,
        )
        return trainer, loader

    arms = {name: make_policy(name, rate=rate, seed=seeds[0]) for name in policies}
    trainer, loader = make(policies[0], seeds[0])
    settings = {
        "data": data.name,
        "source": data.source,
        "model": model,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "policies": list(policies),
        "rate": rate,
        "batch_size": batch_size,
        "seconds": seconds,
        "seeds": list(seeds),
        "lr": lr,
        "warmup": dense_start,
        "anneal": dense_end,
        "precision": str(trainer.scorer.dtype or torch.get_default_dtype()).removeprefix("torch."),
        "train_rows": len(data.train),
        "test_rows": len(data.test),
    }
    store = Store(None if folder is None else Path(folder), settings, resume)
    costs = store.costs()
    if costs is None:
        # A machine's mood may last seconds: the clock that all runs go by is worth a tenth of their time.
        share = CALIBRATION_SHARE * seconds * len(seeds) * len(policies)
        costs = store.keep_costs(calibrate(trainer, loader, arms, seconds=max(CALIBRATION_SECONDS, share)))

    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in policies}
    counts = torch.zeros(2, len(data.train), dtype=torch.int64)  # times selected, times seen
    for seed in seeds:
        for name in policies:
            found = store.run(f"{name}-{seed}")
            if found is None:
                trainer, loader = make(name, seed)
                history = trainer.fit(
                    loader,
                    seconds=seconds,
                    evaluate=test,
                    evaluations=evaluations,
                    clock=Clock(costs),
                    progress=None if progress is None else _about(progress, name, seed),
                    stop=stop,
                )
                if history.interrupted:
                    raise Interrupted
                run = _run(history, seed, trainer.policy.target)
                found = store.keep_run(f"{name}-{seed}", run, {"selected": history.selected, "seen": history.seen})
            run, by_row = found
            runs[name].append(run)
            if name == "gate" and by_row:
                counts += torch.stack((by_row["selected"], by_row["seen"])).cpu()
    summaries = {name: _summary(found) for name, found in runs.items()}
    shares = {name: arm.target or summaries[name]["rate_mean"] or 1.0 for name, arm in arms.items()}
    steps = stage_costs(costs, arms, shares, batch_size)
    return {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "environment": environment(device),
        "settings": settings,
        "calibration": {
            "rounds": costs.rounds,
            "arms": steps,
        },
        "speedup": _speedup(costs, arms, shares, batch_size),
        "arms": {name: {"runs": found, "summary": summaries[name]} for name, found in runs.items()},
        "gallery": _gallery(data, *counts),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """The versions, the machine and the backends that serve the kernels."""
    backends = {
        op: f"{found['active']} ({found['detail']})" if found.get("detail") else str(found["active"])
        for op, found in sparse_kernels.backend_info().items()
    }
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sparse_kernels": sparse_kernels.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "backends": backends,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, platform.processor() or platform.machine())}, {os.cpu_count()} cores"


def _about(progress: Progress, arm: str, seed: int) -> Callable[[Status], None]:
    return lambda status: progress(arm, seed, status)


def _run(history: TrainingLog, seed: int, target: float | None) -> dict[str, Any]:
    return {
        "seed": seed,
        "accuracy": history.evals[-1]["accuracy"],
        **history.to_dict(),
        "target": target,
    }


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
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


def stage_costs(
    costs: Costs, arms: Mapping[str, Policy], shares: Mapping[str, float], batch_size: int
) -> dict[str, dict[str, float]]:
    """Seconds of each stage of a step, dense and of each arm, that keeps exactly the arm's share of the batch.

    A policy that lets some batches go by and takes whole ones in between is charged the average.
    """
    steps = {"dense": costs.step("dense", batch_size, batch_size)}
    for name, arm in arms.items():
        kept = batch_size if arm.masks else max(1, round(shares[name] * batch_size))
        steps[name] = costs.step(name, kept if arm.before_loading else batch_size, kept, batch_size)
    return steps


def _speedup(
    costs: Costs, arms: Mapping[str, Policy], shares: Mapping[str, float], batch_size: int
) -> dict[str, dict[str, float]]:
    """Measured speed-up of a step beside its ceiling.

    A policy that chooses before loading could at best be 1/r times as fast. A dense step is taken as three
    forward passes, so one that scores with the model's own forward cannot exceed 3/(1+3r); with its
    scoring at s forward passes, 3/(s+3r) is its own ceiling.
    """
    found = {}
    for name, arm in arms.items():
        if name == "dense":
            continue
        reached = speedup_bound(costs, arm, batch_size=batch_size, rate=shares[name])
        found[name] = {"measured": reached.speedup, "ceiling": 1.0 / shares[name]}
        if not arm.before_loading:
            found[name] |= {
                "ceiling": 3.0 / (1.0 + 3.0 * (1.0 if arm.masks else shares[name])),
                "scorer_cost": reached.scorer_cost,
                "own_ceiling": reached.ceiling,
            }
    return found


def _gallery(data: ImageData, selected: Tensor, seen: Tensor) -> dict[str, Any]:
    """The training rows that the gate kept the largest and the smallest share of the times it saw them.

    Among equals those come first that it saw more often, then those with the lower row number.
    """
    known = seen.nonzero().squeeze(1).tolist()
    share = {row: selected[row].item() / seen[row].item() for row in known}

    def counted(row: int) -> dict[str, Any]:
        return {**picture(data, row), "selected": int(selected[row]), "seen": int(seen[row])}

    most = sorted(known, key=lambda row: (-share[row], -int(seen[row]), row))[:GALLERY_ROWS]
    least = sorted(known, key=lambda row: (share[row], -int(seen[row]), row))[:GALLERY_ROWS]
    return {
        "arm": "gate",
        "most": [counted(row) for row in most],
        "least": [counted(row) for row in least],
    }


def picture(data: ImageData, row: int) -> dict[str, Any]:
    """A training row for a gallery: its number, label, class and image."""
    label = int(data.train.labels[row])
    return {"index": row, "label": label, "class": data.classes[label], "png": _png(data.train.images[row])}


def _png(image: Tensor) -> str:
    """An image uint8 [1 or 3, H, W] as a PNG file in base64."""
    pixels = image.permute(1, 2, 0).squeeze(2).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
