"""Design of an experiment: which methods run on which tasks, with which budgets and seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sparse_training.arguments import check_choice, check_number, check_positive
from sparse_training.data.splits import VALIDATION
from sparse_training.errors import UserError
from sparse_training.experiments.tasks import TASKS
from sparse_training.training.optimizers import DEFAULT_OPTIMIZER
from sparse_training.training.schedule import LR_WARMUP

BASELINE = "dense"  # the method that all others are compared with
RANDOM = "random"
AGAIN = "random-again"  # the same as RANDOM with other draws: differences between the two are chance


class Plan(NamedTuple):
    """Settings of one task's runs; None stands for the design's.

    Attributes:
        methods: methods that run on the task.
        fractions: budgets of its runs, as fractions of ``seconds``.
        seconds: budget of a whole run, in seconds of the calibrated clock.
        batch_size: rows in a step.
        lr: learning rate.
        evaluations: number of evaluations of a whole run.
    """

    methods: tuple[str, ...] | None = None
    fractions: tuple[float, ...] | None = None
    seconds: float | None = None
    batch_size: int | None = None
    lr: float | None = None
    evaluations: int | None = None


class ResolvedPlan(NamedTuple):
    """A ``Plan`` with the design's values in the places of None."""

    methods: tuple[str, ...]
    fractions: tuple[float, ...]
    seconds: float
    batch_size: int
    lr: float
    evaluations: int


class Cell(NamedTuple):
    """One run of an experiment."""

    task: str
    method: str
    fraction: float  # of the design's seconds; the whole schedule is shortened with it
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Entries of the run's file; the method is under "arm", as in results of version 0.1.0."""
        return {"task": self.task, "arm": self.method, "fraction": self.fraction, "seed": self.seed}


@dataclass(frozen=True)
class Design:
    """Methods x tasks x fractions x seeds, and the settings that all runs share.

    Attributes:
        methods: policies by name or policy@scorer, and ``AGAIN``; each once.
        tasks: names in ``TASKS``. Default: the data as they are.
        fractions: budgets of a run, as fractions of ``seconds``, in (0, 1]. Default: whole runs only.
        seeds: seeds of the weights, the order of the data and the draws. Default: 0, 1, 2.
        model: name or module:factory, as for ``build_model``.
        rate: fraction of the offered rows to keep, in (0, 1], for methods that have a target.
        batch_size: rows in a step, counted as ``batch_size_counts`` says, at least 1.
        batch_size_counts: "offered": every method is offered ``batch_size`` rows a step. "trained": every method
            trains on about ``batch_size`` rows a step, so one that keeps the fraction r is offered
            ``batch_size / r`` rows.
        seconds: budget of a whole run, in seconds of the calibrated clock; evaluation is not charged.
        lr: learning rate, above 0.
        schedule: shape of the learning rate, "cosine" or "constant".
        lr_warmup: fraction of a run over which the learning rate rises, in [0, 1].
        optimizer: name in ``OPTIMIZERS``: "adamw", "adam", "sgd" or "rmsprop".
        weight_decay: weight decay, at least 0; None for the optimizer's default.
        momentum: momentum in [0, 1), of "sgd" and "rmsprop"; None for 0.9 of "sgd" and 0 of "rmsprop".
        augment: random changes of training images, as for ``read_augmentation``; None for none.
        dense_start: fraction of a run that trains on every row at the start.
        dense_end: fraction of a run that trains on every row at the end.
        precision: precision of the scoring pass: "auto", "float32", "bfloat16" or "float16".
        amp: autocast type of training; None for the model's own.
        evaluations: number of evaluations of a whole run.
        checkpoint_interval: steps between checkpoints of a run in progress; None for none.
        trace_points: points kept of a run's trace, with six digits a number; None for all of it.
        calibration_limit: longest time that the clock's calibration may take, in seconds.
        run_name: template of a run's file name, of the fields of ``Cell``.
        validation: share of a task's training rows that is held out for choices, in (0, 1).
        plans: settings of single tasks that differ from the design's, by the task's name.

    Raises:
        UserError: a value out of range.
    """

    methods: tuple[str, ...]
    tasks: tuple[str, ...] = ("clean",)
    fractions: tuple[float, ...] = (1.0,)
    seeds: tuple[int, ...] = (0, 1, 2)
    model: str = "cnn-620k"
    rate: float = 0.1
    batch_size: int = 128
    batch_size_counts: str = "offered"
    seconds: float = 20.0
    lr: float = 1e-3
    schedule: str = "cosine"
    lr_warmup: float = LR_WARMUP
    optimizer: str = DEFAULT_OPTIMIZER
    weight_decay: float | None = None
    momentum: float | None = None
    augment: str | None = None
    dense_start: float = 0.05
    dense_end: float = 0.125
    precision: str = "auto"
    amp: str | None = None
    evaluations: int = 20
    checkpoint_interval: int | None = None
    trace_points: int | None = None
    calibration_limit: float = math.inf
    run_name: str = "{method}-{seed}"
    validation: float = VALIDATION
    plans: Mapping[str, Plan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("methods", "tasks", "fractions", "seeds"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            if not values or len(set(values)) != len(values):
                listed = ", ".join(map(str, values)) or "none"
                raise UserError(f"`{name}` must name at least one, each once, got {listed}")
        if unknown := [name for name in self.tasks if name not in TASKS]:
            raise UserError(f"`tasks` must be some of {', '.join(TASKS)}, got {unknown[0]!r}")
        if bad := [fraction for fraction in self.fractions if not 0.0 < fraction <= 1.0]:
            raise UserError(f"`fractions` must be in (0, 1], got {bad[0]}")
        check_positive("seconds", self.seconds)
        check_choice("batch_size_counts", self.batch_size_counts, ("offered", "trained"))
        check_number("validation", self.validation, "in (0, 1)", lambda x: 0 < x < 1)
        if unknown := [name for name in self.plans if name not in TASKS]:
            raise UserError(f"`plans` must be for some of {', '.join(TASKS)}, got {unknown[0]!r}")

    def plan(self, task: str) -> ResolvedPlan:
        """Settings of a task's runs."""
        plan = self.plans.get(task, Plan())
        values = (getattr(self, name) if value is None else value for name, value in plan._asdict().items())
        return ResolvedPlan(*values)

    @property
    def every_method(self) -> tuple[str, ...]:
        """Methods of all tasks, each once, the design's own first."""
        plans = [self.plan(task) for task in self.tasks]
        return tuple(dict.fromkeys((*self.methods, *(method for plan in plans for method in plan.methods))))

    @property
    def cells(self) -> list[Cell]:
        """Every run, in order: all tasks and methods of one seed before the next seed, so that a part is complete."""
        plans = {task: self.plan(task) for task in self.tasks}
        return [
            Cell(task, method, fraction, seed)
            for seed in self.seeds
            for task, plan in plans.items()
            for fraction in plan.fractions
            for method in plan.methods
        ]

    def name(self, cell: Cell) -> str:
        """Name of a run, which its files have."""
        return self.run_name.format(**cell._asdict())


def policy_of(method: str) -> str:
    """Name of the policy that a method runs."""
    return RANDOM if method == AGAIN else method
