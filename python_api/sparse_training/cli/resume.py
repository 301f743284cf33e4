"""``sparse-train resume``: go on with an interrupted run, comparison or study."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from sparse_training.cli.budget import BUDGET, BUDGETS
from sparse_training.cli.folders import OPTIONS, read_options
from sparse_training.cli.options import with_options
from sparse_training.cli.signals import Invocation
from sparse_training.errors import UserError
from sparse_training.models.build import ModelFactory, without_code

# Commands that can be resumed, with the options that every version wrote down; others have their former defaults.
_OF_ALL = ("data", "root", "model", "batch_size", "device", "threads", "rate", "lr", "dense_start", "dense_end")
RESUMABLE = {
    "train": (*_OF_ALL, "seed"),
    "compare": (*_OF_ALL, "methods", "seeds", "seconds", "precision", "evaluations"),
    "study": (*_OF_ALL, "methods", "seeds", "seconds", "evaluations"),
}


@click.command(name="resume")
@click.argument("folder", type=click.Path())
@click.option(
    "--trust-code", is_flag=True, help="Import the module of a module:factory that FOLDER names; it runs that code."
)
@with_options(*BUDGET)
@click.pass_obj
def command(invocation: Invocation, /, folder: str, trust_code: bool, **budget: float | None) -> None:
    """Continue what was interrupted in FOLDER.

    A larger budget of the kind that it had extends a training run, a finished one too.
    """
    path = Path(folder)
    advice = (
        f"which {path / OPTIONS} names and resume does not import by itself; "
        f"if you trust it: sparse-train resume --trust-code {shlex.quote(folder)}"
    )
    with nullcontext() if trust_code else without_code(advice):
        name, options = resumed_options(path)
        ModelFactory(options["model"])
        run = import_module(f"sparse_training.cli.{name}").run
        if given := {kind: amount for kind, amount in budget.items() if amount is not None}:
            options = extended(options, name, given)
        run(invocation, path, options, resume=True)


def extended(options: dict[str, Any], command: str, given: dict[str, float]) -> dict[str, Any]:
    """Return the options of a training run with a larger budget.

    Args:
        options: those that the run was made with.
        command: its command.
        given: the budget by kind.

    Raises:
        UserError: another command, another kind, or a budget that is not larger.
    """
    kinds = " and ".join(f"--{kind}" for kind in given)
    if command != "train":
        raise UserError(f"{kinds} extends a run of train, not one of {command}")
    had = {kind: amount for kind in BUDGETS if (amount := options.get(kind)) is not None}
    if list(had) != list(given) or not all(given[kind] > amount for kind, amount in had.items()):
        said = ", ".join(f"--{kind} {amount:g}" for kind, amount in had.items())
        now = ", ".join(f"--{kind} {amount:g}" for kind, amount in given.items())
        raise UserError(f"a larger budget of the run's kind extends it: it has {said}, got {now}")
    return {**options, **given}


def resumed_options(path: Path) -> tuple[str, dict[str, Any]]:
    """Read the options of a run, checked as those of the command line are.

    Args:
        path: folder of the run.

    Returns:
        The name of its command, and the options.

    Raises:
        UserError: options of no command that can be resumed, or that the command line would refuse.
    """
    found = read_options(path)
    name = found.pop("command", None)
    if not isinstance(name, str) or name not in RESUMABLE:
        raise UserError(f"{path / OPTIONS} has the command {name!r:.60}; only {', '.join(RESUMABLE)} can be resumed")
    line = found.pop("line", "")
    command: click.Command = import_module(f"sparse_training.cli.{name}").command
    known = {parameter.name for parameter in command.params}
    if unknown := [option for option in found if option not in known]:
        raise UserError(f"{path / OPTIONS} has the option {unknown[0]!r:.60}, which {name} does not take")
    if missing := [option for option in RESUMABLE[name] if option not in found]:
        raise UserError(f"{path / OPTIONS} must have the option {missing[0]}, which {name} needs")
    for option, value in found.items():
        if not _is_text(str(value)):
            raise UserError(f"{path / OPTIONS}: {option} must be text without NUL characters or surrogates")
    given = {option: _as_typed(value) for option, value in found.items() if value is not None}
    try:
        context = command.make_context(name, [], default_map=given)
    except click.UsageError as error:
        raise UserError(f"{path / OPTIONS}: {error.format_message()}") from None
    options = {option: value for option, value in context.params.items() if option in found}
    return name, {"command": name, "line": str(line), **options}


def _is_text(value: str) -> bool:
    """Tell whether a text can be the name of a file."""
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:  # half a character, which JSON can say
        return False


def _as_typed(value: Any) -> Any:
    """Return a value as it is typed on the command line: lists with commas."""
    if not isinstance(value, list):
        return value if isinstance(value, bool) else str(value)
    end = "," if all(isinstance(part, int) for part in value) else ""  # "4," is the seed 4, "4" are four
    return ",".join(map(str, value)) + end
