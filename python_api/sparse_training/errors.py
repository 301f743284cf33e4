"""The exception for requests that cannot be served, and other errors in a line."""

from __future__ import annotations


class UserError(ValueError):
    """A request that cannot be served; the message is one line that names what was given and what to give.

    The command line prints the line and exits with code 2.
    """


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where there is none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
