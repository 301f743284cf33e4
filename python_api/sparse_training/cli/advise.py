"""``sparse-train advise``: would training on fewer rows help?"""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from collections.abc import Callable
from typing import Any

import click
import torch
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sparse_training.cli.folders import new_folder, prepare, refuse_torchrun
from sparse_training.cli.options import DATA_AND_MODEL, with_options
from sparse_training.cli.values import COUNT, POSITIVE
from sparse_training.data.load import load_data
from sparse_training.data.loaders import make_loader
from sparse_training.errors import UserError
from sparse_training.models.build import build_model
from sparse_training.precision import PRECISIONS
from sparse_training.profiling.advise import advise
from sparse_training.profiling.advise_result import Advice
from sparse_training.reporting.advice import write_advice
from sparse_training.selection.registry import uses_rate
from sparse_training.training.settings import TrainerSettings

# Options that say what --script says instead.
INSTEAD = ("data", "root", "image_size", "model", "batch_size", "device")
# Options that train takes too.
KEPT = (*INSTEAD, "threads", "lr", "amp")


@click.command(name="advise")
@with_options(*DATA_AND_MODEL)
@click.option("--script", help="Your own training, in place of data and model: module:make in the current folder; "
              "make() returns (model, loader, loss).")  # fmt: skip
@click.option("--lr", type=POSITIVE, default=1e-3, help="Learning rate of AdamW, which takes the steps.")
@click.option("--amp", type=click.Choice(list(PRECISIONS)), help="Precision of training.  [default: the model's]")
@click.option("--steps", type=COUNT, help="Training steps to measure.  [default: as many as --seconds allow]")
@click.option("--seconds", type=POSITIVE, help="Time to measure for.  [default: 30, or no end where --steps is given]")
@click.option("--epochs", type=POSITIVE, default=10.0, help="Length of the run that savings are of, in passes.")
@click.option("--out", type=click.Path(), help="Folder for advice.json and report.html.  [default: none is written]")
@click.pass_context
def command(context: click.Context, /, **options: Any) -> None:
    """Measure in a minute whether training on fewer rows would help.

    Trains a copy of the model for some steps, and says where a step's time goes, what its rows teach, what each
    method could save, and what to do. Needs an idle machine.
    """
    refuse_torchrun("advise")
    if options["script"] is not None:
        given = [name for name in INSTEAD if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UserError(f"--script says what to train; give no {names} with it")
    folder = None if options["out"] is None else new_folder(options["out"], "advise")
    device = prepare(options)
    model, loader, loss = _from_script(options["script"]) if options["script"] else _from_options(options, device)
    console = Console(stderr=True)
    columns = (TextColumn("measuring"), BarColumn(24), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("measuring", total=1.0)

        def show(share: float) -> None:
            bar.update(task, completed=share)

        settings = None if options["amp"] is None else TrainerSettings(amp=options["amp"])
        advice = advise(
            model, loader, loss=loss, lr=options["lr"], steps=options["steps"], seconds=options["seconds"],
            epochs=options["epochs"], settings=settings, progress=show,
        )  # fmt: skip
    written = [] if folder is None else write_advice(advice, folder)  # before printing, which may fail
    click.echo(str(advice))
    if options["script"] is None:
        given = [name for name in KEPT if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
        click.echo(f"\nor  {_train_command({name: options[name] for name in given}, advice)}")
    if written:
        click.echo(f"\nwritten: {', '.join(map(str, written))}")


def _from_options(options: dict[str, Any], device: torch.device) -> tuple[Any, Any, Any]:
    data = load_data(options["data"], options["root"], size=options["image_size"])
    torch.manual_seed(0)
    model = build_model(options["model"], shape=data.shape, classes=len(data.classes)).to(device)
    loader = make_loader(data.train, data, batch_size=options["batch_size"], device=device)
    return model, loader, None


def _train_command(given: dict[str, Any], advice: Advice) -> str:
    """Return the command that trains as advised."""
    rate = next((bound.rate for bound in advice.methods if bound.method == advice.method), None)
    options = {**given, "policy": advice.method, "rate": rate if uses_rate(advice.method) else None}
    words = [
        f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in options.items() if value is not None
    ]
    return f"sparse-train train {' '.join(words)} --epochs {advice.epochs:g}"


def _from_script(name: str) -> tuple[Any, Any, Any]:
    """Import ``module:make``, from the current folder too, and call it."""
    make = _function(name)
    made = make()
    if not isinstance(made, tuple) or len(made) != 3:
        what = f"{len(made)} values" if isinstance(made, tuple) else type(made).__name__
        raise UserError(f"--script {name}: must return (model, loader, loss), got {what}")
    return made


def _function(name: str) -> Callable[[], Any]:
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise UserError(f"--script must be module:make, such as train:make, got {name!r}")
    if (here := os.getcwd()) not in sys.path:  # behind all that is installed
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--script {name}: cannot import {module_name}: {reason}") from error
    function: Callable[[], Any] | None = getattr(module, attribute, None)
    if not callable(function):
        what = "none" if function is None else type(function).__name__
        raise UserError(f"--script {name}: module {module_name} must have a function {attribute}, got {what}")
    return function
