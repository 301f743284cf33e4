"""Policies on tasks: every arm against random at equal cost, pair by pair of seeds.

Equal cost is equal seconds of one calibrated clock. Equal steps are steps that train on equally many rows:
an arm that keeps the fraction r of what it is offered is offered ``batch_size / r`` rows a step, an arm without a
target ``batch_size``, so that every arm trains on about ``batch_size`` rows a step, and pays besides for what it
scores and loads. Warm-up and anneal steps train on ``batch_size`` rows taken as they come. ``random`` is thus RS2
(a fresh random subset in every pass), and ``dense`` the same without repetition.
"""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparse_training.data.resident import ResidentLoader
from sparse_training.data.splits import ImageData
from sparse_training.errors import UserError
from sparse_training.experiments.compare import EVALUATION_BATCH, environment, picture
from sparse_training.experiments.statistics import Curve, holm, paired, time_to_reach
from sparse_training.experiments.store import RUNS, Counts, Store
from sparse_training.experiments.tasks import TASKS, Task, make_task
from sparse_training.models.build import build_model
from sparse_training.precision import PRECISIONS, scoring_dtype
from sparse_training.profiling.calibration import CALIBRATION_SECONDS, calibrate
from sparse_training.profiling.speedup import speedup_bound
from sparse_training.selection.policies.base import Policy
from sparse_training.selection.registry import make_policy, uses_rate
from sparse_training.selection.types import CandidateIndices, WeightedIndices
from sparse_training.trainer import SparseTrainer
from sparse_training.training.checkpoint import load_checkpoint, save_checkpoint
from sparse_training.training.clock import Clock, Costs
from sparse_training.training.log import Status, TrainingLog
from sparse_training.training.settings import TrainerSettings
from sparse_training.training.state import CHECKPOINT

FORMAT, VERSION = "sparse-training-study", 1
RESULT, START = "study.json", "start"
BASE, AGAIN = "random", "random-again"  # what all is measured against, and the same with other draws
WHOLE = "whole"  # what a dense step on all that is offered is timed as
OTHER_DRAWS = 1_000_003  # added to the seed of the draws of AGAIN
ARMS = ("dense", BASE, AGAIN, "adaptive", "infobatch", "importance", "gate")
ROUNDING = 1e-6  # of accuracies: runs keep six digits
MARGIN = 0.001  # a tenth of a point: what an arm may lose and still count as not worse
CHECKPOINT_STEPS = 500
LONGEST_CALIBRATION = 60.0
TRACE_POINTS, GALLERY_ROWS, TOP = 25, 12, 100

Progress = Callable[["Cell", Status], None]


class Interrupted(Exception):
    """A study was stopped; finished runs and the checkpoint of the one in progress are in its folder."""


class Cell(NamedTuple):
    """One run of a study."""

    task: str
    arm: str
    fraction: float  # of the seconds, the whole schedule with it
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.arm}-{self.fraction:g}-{self.seed}"


class Uniform(Policy):
    """As many rows of each batch, the first ones, which are any rows, for loaders shuffle."""

    name = "dense"

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    @property
    def before_loading(self) -> bool:
        return True

    def choose(self, offer: CandidateIndices) -> WeightedIndices:
        return WeightedIndices(offer.ids[: self.rows])


class Study:
    """Runs what is missing of a study and reads what is there.

    Args:
        data: what the tasks are made of.
        tasks, arms, fractions, seeds: one run for each of all of them; arms are policies, by name or
            policy@scorer, and AGAIN. ``BASE`` is always among the arms, and 1 among the fractions. All
            four may grow when a study is resumed.
        rate: the fraction that arms with a target keep of what they are offered.
        batch_size: rows trained a step.
        seconds: of the clock, for a run of fraction 1.
        amp: of training and scoring; "auto" is bfloat16 where the hardware multiplies it natively.
        evaluations: of a run of fraction 1; not charged.
        folder: where everything is kept.
        command: what to record as having made the result.

    Raises:
        UserError: an argument out of range, or a folder made with other settings.
    """

    def __init__(
        self,
        data: ImageData,
        *,
        folder: str | Path,
        tasks: Sequence[str] = tuple(TASKS),
        arms: Sequence[str] = ARMS,
        fractions: Sequence[float] = (1.0,),
        seeds: Sequence[int] = (0, 1, 2),
        model: str = "cnn-620k",
        rate: float = 0.1,
        batch_size: int = 128,
        seconds: float = 20.0,
        lr: float = 1e-3,
        dense_start: float = 0.05,
        dense_end: float = 0.125,
        amp: str = "auto",
        device: torch.device | str = "cpu",
        evaluations: int = 8,
        resume: bool = False,
        command: str = "",
    ) -> None:
        if unknown := [name for name in tasks if name not in TASKS]:
            raise UserError(f"task {unknown[0]!r}: wanted some of {', '.join(TASKS)}")
        if not tasks or not seeds:
            raise UserError(f"{'no task' if not tasks else 'no seed'}: wanted at least one")
        if bad := [fraction for fraction in fractions if not 0.0 < fraction <= 1.0]:
            raise UserError(f"fraction {bad[0]}: wanted more than 0 and at most 1")
        if not 0.0 < seconds < float("inf"):
            raise UserError(f"seconds {seconds}: wanted more than 0")
        self.data, self.device = data, torch.device(device)
        self.tasks, self.seeds = tuple(dict.fromkeys(tasks)), tuple(dict.fromkeys(seeds))
        self.arms = tuple(dict.fromkeys((*(arm for arm in arms if arm == "dense"), BASE, *arms)))
        self.fractions = tuple(sorted({1.0, *fractions}, reverse=True))
        self.command = command
        found = scoring_dtype(amp, self.device)
        self.amp = next(name for name, dtype in PRECISIONS.items() if dtype == found)
        self.settings: dict[str, Any] = {
            "data": data.name,
            "source": data.source,
            "train_rows": len(data.train),
            "test_rows": len(data.test),
            "model": model,
            "rate": rate,
            "batch_size": batch_size,
            "seconds": seconds,
            "lr": lr,
            "schedule": "cosine",
            "warmup": dense_start,
            "anneal": dense_end,
            "amp": self.amp,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "evaluations": evaluations,
        }
        self._tasks: dict[str, Task] = {}
        for arm in self.arms:  # what can be refused is refused before the folder is made
            trainer, _ = self._make(data, arm, 0)
        self.settings["parameters"] = sum(parameter.numel() for parameter in trainer.model.parameters())
        self.folder = Path(folder)
        self.store = Store(self.folder, self.settings, resume, "study")

    # --- what is run ----------------------------------------------------------------------------

    @property
    def cells(self) -> list[Cell]:
        """Every run, in order: all tasks and arms of one seed before the next seed, so that a part is a study too."""
        return [
            Cell(task, arm, fraction, seed)
            for seed in self.seeds
            for fraction in self.fractions
            for task in self.tasks
            for arm in self.arms
        ]

    def missing(self) -> list[Cell]:
        return [cell for cell in self.cells if not self.store.path(cell.name).exists()]

    def run(self, progress: Progress | None = None, stop: Callable[[], bool] | None = None) -> None:
        """Do what is missing; a run in progress goes on from its checkpoint.

        Args:
            progress: called after every step of every run.
            stop: asked after every step.

        Raises:
            Interrupted: ``stop`` said so.
        """
        costs = self.costs()
        for cell in self.missing():
            self._run(cell, costs, progress, stop)

    def costs(self) -> Costs:
        """The clock of all runs: the folder's, or made now, which wants an idle machine.

        Raises:
            UserError: the folder's knows nothing of one of the arms.
        """
        costs = self.store.costs()
        if costs is not None:
            if unknown := [arm for arm in self.arms if policy_of(arm) not in costs.own]:
                raise UserError(
                    f"{self.folder} was calibrated for {', '.join(costs.own)}: wanted no {unknown[0]}, or a new folder"
                )
            return costs
        trainer, loader = self._make(self.data, BASE, self.seeds[0])
        names = dict.fromkeys(("dense", *map(policy_of, self.arms)))
        policies = {name: make_policy(name, rate=self.settings["rate"], seed=self.seeds[0]) for name in names}
        loaders = {name: self._loader(self.data, name, self.seeds[0]) for name in names}
        most = max(loaders.values(), key=lambda one: one.batch_size)
        if most.batch_size > self.settings["batch_size"]:
            policies[WHOLE], loaders[WHOLE] = Policy(), most
            policies[WHOLE].name = WHOLE
        share = 0.1 * self.settings["seconds"] * len(self.arms) * len(self.seeds)
        seconds = max(CALIBRATION_SECONDS, min(LONGEST_CALIBRATION, share))
        return self.store.keep_costs(calibrate(trainer, loader, policies, loaders=loaders, seconds=seconds))

    def task(self, name: str) -> Task:
        if name not in self._tasks:
            self._tasks[name] = make_task(name, self.data)
        return self._tasks[name]

    def _offered(self, policy: Policy, data: ImageData) -> int:
        """Rows offered a step, so that about batch_size of them are trained on."""
        wanted: float = self.settings["batch_size"] / (policy.target or 1.0)
        return min(round(wanted), len(data.train))

    def _loader(self, data: ImageData, arm: str, seed: int) -> ResidentLoader:
        policy = make_policy(policy_of(arm), rate=self.settings["rate"], seed=seed)
        return ResidentLoader(
            data.train,
            batch_size=self._offered(policy, data),
            seed=seed,
            mean=data.mean,
            std=data.std,
            device=self.device,
            drop_last=True,  # every step of a run is as large
        )

    def _make(self, data: ImageData, arm: str, seed: int) -> tuple[SparseTrainer, ResidentLoader]:
        """Equal for equal seeds but for the policy and how many rows it is offered."""
        given = self.settings
        torch.manual_seed(seed)
        trainer = SparseTrainer(
            build_model(given["model"], shape=data.shape, classes=len(data.classes)),
            policy=policy_of(arm),
            rate=given["rate"] if uses_rate(policy_of(arm)) else None,
            dense_start=given["warmup"],
            dense_end=given["anneal"],
            lr=given["lr"],
            schedule=given["schedule"],
            device=self.device,
            seed=seed + OTHER_DRAWS * (arm == AGAIN),
            settings=TrainerSettings(
                scoring_precision=given["amp"], amp=None if given["amp"] == "float32" else given["amp"]
            ),
        )
        trainer.dense = Uniform(given["batch_size"])
        return trainer, self._loader(data, arm, seed)

    def _test(self, data: ImageData) -> ResidentLoader:
        rows = min(EVALUATION_BATCH, len(data.test))
        facts: dict[str, Any] = {"mean": data.mean, "std": data.std, "device": self.device}
        return ResidentLoader(data.test, batch_size=rows, shuffle=False, **facts)

    def _run(
        self, cell: Cell, costs: Costs, progress: Progress | None, stop: Callable[[], bool] | None
    ) -> dict[str, Any]:
        task = self.task(cell.task)
        if task.start_rows:
            start = self._start(task, costs, progress, stop)
        trainer, loader = self._make(task.data, cell.arm, cell.seed)
        if task.start_rows:
            trainer.model.load_state_dict(start)
        history = self._fit(cell, trainer, loader, costs, cell.fraction, progress, stop, test=self._test(task.data))
        counts = {"selected": history.selected, "seen": history.seen, "losses": _known_losses(trainer.policy)}
        found = {name: count.cpu() for name, count in counts.items() if isinstance(count, Tensor)}
        run = {
            **cell._asdict(),
            "accuracy": history.evals[-1]["accuracy"],
            **_thinned(history.to_dict()),
            "target": trainer.policy.target,
            "planted": None if task.planted is None else _precision(task.planted, found),
        }
        self.store.keep_run(cell.name, run, found if cell.fraction == 1.0 else {})
        _clear(self.store.checkpoints(cell.name))
        return run

    def _start(
        self, task: Task, costs: Costs, progress: Progress | None, stop: Callable[[], bool] | None
    ) -> dict[str, Any]:
        """The weights that every run of a task starts from: half a run, dense, on the first rows."""
        path = self.folder / RUNS / f"{task.name}-{START}.pt"
        if not path.exists():
            cell = Cell(task.name, START, 0.5, 0)
            trainer, _ = self._make(task.data, "dense", cell.seed)
            split = task.data.train
            first = type(split)(split.images[: task.start_rows], split.labels[: task.start_rows])
            facts: dict[str, Any] = {"mean": task.data.mean, "std": task.data.std, "device": self.device}
            loader = ResidentLoader(first, batch_size=min(self.settings["batch_size"], len(first)), **facts)
            self._fit(cell, trainer, loader, costs, cell.fraction, progress, stop)
            save_checkpoint(path, trainer.model.state_dict())
            _clear(self.store.checkpoints(cell.name))
        return load_checkpoint(path, self.device)

    def _fit(
        self,
        cell: Cell,
        trainer: SparseTrainer,
        loader: ResidentLoader,
        costs: Costs,
        fraction: float,
        progress: Progress | None,
        stop: Callable[[], bool] | None,
        test: ResidentLoader | None = None,
    ) -> TrainingLog:
        history = trainer.fit(
            loader,
            seconds=fraction * self.settings["seconds"],
            evaluate=test,
            evaluations=max(1, round(fraction * self.settings["evaluations"])),
            clock=Clock(costs),
            checkpoint=self.store.checkpoints(cell.name),
            checkpoint_interval=CHECKPOINT_STEPS,
            resume=True,
            progress=None if progress is None else lambda status: progress(cell, status),
            stop=stop,
        )
        if history.interrupted:
            raise Interrupted
        return history

    # --- what is said of it ---------------------------------------------------------------------

    def result(self) -> dict[str, Any]:
        """What the finished runs say, as it is written to study.json; times in seconds, the rest fractions.

        Raises:
            UserError: no arm has a run beside one of ``BASE`` yet.
        """
        costs = self.costs()
        read = {cell: found for cell in self.cells if (found := self.store.run(cell.name)) is not None}
        runs = {cell: run for cell, (run, _) in read.items()}
        if not any(cell.arm == BASE and cell.fraction == 1.0 for cell in runs):
            raise UserError(f"{self.folder} has no finished run of {BASE} yet: resume it")
        policies = {arm: make_policy(policy_of(arm), rate=self.settings["rate"], seed=0) for arm in self.arms}
        tasks = {}
        for name in self.tasks:
            task = self.task(name)
            tasks[name] = {
                "says": task.says,
                "rows": len(task.data.train),
                "planted_name": task.planted_name,
                "planted_share": None if task.planted is None else task.planted.float().mean().item(),
                "arms": {
                    arm: {f"{fraction:g}": _select(runs, name, arm, fraction) for fraction in self.fractions}
                    for arm in self.arms
                },
                "galleries": {
                    arm: gallery
                    for arm in self.arms
                    if (
                        gallery := _gallery(
                            task, [counts for cell, (_, counts) in read.items() if _of(cell, name, arm)]
                        )
                    )
                },
            }
        return {
            "format": FORMAT,
            "version": VERSION,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": self.command,
            "environment": environment(self.device),
            "settings": {
                **self.settings,
                "tasks": list(self.tasks),
                "arms": list(self.arms),
                "fractions": list(self.fractions),
                "seeds": list(self.seeds),
            },
            "missing": len(self.cells) - len(runs),
            "calibration": {
                "rounds": costs.rounds,
                "arms": self._steps(costs, policies),
                "offered": {arm: self._offered(policy, self.data) for arm, policy in policies.items()},
                "ceilings": {
                    arm: {**found._asdict(), "share": found.share}
                    for arm, policy in policies.items()
                    if arm != AGAIN and policy.target is not None and costs.reaches(self._offered(policy, self.data))
                    for found in [
                        speedup_bound(costs, policy, batch_size=self._offered(policy, self.data), rate=policy.target)
                    ]
                },
            },
            **verdicts(tasks, self.fractions),
            "tasks": tasks,
        }

    def _steps(self, costs: Costs, policies: Mapping[str, Policy]) -> dict[str, dict[str, float]]:
        """Seconds of each stage of a step that trains on exactly batch_size rows."""
        found = {}
        for arm, policy in policies.items():
            offered = self._offered(policy, self.data)
            kept = offered if policy.masks else min(self.settings["batch_size"], offered)
            found[arm] = costs.step(policy_of(arm), kept if policy.before_loading else offered, kept, offered)
        return found


def policy_of(arm: str) -> str:
    """The policy that an arm runs."""
    return BASE if arm == AGAIN else arm


def _known_losses(policy: Policy) -> Tensor | None:
    """Each training row's loss when the policy last saw it, for those that keep such a thing."""
    if (table := getattr(policy, "table", None)) is not None:
        scores: Tensor = table.scores
        return scores
    if (law := getattr(policy, "law", None)) is not None:
        probability: Tensor = law.probability
        return -probability.log()
    return None


def verdicts(tasks: Mapping[str, Any], fractions: Sequence[float]) -> dict[str, Any]:
    """Every arm against BASE, task by task, and what that comes to.

    Returns:
        ``table``: a row for each task and arm, with the test of the accuracies' differences over seeds that both have
        finished; ``again``: AGAIN against BASE, the noise of the study; ``score``: per arm, over tasks.
    """
    table = []
    for task, found in tasks.items():
        base = {run["seed"]: run for run in found["arms"][BASE]["1"]}
        if not base:
            continue
        aim = statistics.fmean(run["accuracy"] for run in base.values()) - ROUNDING
        for arm, by_fraction in found["arms"].items():
            runs = [run for run in by_fraction["1"] if run["seed"] in base]
            if not runs:
                continue
            reached = time_to_reach([curve(run) for run in runs], aim)
            accuracies = [run["accuracy"] for run in runs]
            row: dict[str, Any] = {
                "task": task,
                "arm": arm,
                "n": len(runs),
                "accuracy": statistics.fmean(accuracies),
                "deviation": statistics.stdev(accuracies) if len(runs) > 1 else None,
                "difference": None,
                "reached": reached,
                "parts": {},
            }
            if arm != BASE:
                theirs = [base[run["seed"]]["accuracy"] for run in runs]
                row["difference"] = paired(accuracies, theirs).to_dict()
            for fraction in fractions:
                part = [run for run in by_fraction.get(f"{fraction:g}", []) if run["seed"] in base]
                if fraction == 1.0 or not part:
                    continue
                mine = [run["accuracy"] for run in part]
                test = paired(mine, [base[run["seed"]]["accuracy"] for run in part])
                row["parts"][f"{fraction:g}"] = {
                    "accuracy": statistics.fmean(mine),
                    "reaches": test.mean >= 0.0,
                    "difference": test.to_dict(),
                }
            table.append(row)
    return {"again": _again(tasks, table), "score": _score(table), "table": table}


def curve(run: Mapping[str, Any]) -> Curve:
    """Accuracy of a run's evaluations by the share of its budget."""
    end = run["evals"][-1]["seconds"]
    return (
        np.array([point["seconds"] / end for point in run["evals"]]),
        np.array([np.nan if point["accuracy"] is None else point["accuracy"] for point in run["evals"]]),
    )


def _again(tasks: Mapping[str, Any], table: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """AGAIN against BASE: whether chance alone shows a difference, and how large a one it makes.

    ``differs`` names the tasks whose test is below 5% after Holm's adjustment for the number of tasks; ``all`` is the
    test over the pairs of all tasks together, and ``noise`` how far chance takes a mean over the seeds (the half width
    of its 95% interval, from the deviation pooled over tasks).
    """
    rows = [row for row in table if row["arm"] == AGAIN]
    if not rows:
        return None
    pairs = []
    for row in rows:
        arms = tasks[row["task"]]["arms"]
        base = {run["seed"]: run["accuracy"] for run in arms[BASE]["1"]}
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
    """Per arm: on how many tasks it is not worse than BASE, better, and as good in half the time."""
    found: dict[str, dict[str, Any]] = {}
    for arm in dict.fromkeys(row["arm"] for row in table if row["arm"] not in (BASE, AGAIN)):
        rows = [row for row in table if row["arm"] == arm]
        means = [row["difference"]["mean"] for row in rows]
        halves = [row["parts"]["0.5"]["reaches"] for row in rows if "0.5" in row["parts"]]
        found[arm] = {
            "tasks": len(rows),
            "not_worse": sum(mean >= -MARGIN for mean in means),
            "worst": min(means),
            "better": sum(mean > 0.0 for mean in means),
            "surely_better": sum(mean > 0.0 and _below(row, 0.05) for mean, row in zip(means, rows, strict=True)),
            "surely_worse": sum(mean < 0.0 and _below(row, 0.05) for mean, row in zip(means, rows, strict=True)),
            "in_half": sum(row["reached"] is not None and row["reached"] <= 0.5 for row in rows),
            "half_runs": sum(halves) if halves else None,
        }
    return found


def _below(row: Mapping[str, Any], level: float) -> bool:
    p = row["difference"]["p"]
    return p is not None and p < level


def _select(runs: Mapping[Cell, dict[str, Any]], task: str, arm: str, fraction: float) -> list[dict[str, Any]]:
    return [run for cell, run in runs.items() if cell[:3] == (task, arm, fraction)]


def _of(cell: Cell, task: str, arm: str) -> bool:
    return cell[:3] == (task, arm, 1.0)


def _thinned(run: dict[str, Any]) -> dict[str, Any]:
    """What a history says, short enough for a file that is kept: fewer points of the trace, fewer digits."""
    trace = run["trace"]
    run["trace"] = (
        [trace[i] for i in np.unique(np.linspace(0, len(trace) - 1, TRACE_POINTS).round().astype(int))] if trace else []
    )
    rounded: dict[str, Any] = _rounded(run)
    return rounded


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _rankings(counts: Counts) -> dict[str, Tensor]:
    """The training rows, most first, by each thing that a run knows of them; ties by row number.

    A row that was never seen has no place in either order of selection.
    """
    found = {}
    if "selected" in counts:
        selected = counts["selected"].double()
        share = selected / counts["seen"].clamp(min=1) if "seen" in counts else selected
        known = (counts["seen"] if "seen" in counts else torch.ones_like(selected)).nonzero().squeeze(1)
        for name, sign in (("selected most", -1.0), ("selected least", 1.0)):
            found[name] = known[(sign * share[known]).argsort(stable=True)]
    if "losses" in counts:
        losses = counts["losses"].double()
        known = losses.isfinite().nonzero().squeeze(1)
        found["highest loss"] = known[(-losses[known]).argsort(stable=True)]
    return found


def _precision(planted: Tensor, counts: Counts) -> dict[str, float]:
    """The share of planted rows among the first 100 of each ranking."""
    return {name: planted[rows[:TOP]].float().mean().item() for name, rows in _rankings(counts).items() if len(rows)}


def _gallery(task: Task, found: Sequence[Counts]) -> dict[str, list[dict[str, Any]]]:
    """The first rows of each ranking, by the counts of all seeds together."""
    found = [counts for counts in found if counts]
    if not found:
        return {}
    total = {name: torch.stack([counts[name].double() for counts in found]).sum(0) for name in found[0]}
    shown = {}
    for name, rows in _rankings(total).items():
        pictures = []
        for row in rows[:GALLERY_ROWS].tolist():
            drawn = picture(task.data, row)
            drawn["planted"] = bool(task.planted[row]) if task.planted is not None else None
            drawn |= {kind: round(float(count[row]), 3) for kind, count in total.items()}
            pictures.append(drawn)
        shown[name] = pictures
    return shown


def _clear(folder: Path) -> None:
    """Remove the checkpoints of a run that is finished."""
    for path in folder.glob(f"{CHECKPOINT}*"):
        path.unlink()
    if folder.is_dir():
        folder.rmdir()
