"""Signals that end a command, and the invocation that every command gets."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

HANGUP = getattr(signal, "SIGHUP", None)  # the terminal was closed; not on Windows


class Signals:
    """Ends a command at once by SIGINT, SIGTERM or SIGHUP; while it trains, by the first one at the next step.

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
        if number == HANGUP and not first:  # the shell and the kernel both send it, and nobody is impatient
            return
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
    """Handle the signals inside; outside the main thread, which alone may, they are left as they are.

    So is SIGHUP where it is ignored, as under ``nohup``: the command goes on without a terminal.
    """
    signals = Signals()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if HANGUP is not None and signal.getsignal(HANGUP) is not signal.SIG_IGN:
        numbers.append(HANGUP)
    try:
        before = {number: signal.signal(number, signals.handle) for number in numbers}
    except ValueError:
        before = {}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
