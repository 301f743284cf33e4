"""``sparse-train resume``: go on with an interrupted run, comparison or study."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import click

from sparse_training.cli.folders import OPTIONS, read_options
from sparse_training.cli.signals import Invocation
from sparse_training.errors import UserError

RESUMABLE = ("train", "compare", "study")


@click.command(name="resume")
@click.argument("folder", type=click.Path())
@click.pass_obj
def command(invocation: Invocation, folder: str) -> None:
    """Continue what was interrupted in FOLDER."""
    path = Path(folder)
    options = read_options(path)
    name = options.get("command")
    if name not in RESUMABLE:
        raise UserError(f"{path / OPTIONS} has the command {name!r}; only {', '.join(RESUMABLE)} can be resumed")
    import_module(f"sparse_training.cli.{name}").run(invocation, path, options, resume=True)
