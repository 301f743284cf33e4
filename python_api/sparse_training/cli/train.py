"""``sparse-train train``: one model, one method."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import torch

from sparse_training import files
from sparse_training.callbacks.tensorboard import TensorBoard
from sparse_training.cli.display import Display
from sparse_training.cli.folders import new_folder, prepare, print_resume, write_options
from sparse_training.cli.options import (
    COUNT,
    FRACTION,
    POLICY_NAMES,
    POSITIVE,
    PRECISION,
    RUN,
    SCORER_NAMES,
    policy,
    scorer,
    with_options,
)
from sparse_training.cli.signals import Invocation
from sparse_training.data.load import load_data
from sparse_training.data.resident import ResidentLoader
from sparse_training.data.splits import ImageData
from sparse_training.errors import UserError
from sparse_training.experiments.environment import environment
from sparse_training.experiments.runner import evaluation_loader
from sparse_training.models.build import build_model
from sparse_training.precision import PRECISIONS
from sparse_training.ranks import connect, rank_seed
from sparse_training.selection.policies.base import check_rate
from sparse_training.selection.registry import DEFAULT_POLICY, uses_rate
from sparse_training.trainer import SparseTrainer
from sparse_training.training.log import Status, TrainingLog
from sparse_training.training.schedule import SHAPES
from sparse_training.training.settings import TrainerSettings
from sparse_training.training.state import CHECKPOINT

BUDGETS = ("epochs", "steps", "rows", "seconds")
ONE_BUDGET = f"Give exactly one of {', '.join(f'--{name}' for name in BUDGETS)}"
MODEL, RESULT, BOARD = "model.pt", "result.json", "tensorboard"


@click.command(name="train")
@with_options(*RUN)
@PRECISION
@click.option("--policy", callback=policy, help=f"Method: {POLICY_NAMES}.  [default: {DEFAULT_POLICY}]")
@click.option(
    "--scorer", callback=scorer, help=f"Scorer that the policy asks: {SCORER_NAMES}.  [default: the policy's]"
)
@click.option("--epochs", type=POSITIVE, help=f"Budget in passes over the data. {ONE_BUDGET}.")
@click.option("--steps", type=COUNT, help="Budget in batches.")
@click.option("--rows", type=COUNT, help="Budget in rows of the data, trained on or not.")
@click.option("--seconds", type=POSITIVE, help="Budget in seconds of the calibrated clock.")
@click.option("--schedule", type=click.Choice(SHAPES), default="cosine", help="Shape of the learning rate.")
@click.option("--accumulate", type=COUNT, default=1, help="Batches in an optimizer step.")
@click.option("--clip-norm", type=POSITIVE, help="Largest norm of the gradient.  [default: no clipping]")
@click.option("--ema", type=FRACTION, help="Decay of an average of the weights, which is then evaluated and saved.")
@click.option("--amp", type=click.Choice(list(PRECISIONS)), help="Precision of training.  [default: the model's]")
@click.option("--compile", is_flag=True, help="Compile the model.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of weights, order of data and draws.")
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard's scalars into the run's folder.")
@click.option(
    "--checkpoint-interval", type=COUNT, help="Steps between checkpoints.  [default: at the end, and when stopped]"
)
@click.pass_obj
def command(invocation: Invocation, /, out: str | None, **options: Any) -> None:
    """Train one model with one method.

    On several processes: torchrun -m sparse_training train.
    """
    run(invocation, new_folder(out, "train"), {"command": "train", **options})


def run(invocation: Invocation, folder: Path, options: dict[str, Any], resume: bool = False) -> None:
    """Train, or continue what ``folder`` holds, and write model, result and checkpoint.

    Raises:
        UserError: an option that cannot be served.
    """
    budget = _budget(options)
    connect()
    device = prepare(options)
    data = load_data(options["data"], options["root"])
    trainer = _trainer(options, data, device)
    seed, ranks = options["seed"], trainer.ranks
    facts: dict[str, Any] = {"mean": data.mean, "std": data.std, "device": device}
    loader = ResidentLoader(data.train, batch_size=options["batch_size"], seed=seed, **facts)
    test = evaluation_loader(data, device, ranks.size)
    folder = ranks.all(folder)[0]  # the first one's, if named by the time
    first = ranks.rank == 0  # it alone writes and prints
    if not first:
        torch.manual_seed(rank_seed(seed, ranks.rank))
    elif not resume:
        write_options(folder, options)

    def show(status: Status) -> None:
        if display is not None:
            display.update(trainer.policy.name, seed, status)

    with Display(total=1) if first else nullcontext() as display:
        log = trainer.fit(
            loader,
            **budget,
            evaluate=test,
            checkpoint=folder,
            checkpoint_interval=options.get("checkpoint_interval"),
            resume=resume,
            callbacks=[TensorBoard(folder / BOARD)] if options.get("tensorboard") else [],
            progress=show if first else False,
            stop=invocation.signals.stop,
        )
    if first and log.interrupted:
        print_resume(folder)
    elif first:
        _write(trainer, log, folder, options)


def _budget(options: dict[str, Any]) -> dict[str, Any]:
    budget = {name: options.get(name) for name in BUDGETS}
    given = [f"--{name}" for name, amount in budget.items() if amount is not None]
    if len(given) != 1:
        raise UserError(f"{ONE_BUDGET}; got {' and '.join(given) or 'none'}")
    return budget


def _trainer(options: dict[str, Any], data: ImageData, device: torch.device) -> SparseTrainer:
    torch.manual_seed(options["seed"])
    model = build_model(options["model"], shape=data.shape, classes=len(data.classes))
    names = ("policy", "scorer", "rate", "dense_start", "dense_end", "lr", "schedule", "seed")
    settings = TrainerSettings(
        accumulate=options.get("accumulate", 1),
        clip_norm=options.get("clip_norm"),
        ema=options.get("ema"),
        amp=options.get("amp"),
        scoring_precision=options.get("precision", "auto"),
        compile=options.get("compile", False),
    )
    given = {name: options[name] for name in names if name in options}
    if not uses_rate(options.get("policy") or DEFAULT_POLICY):
        check_rate(given.pop("rate", 1.0))  # the command's default is for the methods that have one
    return SparseTrainer(model, device=device, settings=settings, **given)


def _write(trainer: SparseTrainer, log: TrainingLog, folder: Path, options: dict[str, Any]) -> None:
    """Write the result and the model, and print what the run came to."""
    result = {"settings": options, "environment": environment(trainer.device), "run": log.to_dict()}
    files.write_json(folder / RESULT, result)
    files.write_torch(folder / MODEL, trainer.update.evaluated.state_dict())
    final, rate = log.evals[-1], log.rate
    kept = "" if rate is None else f", {rate:.1%} of the rows kept in the sparse phase"
    print(
        f"accuracy {final['accuracy']:.2%} after {log.steps} steps, {log.seconds:.1f} s, "
        f"{int(log.rows_trained)} of {log.rows_seen} rows trained on{kept}"
    )
    energy = "energy not measured" if log.joules is None else f"{log.joules:.1f} J measured ({log.meter})"
    print(f"{sum(log.operations.values()):.3g} FLOPs counted, {energy}")
    for warning in log.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"written: {folder / MODEL}, {folder / RESULT}, {folder / CHECKPOINT}")
