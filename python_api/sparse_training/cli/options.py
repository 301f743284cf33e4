"""Options that several commands share, and the checks of their values."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import click

from sparse_training.cli.config import CONFIG
from sparse_training.cli.values import COUNT, FRACTION, POSITIVE, SHARE, THREADS, checked_by
from sparse_training.data.load import DATASETS
from sparse_training.errors import UserError
from sparse_training.experiments.design import AGAIN
from sparse_training.experiments.tasks import TASKS
from sparse_training.gate.presets import SIGNIFICANCES, preset
from sparse_training.models.build import MODELS
from sparse_training.precision import PRECISIONS
from sparse_training.selection.registry import DEFAULT_RATE, POLICIES, make_policy, make_scorer, uses_rate
from sparse_training.selection.registry import FORMS as SCORER_FORMS

Decorator = Callable[..., Any]


# --- values -----------------------------------------------------------------------------------------


def seeds(context: click.Context, parameter: click.Parameter, text: str) -> list[int]:
    """Read seeds: "3" stands for 0, 1, 2; "4,7" and "4," for themselves."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if "," not in text and numbers:
        numbers = list(range(numbers[0]))
    if not numbers or min(numbers) < 0 or len(set(numbers)) != len(numbers):
        raise click.BadParameter(f"{text!r} must say how many seeds, such as 3, or which, such as 0,1,2")
    return numbers


def fractions(context: click.Context, parameter: click.Parameter, text: str) -> list[float]:
    """Read fractions in (0, 1], separated by commas."""
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = []
    if not values or not all(0.0 < value <= 1.0 for value in values):
        raise click.BadParameter(f"{text!r} must be fractions above 0 and at most 1, such as 1,0.5")
    return list(dict.fromkeys(values))


policy = checked_by(lambda text: make_policy(text, rate=1.0, seed=0))  # or policy@scorer
scorer = checked_by(make_scorer)
significance = checked_by(preset)


def policy_options(context: click.Context, parameter: click.Parameter, text: str | None) -> str | None:
    """Check that a text is settings, separated by commas."""
    if text is not None:
        read_policy_options(text)
    return text


def read_policy_options(text: str) -> dict[str, Any]:
    """Read settings of a policy: "prune=0.3" or "floor=0.1,temperature=0.5".

    Raises:
        click.BadParameter: a text of another form, or a name that is there twice.
    """
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not (name and equals and value) or name in found:
            raise click.BadParameter(f"{text!r} must be settings, each once, such as {OPTIONS_HELP}")
        found[name] = _number(value)
    return found


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def methods(context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
    """Read methods: policies or policy@scorer, separated by commas."""
    names = _each_once(text, "method")
    for name in names:
        policy(context, parameter, name)
    return names


def study_methods(context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
    """Read methods, random-again among them."""
    names = _each_once(text, "method")
    for name in names:
        if name != AGAIN:
            policy(context, parameter, name)
    return names


def scorers(context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
    """Read scorers, separated by commas."""
    names = _each_once(text, "scorer")
    for name in names:
        scorer(context, parameter, name)
    return names


def model(context: click.Context, parameter: click.Parameter, text: str) -> str:
    """Let the module of a factory be found in the current folder, behind all that is installed."""
    if ":" in text and (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    return text


def tasks(context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
    """Read tasks, separated by commas."""
    names = _each_once(text, "task")
    if unknown := [name for name in names if name not in TASKS]:
        raise click.BadParameter(f"{unknown[0]!r} is unknown; use some of {', '.join(TASKS)}")
    return names


def _each_once(text: str, kind: str) -> list[str]:
    names = [name for part in text.split(",") if (name := part.strip())]
    if not names or len(set(names)) != len(names):
        raise click.BadParameter(f"{text!r} must name each {kind} once, and one at least")
    return names


# --- options ----------------------------------------------------------------------------------------

DATA_AND_MODEL: tuple[Decorator, ...] = (
    CONFIG,
    click.option("--data", type=click.Choice(DATASETS), default="digits", help="Data set."),
    click.option("--root", type=click.Path(), help="Folder of the data set."),
    click.option("--image-size", type=COUNT, help="Side in pixels that an image folder's images are resized to."),
    click.option(
        "--model",
        default="cnn-620k",
        callback=model,
        help=f"Model: {', '.join(MODELS)}, or module:factory, from the current folder too.",
    ),
    click.option("--batch-size", type=COUNT, default=128, help="Rows in a batch."),
    click.option("--device", default="cpu", help="PyTorch device, such as cuda:0."),
    click.option("--threads", type=THREADS, help="CPU threads.  [default: PyTorch's choice]"),
)
RUN: tuple[Decorator, ...] = (
    *DATA_AND_MODEL,
    click.option("--rate", type=SHARE, help="Fraction of rows to keep, of methods that have one.  [default: 0.1]"),
    click.option("--lr", type=POSITIVE, default=1e-3, help="Learning rate."),
    click.option(
        "--dense-start", type=FRACTION, default=0.05, help="Fraction of the run that trains on every row at the start."
    ),
    click.option(
        "--dense-end", type=FRACTION, default=0.125, help="Fraction of the run that trains on every row at the end."
    ),
    click.option("--out", type=click.Path(), help="Folder of the run, new or empty.  [default: runs/<time>-<command>]"),
)
PRECISION: Decorator = click.option(
    "--precision", type=click.Choice(["auto", *PRECISIONS]), default="auto", help="Precision of the scoring pass."
)
SEEDS: Decorator = click.option(
    "--seeds", default="3", callback=seeds, help="Number of seeds (3), or which seeds (0,1,2)."
)
RUN_SECONDS: Decorator = click.option(
    "--seconds", type=POSITIVE, default=20.0, help="Budget of each run, in seconds of the calibrated clock."
)
POLICY_NAMES = f"{', '.join(POLICIES)}; gate:significance, such as gate:vision; or policy@scorer, such as gate@early:3"
SIGNIFICANCE_NAMES = f"default, {', '.join(SIGNIFICANCES)}"
SCORER_NAMES = SCORER_FORMS
OPTIONS_HELP = "prune=0.3 of infobatch, uniform=0.2 of importance, or floor=0.1,temperature=0.5 of gate"


def check_rate_is_used(names: Iterable[str], rate: float | None) -> float:
    """Return the rate of the methods that have one.

    Args:
        names: policies, or policy@scorer.
        rate: --rate; None for its default.

    Raises:
        UserError: a rate that none of them uses.
    """
    named = list(names)
    if rate is not None and not any(uses_rate(name) for name in named):
        those = ", ".join(name for name in POLICIES if uses_rate(name))
        raise UserError(f"--rate is used by the methods {those}, got {rate:g} with {', '.join(named)}; leave it out")
    return DEFAULT_RATE if rate is None else rate


def with_options(*options: Decorator) -> Decorator:
    """Decorator that gives a command several options, in this order."""

    def decorate(command: Decorator) -> Decorator:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate
