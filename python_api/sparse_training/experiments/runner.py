"""Runs a design: every run on one calibrated clock, kept in a store, resumed where it was stopped.

Equal cost is equal seconds of that clock. ``random`` is RS2 (a fresh random subset in every pass), and ``dense`` the
same without repetition. Where ``batch_size`` counts the rows trained, dense phases train on ``batch_size`` rows taken
as they come. Every method is charged for what it scores and loads, too.

During a run the model is evaluated on validation rows; the test rows are read once, at the run's end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_training.data.loaders import evaluation_loader, make_loader
from sparse_training.data.resident import ResidentLoader
from sparse_training.data.splits import ImageData
from sparse_training.errors import UserError
from sparse_training.experiments.design import AGAIN, Cell, Design, policy_of
from sparse_training.experiments.gallery import planted_precision
from sparse_training.experiments.measures import row_scores
from sparse_training.experiments.store import Counts, Store
from sparse_training.experiments.tasks import Task, make_task
from sparse_training.models.augment import augment_inputs, read_augmentation
from sparse_training.profiling import calibration
from sparse_training.profiling.calibration import calibrate
from sparse_training.samplers.adaptive_weights import SamplingWeights
from sparse_training.selection.policies.base import Policy
from sparse_training.selection.registry import make_policy, uses_rate
from sparse_training.selection.types import CandidateIndices, WeightedIndices
from sparse_training.trainer import SparseTrainer
from sparse_training.training.clock import Clock, Costs
from sparse_training.training.log import Status, TrainingLog
from sparse_training.training.optimizers import make_optimizer
from sparse_training.training.settings import TrainerSettings

CALIBRATION_SHARE = 0.1  # of all runs' time: a machine's mood may last seconds, and all runs go by this clock
OTHER_DRAWS = 1_000_003  # added to the seed of the draws of AGAIN
START = "start"  # in place of the method's name: the run that makes a task's first weights
TEST_SCORES = "test_scores"  # kept with a run's counts: the score of each test row, float32
WHOLE_BATCH = "whole"  # name of a dense step on the largest batch that a method is offered, for the clock

Progress = Callable[[Cell, Status], None]
Stop = Callable[[], bool]


class Interrupted(Exception):
    """An experiment was stopped; its store holds the finished runs, and the checkpoint of the one in progress."""


@contextmanager
def refused_for(task: str, method: str) -> Iterator[None]:
    """Context in which a refusal says of which task and method it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{method} cannot run on the task {task}: {error}") from None


class FirstRows(Policy):
    """The first ``rows`` rows of each batch, which are any rows, because loaders shuffle."""

    name = "dense"

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    @property
    def before_loading(self) -> bool:
        """True: rows left out are never loaded."""
        return True

    def choose(self, offer: CandidateIndices) -> WeightedIndices:
        """Keep the first rows."""
        return WeightedIndices(offer.ids[: self.rows])


class Runner:
    """Runs what is missing of a design.

    Args:
        design: methods, tasks, fractions and seeds, and the settings of a run.
        data: data set that the tasks are made of.
        settings: what must agree for a folder to be continued, by name; the number of parameters is added.
        kind: kind of experiment, in messages: "comparison" or "study".
        folder: folder that everything is kept in; None keeps it in memory.
        resume: True to continue what the folder holds.
        device: PyTorch device to train on.
        command: command line to record in the result.
        shard: (i, n) to do every n-th missing run, from the i-th, counted from 1, beside n - 1 other processes.

    Raises:
        UserError: a method that cannot run, or a folder made with other settings.
    """

    def __init__(
        self,
        design: Design,
        data: ImageData,
        *,
        settings: Mapping[str, Any],
        kind: str,
        folder: str | Path | None = None,
        resume: bool = False,
        device: torch.device | str = "cpu",
        command: str = "",
        shard: tuple[int, int] = (1, 1),
    ) -> None:
        self.design, self.data, self.device, self.command = design, data, torch.device(device), command
        self.shard = shard
        self._tasks: dict[str, Task] = {}
        for name in design.tasks:  # what can be refused is refused before the folder is made
            for method in design.plan(name).methods:
                trainer, loader = self.make(self.task(name), method, design.seeds[0])
                labels = loader.labels if trainer.criterion.classes else None
                with refused_for(name, method):
                    trainer.policy.prepare(loader.size, labels, loader.duplicate_counts)
        trainer, _ = self.make(self.task(design.tasks[0]), design.methods[0], design.seeds[0])
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        self.settings = {**settings, "parameters": parameters}
        self.folder = None if folder is None else Path(folder)
        self.store = Store(self.folder, self.settings, resume, kind)

    # --- runs -----------------------------------------------------------------------------------

    def missing(self) -> list[Cell]:
        """Runs of this shard that are not finished, in order."""
        first, shards = self.shard
        cells = self.design.cells[first - 1 :: shards]
        return [cell for cell in cells if not self.store.has_run(self.design.name(cell))]

    def finished(self) -> dict[Cell, tuple[dict[str, Any], Counts]]:
        """Each finished run and its counts by row."""
        runs = {cell: self.store.run(self.design.name(cell)) for cell in self.design.cells}
        return {cell: run for cell, run in runs.items() if run is not None}

    def run(
        self,
        progress: Progress | None = None,
        stop: Stop | None = None,
        calibrating: Callable[[float], None] | None = None,
    ) -> None:
        """Do the missing runs; a run in progress continues from its checkpoint, if it has one.

        Args:
            progress: called after every step of every run. Default: none.
            stop: asked after every step; true ends the experiment. Default: none.
            calibrating: called with the fraction of the clock's calibration that is done, in [0, 1]. Default: none.

        Raises:
            Interrupted: ``stop`` returned true.
        """
        missing = self.missing()
        # All before the first run: the machine is idle.
        costs = {bench: self.costs(bench, progress=calibrating, stop=stop) for bench in self.benches()}
        for cell in missing:
            self.run_cell(cell, costs[self.task(cell.task).bench], progress, stop)

    def run_cell(
        self, cell: Cell, costs: Costs, progress: Progress | None = None, stop: Stop | None = None
    ) -> dict[str, Any]:
        """Do one run and keep it."""
        task, name = self.task(cell.task), self.design.name(cell)
        start = self._first_weights(task, costs, progress, stop) if task.start_rows else None
        trainer, loader = self.make(task, cell.method, cell.seed)
        if start is not None:
            trainer.model.load_state_dict(start)
        log = self._fit(cell, trainer, loader, costs, progress, stop, evaluate=True)
        counts = {"selected": log.selected, "seen": log.seen, "losses": _last_losses(trainer.policy)}
        known = {kind: count.cpu() for kind, count in counts.items() if isinstance(count, Tensor)}
        test = row_scores(trainer.update.evaluated, evaluation_loader(task.data, self.device), task.measure)
        run = {
            **cell.to_dict(),
            "accuracy": test.mean().item(),
            "validation": log.evals[-1]["accuracy"],
            **_shortened(log.to_dict(), self.design.trace_points),
            "target": trainer.policy.target,
            "planted": None if task.planted is None else planted_precision(task.planted, known),
        }
        self.store.keep_run(name, run, {**known, TEST_SCORES: test.float()} if cell.fraction == 1.0 else {})
        self.store.clear_checkpoints(name)
        return run

    def _first_weights(self, task: Task, costs: Costs, progress: Progress | None, stop: Stop | None) -> dict[str, Any]:
        """Weights that every run of a task starts from: half a run, dense, on the task's first rows."""
        name = f"{task.name}-{START}"
        weights = self.store.weights(name, self.device)
        if weights is None:
            cell = Cell(task.name, START, 0.5, 0)
            trainer, _ = self.make(task, "dense", cell.seed)
            first = task.data.train.take(torch.arange(task.start_rows))
            rows = min(self.design.plan(task.name).batch_size, len(first))
            loader = make_loader(first, task.data, batch_size=rows, device=self.device)
            self._fit(cell, trainer, loader, costs, progress, stop)
            weights = self.store.keep_weights(name, trainer.model.state_dict(), self.device)
            self.store.clear_checkpoints(self._checkpoint_name(cell))
        return weights

    def _checkpoint_name(self, cell: Cell) -> str:
        """Name of a run's checkpoints; each shard makes a task's first weights by itself, and they are equal."""
        shared = cell.method == START and self.shard[1] > 1
        return f"{self.design.name(cell)}{f'-shard-{self.shard[0]}' if shared else ''}"

    def _fit(
        self,
        cell: Cell,
        trainer: SparseTrainer,
        loader: ResidentLoader,
        costs: Costs,
        progress: Progress | None,
        stop: Stop | None,
        evaluate: bool = False,
    ) -> TrainingLog:
        design, plan, saves = self.design, self.design.plan(cell.task), self.design.checkpoint_interval is not None
        log = trainer.fit(
            loader,
            seconds=cell.fraction * plan.seconds,
            evaluate=self._validation(self.task(cell.task)) if evaluate else None,
            evaluations=max(1, round(cell.fraction * plan.evaluations)),
            clock=Clock(costs),
            checkpoint=self.store.checkpoints(self._checkpoint_name(cell)) if saves else None,
            checkpoint_interval=design.checkpoint_interval,
            resume=saves,
            progress=False if progress is None else lambda status: progress(cell, status),
            stop=stop,
        )
        if log.interrupted:
            raise Interrupted
        return log

    def _validation(self, task: Task) -> Callable[[torch.nn.Module], dict[str, float]]:
        """Evaluation of a model on a task's validation rows; its measure is under "accuracy" in every record."""
        loader = evaluation_loader(task.data, self.device, task.validation)
        return lambda model: {"accuracy": row_scores(model, loader, task.measure).mean().item()}

    # --- what a run is made of ------------------------------------------------------------------

    def task(self, name: str) -> Task:
        """A task by its name, made once."""
        if name not in self._tasks:
            least = {"min_rows": 2} if name == "clean" else {}  # nothing is planted in it
            self._tasks[name] = make_task(name, self.data, validation=self.design.validation, **least)
        return self._tasks[name]

    def make(self, task: Task, method: str, seed: int) -> tuple[SparseTrainer, ResidentLoader]:
        """A method's trainer and loader; for equal seeds all methods have equal weights and order of rows."""
        design, plan = self.design, self.design.plan(task.name)
        torch.manual_seed(seed)
        model = task.build(design.model)
        if design.augment is not None:
            augment_inputs(model, read_augmentation(design.augment))
        trainer = SparseTrainer(
            model,
            loss=task.loss,
            policy=policy_of(method),
            rate=design.rate if uses_rate(policy_of(method)) else None,
            dense_start=design.dense_start,
            dense_end=design.dense_end,
            lr=plan.lr,
            schedule=design.schedule,
            lr_warmup=design.lr_warmup,
            optimizer=make_optimizer(
                design.optimizer,
                weight_decay=design.weight_decay,
                momentum=design.momentum,
                device=self.device,
            ),
            device=self.device,
            seed=seed + OTHER_DRAWS * (method == AGAIN),
            settings=TrainerSettings(scoring_precision=design.precision, amp=design.amp),
        )
        if design.batch_size_counts == "trained":
            trainer.dense = FirstRows(plan.batch_size)
        return trainer, self.loader(task, method, seed)

    def policy(self, method: str, seed: int = 0) -> Policy:
        """A method's policy, of its own."""
        return make_policy(policy_of(method), rate=self.design.rate, seed=seed)

    def loader(self, task: Task, method: str, seed: int) -> ResidentLoader:
        """Training data in batches of the size that a method is offered."""
        return make_loader(
            task.data.train,
            task.data,
            batch_size=self.offered(self.policy(method, seed), task),
            seed=seed,
            drop_last=self.design.batch_size_counts == "trained",  # every step of a run is as large
            device=self.device,
        )

    def offered(self, policy: Policy, task: Task) -> int:
        """Rows that a policy is offered a step of a task."""
        batch_size = self.design.plan(task.name).batch_size
        if self.design.batch_size_counts == "offered":
            return batch_size
        return min(round(batch_size / (policy.target or 1.0)), len(task.data.train))

    # --- the clock ------------------------------------------------------------------------------

    def benches(self) -> dict[str, list[str]]:
        """Names of the design's tasks by bench: the tasks of one are on one calibration."""
        benches: dict[str, list[str]] = {}
        for name in self.design.tasks:
            benches.setdefault(self.task(name).bench, []).append(name)
        return benches

    def costs(
        self,
        bench: str | None = None,
        *,
        progress: Callable[[float], None] | None = None,
        stop: Stop | None = None,
    ) -> Costs:
        """Costs of every step: those in the folder, or measured now, which needs an idle machine.

        Args:
            bench: the tasks' bench. Default: that of the first task.
            progress: called with the fraction of the measurement that is done, in [0, 1]. Default: none.
            stop: asked before every step of it; true ends the experiment. Default: none.

        Raises:
            UserError: the folder's costs lack one of the methods.
            Interrupted: ``stop`` returned true.
        """
        design, benches = self.design, self.benches()
        bench = next(iter(benches)) if bench is None else bench
        plans = [design.plan(name) for name in benches[bench]]
        methods = list(dict.fromkeys(method for plan in plans for method in plan.methods))
        costs = self.store.costs(bench)
        if costs is not None:
            if unknown := [method for method in methods if policy_of(method) not in costs.own]:
                raise UserError(
                    f"{self.folder} was calibrated for {', '.join(costs.own)}, not for {unknown[0]}; "
                    "leave it out, or use a new folder"
                )
            return costs
        seed, task = design.seeds[0], self.task(benches[bench][0])
        trainer, loader = self.make(task, methods[0], seed)
        names = dict.fromkeys(("dense", *map(policy_of, methods)))
        policies = {name: self.policy(name, seed) for name in names}
        loaders = {name: self.loader(task, name, seed) for name in names}
        largest = max(loaders.values(), key=lambda one: one.batch_size)
        if largest.batch_size > plans[0].batch_size:
            policies[WHOLE_BATCH], loaders[WHOLE_BATCH] = Policy(), largest
            policies[WHOLE_BATCH].name = WHOLE_BATCH
        share = CALIBRATION_SHARE * sum(plan.seconds * len(plan.methods) for plan in plans) * len(design.seeds)
        seconds = max(calibration.CALIBRATION_SECONDS, min(design.calibration_limit, share))
        try:
            costs = calibrate(trainer, loader, policies, loaders=loaders, seconds=seconds, progress=progress, stop=stop)
        except calibration.Stopped:
            raise Interrupted from None
        return self.store.keep_costs(costs, bench)


def step_costs(costs: Costs, method: str, policy: Policy, offered: int, kept: int) -> dict[str, float]:
    """Seconds of each stage of a method's step.

    Args:
        costs: measured costs.
        method: method's name; ``AGAIN`` costs what the baseline costs.
        policy: the method's policy.
        offered: rows that the step is offered.
        kept: rows that it trains on; a policy that masks rows computes all of them anyway.
    """
    kept = offered if policy.masks else kept
    return costs.step(policy_of(method), kept if policy.before_loading else offered, kept, offered)


def _last_losses(policy: Policy) -> Tensor | None:
    """Each training row's loss when it was last trained on, of policies that keep such a thing."""
    if (table := getattr(policy, "table", None)) is not None:
        scores: Tensor = table.scores
        return scores
    for value in vars(policy).values():
        if isinstance(value, SamplingWeights):
            probability: Tensor = value.probability
            return -probability.log()
    return None


def _shortened(run: dict[str, Any], points: int | None) -> dict[str, Any]:
    """A run's log with at most so many points of its trace, and six digits of every number; as it is for None."""
    if points is None:
        return run
    trace = run["trace"]
    kept = np.unique(np.linspace(0, len(trace) - 1, points).round().astype(int)) if trace else ()
    run["trace"] = [trace[index] for index in kept]
    rounded: dict[str, Any] = _rounded(run)
    return rounded


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
