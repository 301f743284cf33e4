"""Which backend serves a call.

Each operation has an ordered list of backends. A backend is a module-like object with, for each
operation that it has, ``refuse_<op>(call) -> str | None`` (why it cannot serve this call) and
``<op>(call)``. Chosen by name, a backend that cannot serve raises with its reason; chosen
by default, the next one is tried, and the reason is logged once.

Environment: SPARSE_KERNELS_BACKEND names the backend for every operation, as ``backend=`` does; it is read at import.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sparse_kernels import cpp_backend, cuda_backend, reference, triton_backend

logger = logging.getLogger("sparse_kernels")

BACKENDS: dict[str, Any] = {"cpp": cpp_backend, "triton": triton_backend, "torch": reference, "cuda": cuda_backend}
# The compiled extension first, the reference last: it serves everything.
OPS = ("row_stats", "gate_rows", "compact", "control", "gather_rows", "scatter_rows")
ORDER: dict[str, tuple[str, ...]] = dict.fromkeys(OPS, ("cpp", "torch"))
# Served only when asked for by name: the Triton kernels are tested interpreted and compiled ahead of time, the CUDA
# kernels run on a CPU, but until they have been run and measured on a GPU, the reference serves there by default.
BY_NAME: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("row_stats", "gate_rows"), ("triton", "cuda")),
    **dict.fromkeys(("compact", "control", "gather_rows", "scatter_rows", "select", "gate_step"), ("cuda",)),
}
# Operations made of others, which these backends have as one call.
FUSED: dict[str, tuple[str, ...]] = {"select": ("cpp",), "gate_step": ("cpp",)}
_logged: set[str] = set()


class BackendUnavailable(ValueError):
    """The backend asked for by name cannot serve this call; the message says why."""


def _functions(op: str, name: str) -> tuple[Callable[[Any], str | None], Callable[[Any], Any]]:
    return getattr(BACKENDS[name], f"refuse_{op}"), getattr(BACKENDS[name], op)


# Looked up once: a call of a few rows is over in microseconds.
_TABLE = {op: {name: _functions(op, name) for name in (*ORDER[op], *BY_NAME.get(op, ()))} for op in OPS}
_DEFAULT = {op: [(name, *_TABLE[op][name]) for name in ORDER[op]] for op in OPS}
_FUSED = {op: [(name, *_functions(op, name)) for name in (*names, *BY_NAME.get(op, ()))] for op, names in FUSED.items()}
_forced = os.environ.get("SPARSE_KERNELS_BACKEND") or None


def choose(op: str, call: Any, name: str | None) -> tuple[str, Callable[[Any], Any]]:
    """The backend named, or else the first in order that can serve ``call``, and its function; by metadata alone."""
    name = name or _forced
    if name is None:
        for candidate, refuse, serve in _DEFAULT[op]:
            reason = refuse(call)
            if reason is None:
                return candidate, serve
            _log_once(f"{op}: {candidate} not used: {reason}")
        raise AssertionError(f"no backend serves {op}")  # the reference never refuses
    if name not in BACKENDS:
        raise BackendUnavailable(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    served_by = _TABLE[op]
    if name not in served_by:
        raise BackendUnavailable(f"backend {name!r} has no {op}; it is served by: {', '.join(served_by)}")
    refuse, serve = served_by[name]
    reason = refuse(call)
    if reason is not None:
        raise BackendUnavailable(f"backend {name!r} cannot serve this {op}: {reason}")
    return name, serve


def fused(op: str, call: Any, name: str | None) -> Any | None:
    """The result of the first backend that has ``op`` as one call and serves it; None where the caller must compose."""
    name = name or _forced
    for candidate, refuse, serve in _FUSED[op]:
        wanted = candidate == name if name else candidate in FUSED[op]
        if wanted and refuse(call) is None:
            return serve(call)
    return None


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """Every operation called within is served by the backend of that name, as with SPARSE_KERNELS_BACKEND."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _log_once(message: str) -> None:
    if message not in _logged and not torch.compiler.is_compiling():  # a trace cannot hold a log call
        _logged.add(message)
        logger.info(message)


class BackendInfo(dict[str, dict[str, Any]]):
    """``{op: {"active": name, "detail": text, "others": {name: why not}}}``; prints as a table."""

    def __str__(self) -> str:
        lines = []
        for op, entry in self.items():
            detail = f" ({entry['detail']})" if entry["detail"] else ""
            lines.append(f"{op:13} {entry['active']}{detail}")
            lines += [f"{'':13}   not {name}: {why}" for name, why in entry["others"].items()]
        return "\n".join(lines)


def backend_info() -> BackendInfo:
    """What serves each operation for plain CPU tensors, and why the others do not."""
    info = BackendInfo()
    for op, order in ORDER.items():
        others: dict[str, str] = {}
        active = ""
        for name in (*order, *BY_NAME.get(op, ())):
            reason = BACKENDS[name].unavailable()
            if reason is None and _forced not in (None, name):
                reason = f"SPARSE_KERNELS_BACKEND={_forced}"
            if reason is None and active:
                reason = f"{active} comes first"
            if reason is None and name not in order and _forced != name:
                reason = f"used only by name (backend={name!r})"
            if reason is None:
                active = name
            else:
                others[name] = reason
        detail = BACKENDS[active].detail() if active else ""
        info[op] = {"active": active or "none", "detail": detail, "others": others}
    return info
