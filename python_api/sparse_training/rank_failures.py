"""Ranks that fail: the others are told, and end with one line in place of waiting for the time-out.

A rank whose public call ends with an exception writes it to the store that torch.distributed's ranks met through. A
rank that waits for others looks there every second. Where PyTorch itself waits, as in a backward pass, a rank wakes up
once the failed one's process has ended, and looks then. A rank that fails before the ranks have exchanged anything
takes part in their first exchange with its failure, so that no operation is left half done and all can go on.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from sparse_training.errors import UserError, one_line

LOOK = 1.0  # seconds between two looks at the store
HEAR = 5.0  # seconds that a failed rank waits for the others to hear of it: its process may hold the store


class SharedError(UserError):
    """An error that every rank raises by itself, or has heard from another."""


class Failure(NamedTuple):
    """A failed rank's part of the first exchange of the ranks.

    Attributes:
        line: the error in one line.
    """

    line: str


class _Call:
    """A public call that all ranks take part in, and the place of its failures in the store.

    Attributes:
        number: number of the call in this process, from 1; the ranks make the same calls in the same order.
        exchanged: True once the ranks have begun to exchange something.
        end: time until which this rank waits for others; infinity as long as it has not failed.
    """

    count = 0
    current: _Call | None = None

    def __init__(self) -> None:
        _Call.count += 1
        self.number, self.exchanged, self.end = _Call.count, False, math.inf
        self.store: Any = dist.distributed_c10d._get_default_store()

    def tell(self, error: BaseException, exchange: Callable[[Any], Any] | None) -> None:
        """Tell the others that this rank failed, and wait until they have heard of it or ended.

        In the first ``exchange`` of the call, if none has begun and the others come to it; or else by the store.
        """
        if exchange is not None and not self.exchanged and isinstance(error, Exception):
            self.end = time.monotonic() + HEAR
            with contextlib.suppress(RuntimeError, SharedError):
                exchange(Failure(_summary(error)))
                return
        with contextlib.suppress(RuntimeError):  # the store may have gone with its process
            self.store.set(self._key("failure"), f"rank {dist.get_rank()} failed: {_summary(error)}")
            self.store.add(self._key("failures"), 1)
            self.leave()
            end = time.monotonic() + HEAR
            while self.store.add(self._key("left"), 0) < dist.get_world_size() and time.monotonic() < end:
                time.sleep(0.02)

    def leave(self) -> None:
        """Count this rank among those that need no more news."""
        with contextlib.suppress(RuntimeError):
            self.store.add(self._key("left"), 1)

    def look(self) -> str:
        """Return the line of a rank that failed; "" for none."""
        try:
            if not self.store.add(self._key("failures"), 0):
                return ""
            line: str = self.store.get(self._key("failure")).decode()
        except RuntimeError:
            return "the process that holds the ranks' store has ended"
        return line

    def _key(self, name: str) -> str:
        return f"sparse_training/{self.number}/{name}"


@contextlib.contextmanager
def together(exchange: Callable[[Any], Any] | None = None) -> Iterator[None]:
    """Context of a public call that all ranks make: a failure of one of them ends it on all.

    Within another such call, and without other ranks, it has no effect.

    Args:
        exchange: sends a value to all ranks, for a call that begins with this exchange, whose values are then passed to
            ``check_exchanged``. Default None, for other calls.

    Raises:
        SharedError: another rank failed, or its process ended.
    """
    connected = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not connected or _Call.current is not None:
        yield
        return
    call = _Call.current = _Call()
    try:
        yield
    except SharedError:
        call.leave()
        raise
    except RuntimeError as error:
        if not is_of_a_lost_rank(error):
            call.tell(error, exchange)
            raise
        call.leave()
        raise _lost(call, error) from error
    except BaseException as error:
        call.tell(error, exchange)
        raise
    finally:
        _Call.current = None


def wait_for(work: Any, device: torch.device) -> None:
    """Wait for a collective operation, and look meanwhile whether a rank has failed.

    Args:
        work: the operation, begun with ``async_op=True``.
        device: device of its tensors. On an accelerator its stream waits, and not this process.

    Raises:
        SharedError: another rank failed, or its process ended.
    """
    call = _Call.current
    if call is not None:
        call.exchanged = True
    if call is None or device.type != "cpu":
        work.wait()
        return
    while not _ends(work, call):
        if line := call.look():
            raise SharedError(f"{line}; this rank ends too")
        if time.monotonic() > call.end:
            raise SharedError("the others are not there")


def check_exchanged(values: Sequence[Any]) -> None:
    """Refuse to go on where the first exchange of a call has a failure of a rank.

    Args:
        values: what the ranks sent, in order.

    Raises:
        SharedError: a rank failed.
    """
    for rank, value in enumerate(values):
        if isinstance(value, Failure):
            raise SharedError(f"rank {rank} failed: {value.line}; this rank ends too")


def _ends(work: Any, call: _Call) -> bool:
    """Wait for an operation for a while; return False if it goes on."""
    try:
        work.wait(timedelta(seconds=LOOK))
    except RuntimeError as error:
        if work.is_completed():
            raise _lost(call, error) from error
        return False
    return True


def is_of_a_lost_rank(error: BaseException) -> bool:
    """Tell whether an error is that of a collective operation whose other ranks are gone or silent."""
    return dist.is_available() and (isinstance(error, dist.DistError) or "gloo/transport" in str(error))


def _lost(call: _Call, error: RuntimeError) -> SharedError:
    line = call.look() or f"another rank has ended or does not answer: {_summary(error)}"
    return SharedError(f"{line}; this rank ends too")


def _summary(error: BaseException) -> str:
    """Return an error's type and the first line of its message; of a ``UserError`` the message alone."""
    name, line = type(error).__name__, one_line(error)
    return line if isinstance(error, UserError) or line == name else f"{name}: {line}"
