"""Signals that end a command, and the invocation that every command gets."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class Signals:
    """The first SIGINT or SIGTERM asks a command to end at its next step; a second one ends it at once."""

    def __init__(self) -> None:
        self.received = 0  # number of the signal; 0 before one came

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Take note of a signal.

        Raises:
            KeyboardInterrupt: it is the second one.
        """
        if self.received:
            raise KeyboardInterrupt
        self.received = number

    def stop(self) -> bool:
        """True once a signal has come."""
        return self.received != 0


@dataclass(frozen=True)
class Invocation:
    """The command line of a command, and the signals that end it."""

    line: str
    signals: Signals


@contextmanager
def catch_signals() -> Iterator[Signals]:
    """Handle SIGINT and SIGTERM inside; outside the main thread, which alone may, they are left as they are."""
    signals = Signals()
    try:
        before = {number: signal.signal(number, signals.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        before = {}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
