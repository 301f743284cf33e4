"""Choice of the backend that serves a call.

``TABLE`` lists, for each operation, its backends in order. A backend is a module with two functions for each operation
that it has: ``<op>(call)`` serves a call, and ``<op>_unsupported_reason(call)`` says why it cannot, or None. By
default the first backend that can serve does, and the reasons of those before it are logged once. A backend that is
asked for by name serves, or its reason is raised.

Environment:
    SPARSE_KERNELS_BACKEND: the backend for every operation, as ``backend=`` in a call. Read at import.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from sparse_kernels import reference
from sparse_kernels._tracing import tensors_unsupported_reason
from sparse_kernels.backends import cpp, cuda
from sparse_kernels.backends.triton import backend as triton

logger = logging.getLogger("sparse_kernels")

BACKENDS: dict[str, Any] = {"cpp": cpp, "triton": triton, "torch": reference, "cuda": cuda}


class Server(NamedTuple):
    """A backend's two functions for one operation."""

    backend: str
    by_name: bool  # never chosen by default
    unsupported_reason: Callable[[Any], str | None]
    serve: Callable[[Any], Any]


def _servers(op: str, default: str, by_name: str) -> tuple[Server, ...]:
    def server(name: str, named: bool) -> Server:
        module = BACKENDS[name]
        return Server(name, named, getattr(module, f"{op}_unsupported_reason"), getattr(module, op))

    return (*(server(name, False) for name in default.split()), *(server(name, True) for name in by_name.split()))


# The compiled extension comes first and the reference, which serves everything, last. GPU kernels serve only by name:
# the Triton kernels are tested interpreted and compiled ahead of time, the CUDA kernels on a CPU; until they are
# measured on a GPU, the reference serves there by default. An operation without the reference is made of others, and
# a backend here has it as one call.
TABLE: dict[str, tuple[Server, ...]] = {
    "row_stats": _servers("row_stats", "cpp torch", "triton cuda"),
    "gate_rows": _servers("gate_rows", "cpp torch", "triton cuda"),
    "compact": _servers("compact", "cpp torch", "cuda"),
    "control": _servers("control", "cpp torch", "cuda"),
    "gather_rows": _servers("gather_rows", "cpp torch", "cuda"),
    "scatter_rows": _servers("scatter_rows", "cpp torch", "cuda"),
    "select": _servers("select", "cpp", "cuda"),
    "gate_step": _servers("gate_step", "cpp", "cuda"),
}
_logged: set[str] = set()
_forced = os.environ.get("SPARSE_KERNELS_BACKEND") or None


class BackendUnavailable(ValueError):
    """Raised if the backend asked for by name cannot serve a call; the message says why."""


def choose(op: str, call: Any, name: str | None) -> tuple[str, Callable[[Any], Any]]:
    """Return the name and the function of the backend for a call, decided by metadata alone.

    Args:
        op: the operation; one that the reference serves.
        call: the checked call.
        name: the backend asked for; None for the first that can serve.

    Raises:
        BackendUnavailable: the backend asked for cannot serve the call.
    """
    name = name or _forced
    if name is None:
        for candidate, _, unsupported_reason, serve in TABLE[op]:
            reason = unsupported_reason(call) or _operands_reason(candidate, call)
            if reason is None:
                return candidate, serve
            _log_once(f"{op}: {candidate} not used: {reason}")
    if name not in BACKENDS:
        raise BackendUnavailable(f"unknown backend {name!r}; use one of {', '.join(BACKENDS)}")
    for candidate, _, unsupported_reason, serve in TABLE[op]:
        if candidate == name:
            reason = unsupported_reason(call) or _operands_reason(candidate, call)
            if reason is not None:
                raise BackendUnavailable(f"backend {name!r} cannot serve this {op}: {reason}")
            return name, serve
    served_by = ", ".join(server.backend for server in TABLE[op])
    raise BackendUnavailable(f"backend {name!r} has no {op}; use one of {served_by}")


def serve_fused(op: str, call: Any, name: str | None) -> Any | None:
    """Serve an operation that some backends have as one call; None if the caller must compose it.

    Args:
        op: ``select`` or ``gate_step``.
        call: the checked call.
        name: the backend asked for; None for any default one.
    """
    name = name or _forced
    for candidate, by_name, unsupported_reason, serve in TABLE[op]:
        chosen = candidate == name if name else not by_name
        if chosen and unsupported_reason(call) is None and _operands_reason(candidate, call) is None:
            return serve(call)
    return None


def _operands_reason(backend: str, call: Any) -> str | None:
    """Return why a backend that takes addresses cannot take one of the call's tensors, or None.

    Here for all of them, so that no operand's address leaves Python unlooked at.
    """
    return None if backend == "torch" else tensors_unsupported_reason(call.operands())


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """Serve every operation in the block by one backend, as SPARSE_KERNELS_BACKEND does for a process.

    Args:
        name: one of ``BACKENDS``.
    """
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
    """Active backends: ``{op: {"active": name, "detail": text, "others": {name: reason}}}``. Prints as a table."""

    def __str__(self) -> str:
        lines = []
        for op, entry in self.items():
            detail = f" ({entry['detail']})" if entry["detail"] else ""
            lines.append(f"{op:13} {entry['active']}{detail}")
            lines += [f"{'':13}   not {name}: {reason}" for name, reason in entry["others"].items()]
        return "\n".join(lines)


def backend_info() -> BackendInfo:
    """Return which backend serves each operation for plain CPU tensors, and why the others do not.

    Example:
        >>> print(sparse_kernels.backend_info())
        row_stats     cpp (avx512, 2 threads)
                        not torch: cpp comes first
    """
    info = BackendInfo()
    for op, servers in TABLE.items():
        if not any(server.backend == "torch" for server in servers):
            continue  # made of the others
        others: dict[str, str] = {}
        active = ""
        for name, by_name, *_ in servers:
            reason = BACKENDS[name].unavailable_reason()
            if reason is None and _forced not in (None, name):
                reason = f"SPARSE_KERNELS_BACKEND={_forced}"
            if reason is None and active:
                reason = f"{active} comes first"
            if reason is None and by_name and _forced != name:
                reason = f"used only by name (backend={name!r})"
            if reason is None:
                active = name
            else:
                others[name] = reason
        detail = BACKENDS[active].detail() if active else ""
        info[op] = {"active": active or "none", "detail": detail, "others": others}
    return info
