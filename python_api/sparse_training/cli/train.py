"""``sparse-train train``: one model, one method."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import torch
from torch.utils.data import DataLoader

from sparse_training import files
from sparse_training.callbacks.checkpoints import BestModel, KeepLast
from sparse_training.callbacks.scalars import CsvLogger
from sparse_training.callbacks.stopping import EarlyStopping
from sparse_training.callbacks.tensorboard import TensorBoard
from sparse_training.callbacks.wandb import WeightsAndBiases
from sparse_training.cli.budget import BUDGET, BUDGETS, ONE_BUDGET
from sparse_training.cli.display import Display
from sparse_training.cli.folders import new_folder, prepare, print_resume, write_options
from sparse_training.cli.options import (
    OPTIONS_HELP,
    POLICY_NAMES,
    PRECISION,
    RUN,
    SCORER_NAMES,
    SIGNIFICANCE_NAMES,
    check_rate_is_used,
    policy,
    policy_options,
    read_policy_options,
    scorer,
    significance,
    with_options,
)
from sparse_training.cli.recipe import RECIPE
from sparse_training.cli.signals import Invocation
from sparse_training.cli.training_data import TrainingData, training_data
from sparse_training.cli.values import COUNT, FRACTION, PART, POSITIVE, SEED, WORKERS
from sparse_training.data.resident import ResidentLoader
from sparse_training.data.splits import VALIDATION
from sparse_training.errors import UserError
from sparse_training.experiments.environment import environment
from sparse_training.models.augment import augment_inputs, read_augmentation
from sparse_training.models.build import build_model
from sparse_training.profiling.calibration import Stopped, calibrate
from sparse_training.ranks import connect, rank_seed
from sparse_training.reporting.run import RESULT, run_lines
from sparse_training.selection.registry import DEFAULT_POLICY, make_policy, uses_rate
from sparse_training.trainer import SparseTrainer
from sparse_training.training.callbacks import Callback, Run
from sparse_training.training.clock import Clock
from sparse_training.training.log import Status, TrainingLog, evaluation_numbers
from sparse_training.training.optimizers import DEFAULT_OPTIMIZER, make_optimizer
from sparse_training.training.settings import TrainerSettings
from sparse_training.training.state import CHECKPOINT

MODEL, BEST, CSV, BOARD = "model.pt", "best.pt", "log.csv", "tensorboard"

# Options that change nothing of what is trained.
LOGS = (
    click.option("--csv", is_flag=True, help=f"Write loss, learning rate and evaluations into {CSV}."),
    click.option("--tensorboard", is_flag=True, help="Write the same as TensorBoard's scalars."),
    click.option("--wandb", metavar="PROJECT", help="Log the same to a project of Weights & Biases."),
)


@click.command(name="train")
@with_options(*RUN)
@click.option(
    "--crops",
    type=COUNT,
    help="Side in pixels of crops of an image folder's images, which are read as they are needed and never made "
    "smaller as a whole.",
)
@click.option(
    "--workers", type=WORKERS, help="Processes that read images for --crops.  [default: a core each, up to 8]"
)
@PRECISION
@click.option("--policy", callback=policy, help=f"Method: {POLICY_NAMES}.  [default: {DEFAULT_POLICY}]")
@click.option(
    "--scorer", callback=scorer, help=f"Scorer that the policy asks: {SCORER_NAMES}.  [default: the policy's]"
)
@click.option("--significance", callback=significance, help=f"Significance of the policy gate: {SIGNIFICANCE_NAMES}.")
@click.option("--policy-options", callback=policy_options, help=f"Settings of the policy, such as {OPTIONS_HELP}.")
@with_options(*BUDGET)
@with_options(*RECIPE)
@click.option("--accumulate", type=COUNT, default=1, help="Batches in an optimizer step.")
@click.option("--clip-norm", type=POSITIVE, help="Largest norm of the gradient.  [default: no clipping]")
@click.option("--ema", type=FRACTION, help="Decay of an average of the weights, which is then evaluated and saved.")
@click.option("--compile", is_flag=True, help="Compile the model.")
@click.option("--seed", type=SEED, default=0, help="Seed of weights, order of data and draws.")
@click.option(
    "--validation",
    type=PART,
    default=VALIDATION,
    help="Fraction of the training rows that is held out to evaluate on; the test set is read once at the end. 0 for "
    "none: the test set is read throughout, and nothing may be chosen.",
)
@click.option("--evaluations", type=COUNT, default=20, help="Evaluations in a run, not charged to the clock.")
@click.option("--patience", type=COUNT, help="Evaluations without a better one that end the run.  [default: no end]")
@click.option("--best", is_flag=True, help="End with the weights of the best evaluation.")
@click.option(
    "--monitor", type=click.Choice(["accuracy", "loss"]), default="accuracy", help="What --patience and --best go by."
)
@click.option(
    "--checkpoint-interval", type=COUNT, help="Steps between checkpoints.  [default: at the end, and when stopped]"
)
@click.option("--keep-last", type=COUNT, help="Checkpoints to keep, by step.  [default: the newest two]")
@with_options(*LOGS)
@click.pass_obj
def command(invocation: Invocation, /, out: str | None, **options: Any) -> None:
    """Train one model with one method.

    On several processes: torchrun -m sparse_training train.
    """
    check_rate_is_used([_policy_name(options)], options["rate"])
    run(invocation, new_folder(out, "train"), {"command": "train", **options})


def run(invocation: Invocation, folder: Path, options: dict[str, Any], resume: bool = False) -> None:
    """Train, or continue what ``folder`` holds, and write model, result and checkpoint.

    Raises:
        UserError: an option that cannot be served.
    """
    budget = _budget(options)
    connect()
    device = prepare(options)
    _check_choices(options)
    data = training_data(options, device)
    trainer = _trainer(options, data, device)
    seed, ranks = options["seed"], trainer.ranks
    folder = ranks.all(folder)[0]  # the first one's, if named by the time
    callbacks = [*_callbacks(options, folder), _WritesOptions(folder, options)]
    first = ranks.rank == 0  # it alone writes and prints
    if not first:
        torch.manual_seed(rank_seed(seed, ranks.rank))
    elif not resume:
        write_options(folder, options)

    def show(status: Status) -> None:
        if display is not None:
            display.update(trainer.policy.name, seed, status)

    with Display(total=1) if first else nullcontext() as display, invocation.signals.at_next_step():
        log = trainer.fit(
            data.train,
            **budget,
            evaluate=data.test if data.validation is None else data.validation,
            evaluations=options.get("evaluations", 20),
            clock=_clock(trainer, data.train, options, folder, display, invocation.signals.stop),
            checkpoint=folder,
            checkpoint_interval=options.get("checkpoint_interval"),
            resume=resume,
            callbacks=callbacks,
            progress=show if first else False,
            stop=invocation.signals.stop,
        )
        if not log.interrupted:
            numbers = log.evals[-1] if data.validation is None else trainer.evaluate(data.test)
            log.warnings += data.warnings()
            result = _write(trainer, log, numbers, folder, options) if first else {}
    if first and log.interrupted:
        print_resume(folder)
    elif first:
        print(*run_lines(result), sep="\n")
        print(f"written: {folder / MODEL}, {folder / RESULT}, {folder / CHECKPOINT}")


class _WritesOptions(Callback):
    """Writes the options again once the checkpoint is accepted: a run may have been given a larger budget."""

    passive = True

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder, self.options = folder, options

    def on_fit_start(self, run: Run) -> None:
        if run.first:
            write_options(self.folder, self.options)


def _policy_name(options: dict[str, Any]) -> str:
    return options.get("policy") or DEFAULT_POLICY


def _budget(options: dict[str, Any]) -> dict[str, Any]:
    budget = {name: options.get(name) for name in BUDGETS}
    given = [f"--{name}" for name, amount in budget.items() if amount is not None]
    if len(given) != 1:
        raise UserError(f"{ONE_BUDGET}; got {' and '.join(given) or 'none'}")
    return budget


def _check_choices(options: dict[str, Any]) -> None:
    chosen = [f"--{name}" for name in ("patience", "best") if options.get(name)]
    if chosen and not options.get("validation", 0.0):
        raise UserError(f"{' and '.join(chosen)} must choose by a --validation above 0, not by the test set")
    if options.get("keep_last") is not None and options.get("checkpoint_interval") is None:
        raise UserError("--keep-last needs --checkpoint-interval, the steps between checkpoints")


def _trainer(options: dict[str, Any], data: TrainingData, device: torch.device) -> SparseTrainer:
    torch.manual_seed(options["seed"])
    model = build_model(options["model"], shape=data.shape, classes=len(data.classes))
    if options.get("augment"):
        augment_inputs(model, read_augmentation(options["augment"]))
    names = ("policy", "scorer", "rate", "dense_start", "dense_end", "lr", "lr_warmup", "schedule", "seed")
    settings = TrainerSettings(
        accumulate=options.get("accumulate", 1),
        clip_norm=options.get("clip_norm"),
        ema=options.get("ema"),
        amp=options.get("amp"),
        scoring_precision=options.get("precision", "auto"),
        compile=options.get("compile", False),
    )
    given = {name: options[name] for name in names if name in options}
    significance = options.get("significance")
    if significance is not None and not options.get("policy_options"):
        given["significance"] = significance
    if not uses_rate(_policy_name(options)):
        given.pop("rate", None)  # version 0.1.0 wrote its default for every policy
    if options.get("policy_options"):
        given["policy"] = make_policy(
            _policy_name(options),
            rate=given.pop("rate", None),
            seed=options["seed"],
            scorer=given.pop("scorer", None),
            options={
                **({} if significance is None else {"significance": significance}),
                **read_policy_options(options["policy_options"]),
            },
        )
    optimizer = make_optimizer(
        options.get("optimizer", DEFAULT_OPTIMIZER),
        weight_decay=options.get("weight_decay"),
        momentum=options.get("momentum"),
        device=device,
    )
    return SparseTrainer(model, device=device, optimizer=optimizer, settings=settings, **given)


def _callbacks(options: dict[str, Any], folder: Path) -> list[Callback]:
    monitor = options.get("monitor", "accuracy")
    made: list[tuple[Any, Callable[[Any], Callback]]] = [
        (options.get("patience"), lambda patience: EarlyStopping(monitor, patience)),
        (options.get("best"), lambda best: BestModel(folder / BEST, monitor, restore=True)),
        (options.get("keep_last"), KeepLast),
        (options.get("csv"), lambda csv: CsvLogger(folder / CSV)),
        (options.get("tensorboard"), lambda board: TensorBoard(folder / BOARD)),
        (options.get("wandb"), lambda project: WeightsAndBiases(project=project, dir=str(folder))),
    ]
    return [make(value) for value, make in made if value]


def _clock(
    trainer: SparseTrainer,
    loader: ResidentLoader | DataLoader[Any],
    options: dict[str, Any],
    folder: Path,
    display: Display | None,
    stop: Callable[[], bool],
) -> Clock | None:
    """Calibrate the clock of a new run of seconds, and show how far that is; None for the trainer's choice."""
    if options.get("seconds") is None or display is None or not trainer.ranks.alone or (folder / CHECKPOINT).exists():
        return None
    if not isinstance(loader, ResidentLoader):
        return None
    try:
        return Clock(calibrate(trainer, loader, progress=display.calibrating, stop=stop))
    except Stopped:
        return None  # the trainer asks again, and ends before it begins


def _write(
    trainer: SparseTrainer, log: TrainingLog, test: dict[str, float], folder: Path, options: dict[str, Any]
) -> dict[str, Any]:
    """Write the result and the model, and return the result."""
    result = {
        "settings": options,
        "environment": environment(trainer.device),
        "policy": trainer.policy.name,
        "test": evaluation_numbers(test),
        "run": log.to_dict(),
    }
    files.write_json(folder / RESULT, result)
    files.write_torch(folder / MODEL, trainer.update.evaluated.state_dict())
    return result
