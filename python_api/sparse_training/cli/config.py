"""Options from a TOML file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from sparse_training.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _read(context: click.Context, parameter: click.Parameter, path: str | None) -> None:
    """Let the file's values stand in for the command's defaults; the command line goes before them."""
    if path is not None:
        context.default_map = {**(context.default_map or {}), **read_config(Path(path), context.command)}


CONFIG = click.option(
    "--config", type=click.Path(), is_eager=True, expose_value=False, callback=_read,
    help="TOML file of these options, without the dashes before them; the command line goes before it.",
)  # fmt: skip


def read_config(path: Path, command: click.Command) -> dict[str, Any]:
    """Read the options of a command.

    Args:
        path: TOML file whose keys are the options' names, with dashes or underscores within, and whose values are
            single ones, or lists where an option takes several.
        command: the command.

    Returns:
        The values by the names of the command's parameters.

    Raises:
        UserError: a file that cannot be read, or a key or value that is no option's.
    """
    try:
        entries = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # UTF-8 or TOML
        raise UserError(f"{path} cannot be read as TOML: {error}") from None
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    known = {parameter.name: parameter for parameter in options if parameter.name not in ("config", "resume")}
    values: dict[str, Any] = {}
    for key, value in entries.items():
        name = key.replace("-", "_")
        if name not in known:
            listed = ", ".join(str(each).replace("_", "-") for each in known)
            raise UserError(f"{path} has the key {key!r}; {command.name} takes {listed}")
        values[name] = as_text(value, f"{path}: {key}", flag=known[name].is_flag)
    return values


def as_text(value: Any, where: str, *, flag: bool = False) -> Any:
    """Return a value as the command line would give it: a list with commas.

    Args:
        value: a value of a file.
        where: its place, in messages.
        flag: True for an option that is there or not.

    Raises:
        UserError: a value that the option cannot take.
    """
    if flag:
        if not isinstance(value, bool):
            raise UserError(f"{where} must be true or false, got {value!r:.60}")
        return value
    if isinstance(value, list) and value and all(map(_is_single, value)):
        return ",".join(map(str, value)) + ","  # "4," is the seed 4, "4" the number of seeds
    if not _is_single(value):
        raise UserError(f"{where} must be a text or a number, or a list of such, got {value!r:.60}")
    return value


def _is_single(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)
