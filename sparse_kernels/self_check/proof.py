"""Proof at first use: a kernel of a GPU serves by default once it has agreed with the reference on that device.

The first call that a kernel would serve waits for a short self-check of its operation, for the dtype of the call. What
agrees serves from then on. What does not is named once in the log, and the reference serves. Nothing is checked while
a CUDA graph is captured, or while a compiler, a tracer or a mode watches: there a kept verdict counts, or else the
reference serves. A backend asked for by name serves without a verdict.

Environment:
    SPARSE_KERNELS_SELFCHECK: ``auto`` (the default) keeps verdicts for later processes; ``force`` checks once in every
        process, whatever was kept; ``off`` checks nothing, so that only kept verdicts count. Read at import.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

from sparse_kernels._tracing import dynamo_compiling, unwatched
from sparse_kernels.self_check import verdicts
from sparse_kernels.self_check.cases import comparisons
from sparse_kernels.self_check.verdicts import AGREED

logger = logging.getLogger("sparse_kernels")

LIMIT = 20.0  # seconds of checks on a device, those of all operations together
SAY_AFTER = 2.0  # seconds, after which the user is told what is waited for
COMMAND = "python -m sparse_kernels check"
MODES = ("auto", "off", "force")

Part = tuple[str, str, torch.dtype | None, torch.device]  # backend, operation, dtype of the logits, device

mode = os.environ.get("SPARSE_KERNELS_SELFCHECK") or "auto"
if mode not in MODES:
    raise ValueError(f"`SPARSE_KERNELS_SELFCHECK` must be one of {', '.join(MODES)}, got {mode!r}")

_known: dict[Part, str] = {}
_kept: dict[torch.device, dict[str, str]] = {}  # as they were on disk at the first look
_spent: dict[torch.device, float] = {}
_unfinished: set[Part] = set()
_told: set[str] = set()
_lock = threading.RLock()
# What says nothing about a kernel: another process may find it mended.
_PASSING = (OSError, ImportError, MemoryError, subprocess.SubprocessError, torch.cuda.OutOfMemoryError)


def part_name(backend: str, op: str, dtype: torch.dtype | None) -> str:
    """Return the name that a verdict is kept under, such as ``triton row_stats bfloat16``.

    Args:
        backend: its name.
        op: the operation.
        dtype: of the logits; None for an operation without.
    """
    return f"{backend} {op}" + ("" if dtype is None else f" {str(dtype).removeprefix('torch.')}")


def unproved_reason(name: str, backend: Any, op: str, dtype: torch.dtype | None, device: torch.device) -> str | None:
    """Return why a kernel may not serve by default on this device, or None; check it if nobody has yet.

    Args:
        name: of the backend.
        backend: its module.
        op: the operation.
        dtype: of the logits; None for an operation without.
        device: of the call's tensors.
    """
    if dynamo_compiling():
        return None if _kept_agreed(name, op, dtype, device.type, device.index) else "not proved before this trace"
    reason = _known.get((name, op, dtype, device))
    if reason is None:
        reason = _decided(name, backend, (name, op, dtype, device))
    return reason or None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _kept_agreed(name: str, op: str, dtype: torch.dtype | None, kind: str, index: int | None) -> bool:
    """Return True if a kernel is proved already; called by a compiler as it traces, and not compiled itself."""
    device = torch.device(kind) if index is None else torch.device(kind, index)
    reason = known_reason(name, op, dtype, device)
    if reason is None:
        _tell(
            f"{op} is compiled with the reference: the {name} kernels are not proved on {_title(device)} yet. Call "
            f"sparse_kernels.warm_up or run `{COMMAND}` first"
        )
    return reason == AGREED


def known_reason(name: str, op: str, dtype: torch.dtype | None, device: torch.device) -> str | None:
    """Return a kernel's verdict, this process's or a kept one; None if there is none. Nothing is checked.

    Args:
        name: of the backend.
        op: the operation.
        dtype: of the logits; None for an operation without.
        device: of the call's tensors.
    """
    reason = _known.get((name, op, dtype, device))
    if reason is None and mode != "force":
        with _lock:
            if device not in _kept:
                _kept[device] = verdicts.load(device)
            reason = _kept[device].get(part_name(name, op, dtype))
    return reason


def record(device: torch.device, found: dict[tuple[str, str, torch.dtype | None], str]) -> bool:
    """Take over verdicts that were reached elsewhere, and keep them; return False if no file can be written.

    Args:
        device: that they are about.
        found: verdicts by backend, operation and dtype.
    """
    with _lock:
        for (name, op, dtype), reason in found.items():
            _known[name, op, dtype, device] = reason
        return verdicts.save(device, {part_name(*part): reason for part, reason in found.items()})


@contextlib.contextmanager
def without_limit() -> Iterator[None]:
    """Let checks in the block take the time that they need; what ran out of it before is checked again."""
    global LIMIT
    with _lock:
        before, LIMIT = LIMIT, float("inf")
        for part in _unfinished:
            _known.pop(part, None)
        _unfinished.clear()
    try:
        yield
    finally:
        LIMIT = before


def _decided(name: str, backend: Any, part: Part) -> str:
    """Return the verdict, kept or found now."""
    _, op, dtype, device = part
    with _lock:  # one thread checks, the others wait for its verdict
        reason = known_reason(name, op, dtype, device)
        if reason is None:
            if mode == "off":
                return "not proved on this device, and SPARSE_KERNELS_SELFCHECK is off"
            if not _may_check(device):
                return "not proved on this device, and inside a capture or a trace nothing is checked"
            reason, keep = _checked(name, backend, part)
            if reason != AGREED:
                _tell(
                    f"the {name} kernels do not serve {op}{'' if dtype is None else f' of {dtype} logits'} on "
                    f"{_title(device)}; the reference does. {reason}. `{COMMAND}` prints a report"
                )
            if keep:
                verdicts.save(device, {part_name(name, op, dtype): reason})
        _known[part] = reason
    return reason


def _may_check(device: torch.device) -> bool:
    if not unwatched() or torch._C._is_tracing():
        return False
    if device.type != "cuda":
        return True
    with torch.cuda.device(device):
        return not torch.cuda.is_current_stream_capturing()


def _checked(name: str, backend: Any, part: Part) -> tuple[str, bool]:
    """Return the reason against a kernel, and whether it is to be kept for other processes."""
    _, op, dtype, device = part
    began, compared = time.monotonic(), 0
    before = _spent.get(device, 0.0)
    # A thread tells, as one comparison may wait long for a compiler.
    late = threading.Timer(
        SAY_AFTER, lambda: _tell(f"checking the {name} kernels on {_title(device)}, once for these versions")
    )
    late.daemon = True
    late.start()
    try:
        with undisturbed(device):
            for found in comparisons(op, backend, device, dtype):
                if not found.agrees:
                    return described(found), True
                compared += 1
                spent = time.monotonic() - began
                if before + spent > LIMIT:
                    _unfinished.add(part)
                    return f"the check ran out of its {LIMIT:.0f} s after {compared} comparisons, which agreed", False
    except Exception as error:
        return failure(error)
    finally:
        late.cancel()
        _spent[device] = before + time.monotonic() - began
    return (AGREED, True) if compared else ("nothing was compared", False)


def described(found: Any) -> str:
    """Return a comparison that does not agree, in words.

    Args:
        found: the comparison.
    """
    return f"{found.what} differs: error {found.error:.3g}, PyTorch's own {found.torch_error:.3g}"


def failure(error: Exception) -> tuple[str, bool]:
    """Return an exception in one line, and whether it is a verdict about the kernel.

    Args:
        error: raised by a kernel or around it.
    """
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    passing = isinstance(error, _PASSING) or "C compiler" in text
    return f"{type(error).__name__}: {text}", not passing


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Make a check independent of the caller's settings: gradients, inference mode, autocast, reports of waiting.

    Args:
        device: of the check.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
            stack.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
            torch.cuda.set_sync_debug_mode("default")
        yield


def _title(device: torch.device) -> str:
    return verdicts.surroundings(device)["device"]


def _tell(message: str) -> None:
    if message not in _told:
        _told.add(message)
        logger.warning("sparse_kernels: %s", message)
