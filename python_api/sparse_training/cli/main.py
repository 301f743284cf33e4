"""Entry point: ``sparse-train advise | simulate | train | compare | study | bounds | resume | report``.

A wrong request is one line on stderr and exit code 2, before anything is written. SIGINT, SIGTERM and SIGHUP end a run
at a step, with what is needed to resume it on disk, and exit with 128 + the signal.

Commands are imported when they are called, so that ``sparse-train --help`` waits for no PyTorch.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from sparse_training.cli.output import tolerant_output
from sparse_training.cli.signals import Invocation, catch_signals
from sparse_training.errors import UserError

# Name of each command, which is also its module's, and its help in a line: the first of its docstring.
COMMANDS = {
    "advise": "Measure in a minute whether training on fewer rows would help.",
    "simulate": "Play a run on more ranks and samples than are at hand.",
    "train": "Train one model with one method.",
    "compare": "Train methods side by side at equal wall-clock.",
    "study": "Compare methods with dense training on several tasks.",
    "bounds": "Measure how fast each scorer lets a step be.",
    "resume": "Continue what was interrupted in FOLDER.",
    "report": "Draw the comparison, study or run in FOLDER again.",
}
# Names of version 0.1.0.
FORMER_COMMANDS = {"ceilings": "bounds"}
FORMER_OPTIONS = {
    "--anneal": "--dense-end",
    "--arms": "--methods",
    "--checkpoint-every": "--checkpoint-interval",
    "--policies": "--methods",
    "--warmup": "--dense-start",
}
EXTRAS = (
    "jinja2",
    "markupsafe",
    "matplotlib",
    "PIL",
    "rich",
    "scipy",
    "tomli",
)  # modules that the extra "train" installs


class Commands(click.Group):
    """A group that imports a command when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command.

        Raises:
            click.UsageError: a former name.
        """
        if cmd_name in FORMER_COMMANDS:
            now = FORMER_COMMANDS[cmd_name]
            raise click.UsageError(f"the command {cmd_name} is now called {now}; use: sparse-train {now}", ctx)
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"sparse_training.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands' help without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _print_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from sparse_kernels import __version__

        click.echo(f"sparse-train, version {__version__}")
        context.exit()


@click.group(cls=Commands, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version."
)
def cli() -> None:
    """Train on the rows that matter, and measure what that gains."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments after the program's name. Default: those of the process.

    Returns:
        The exit code.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    with tolerant_output() as output:
        code = _run(argv)
        output.flush()
        if output.failed is not None:
            print(f"error: standard output cannot be written: {output.failed.strerror}", file=sys.stderr)
            code = code or 1
    return code


def _run(argv: list[str]) -> int:
    """Run a command, and print what the user can mend as one line."""
    try:
        for number, argument in enumerate(argv, 1):
            _check_text(argument, f"argument {number}")
        with catch_signals() as signals:
            invocation = Invocation(shlex.join(["sparse-train", *argv]), signals)
            cli.main(argv, prog_name="sparse-train", standalone_mode=False, obj=invocation)
            return 128 + signals.received if signals.received else 0
    except getattr(click.exceptions, "NoArgsIsHelpError", ()) as error:  # click 8.2 and later
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        return 128 + (signals.received or signal.SIGINT)
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
    print(f"error: {_rank()}{' '.join(message.split())}", file=sys.stderr)
    return 2


def _check_text(text: str, name: str) -> None:
    """Refuse bytes that are no UTF-8, which no file of the run could hold as they are.

    Raises:
        UserError: there are some.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name} must be UTF-8, got {os.fsencode(text)!r}") from None


def _message(error: Exception) -> str | None:
    """One line for an error that the user can mend; None for a fault of the program."""
    kernels = sys.modules.get("sparse_kernels")  # not imported for this: it imports PyTorch
    if isinstance(error, click.NoSuchOption) and error.option_name in FORMER_OPTIONS:
        return f"the option {error.option_name} is now called {FORMER_OPTIONS[error.option_name]}"
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in EXTRAS:
        return missing_extra(error)
    if isinstance(error, (UserError, ImportError)) or (kernels and isinstance(error, kernels.BackendUnavailable)):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return None


def missing_extra(error: ModuleNotFoundError) -> str:
    """Say how to install the module that was not found."""
    return f"no module {error.name}; install it with: pip install 'sparse-kernels[train]'"


def _rank() -> str:
    """Prefix of messages under torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ""
    from sparse_training.ranks import launched

    rank, ranks = launched()
    return f"rank {rank}: " if ranks > 1 else ""
