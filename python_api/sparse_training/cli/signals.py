"""Signals that end a command, and the invocation that every command gets."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class Signals:
    """Ends a command at once by SIGINT or SIGTERM; while it trains, by the first one at the next step.

    Attributes:
        received: number of the first signal; 0 before one came.
    """

    def __init__(self) -> None:
        self.received = 0
        self._waits = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Take note of a signal.

        Raises:
            KeyboardInterrupt: nothing is being trained, or it is the second one.
        """
        first, self.received = not self.received, self.received or number
        if not (first and self._waits):
            raise KeyboardInterrupt

    @contextmanager
    def at_next_step(self) -> Iterator[None]:
        """Let the first signal inside end the command where ``stop`` is asked, with everything on the disk."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

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
