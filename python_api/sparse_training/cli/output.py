"""Standard output and error of a command: a reader that is gone, or a full disk, ends no run."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO


class Output:
    """A stream that drops what cannot be written; it has all else of the stream that it stands for.

    Args:
        stream: the stream.

    Attributes:
        failed: the first failure, but for a reader that is gone; None for none.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._gone = False
        self.failed: OSError | None = None

    def write(self, text: str) -> int:
        """Write, or drop, a text."""
        if not self._gone:
            try:
                return self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError) as error:  # ValueError: the stream is closed
                self._drop(error)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered, or drop it."""
        if not self._gone:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._drop(error)

    def _drop(self, error: Exception) -> None:
        """Drop this and what follows; what the stream holds goes nowhere, so that its end cannot fail either."""
        self._gone = True
        if isinstance(error, OSError) and error.errno not in (errno.EPIPE, errno.EINVAL):
            self.failed = error
        with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def tolerant_output() -> Iterator[Output]:
    """Let standard output and error be ``Output`` inside, and warnings be lines; yield standard output."""
    _open_closed()
    before = sys.stdout, sys.stderr, warnings.showwarning
    out, error = (Output(stream or open(os.devnull, "w")) for stream in before[:2])  # noqa: SIM115
    handler = logging.StreamHandler(error)
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    handler.setLevel(logging.WARNING)
    handler.addFilter(_Once())
    logger = logging.getLogger("sparse_training")
    sys.stdout, sys.stderr, warnings.showwarning = out, error, _show_warning
    logger.addHandler(handler)
    try:
        yield out
    finally:
        out.flush()
        error.flush()
        logger.removeHandler(handler)
        sys.stdout, sys.stderr, warnings.showwarning = before


class _Once(logging.Filter):
    """Lets each message pass once, whichever of many runs says it."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether the message is new."""
        new = record.getMessage() not in self.said
        self.said.add(record.getMessage())
        return new


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **named: Any) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _open_closed() -> None:
    """Open the streams that the caller closed on nothing, so that no file of the run gets their numbers."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # the lowest that is free
        pass
    os.close(number)
