"""Types of the options' values, and their checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import click

from sparse_training.errors import UserError


class Finite(click.FloatRange):
    """A finite number in a range; click's own ranges let NaN through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert, and refuse what is not finite."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not finite", param, ctx)
        return number


POSITIVE = Finite(min=0, min_open=True)
NOT_NEGATIVE = Finite(min=0)
FRACTION = Finite(min=0, max=1)
SHARE = Finite(min=0, max=1, min_open=True)
PART = Finite(min=0, max=1, max_open=True)
COUNT = click.IntRange(1, 2**62)
SEED = click.IntRange(0, 2**62)  # PyTorch's generators take 64 bits
THREADS = click.IntRange(1, 4096)
WORKERS = click.IntRange(0, 4096)


def checked_by(check: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, str | None], str | None]:
    """Make the callback of an option that refuses the texts that a check refuses."""

    def callback(context: click.Context, parameter: click.Parameter, text: str | None) -> str | None:
        try:
            if text is not None:
                check(text)
        except UserError as error:
            raise click.BadParameter(str(error)) from None
        return text

    return callback
