"""Choice of the backend that serves a call.

``TABLE`` lists, for each operation, its backends in order. A backend is a module with two functions for each operation
that it has: ``<op>(call)`` serves a call, and ``<op>_unsupported_reason(call)`` says why it cannot, or None. By
default the first that can serve does, of those for the call's device, and the reasons of those before it are logged
once. A kernel of a GPU must be proved first: see ``self_check.proof``.

A demand (``backend=``) is served by the backend that it names, or its reason is raised. ``gpu`` names the CUDA and the
Triton kernels together.

Environment, read at import:
    SPARSE_KERNELS_BACKEND: a demand for every call of the process, wherever the backend has the operation and serves
        the call's kind of device. All other calls go by default.
    SPARSE_KERNELS_PREFER: a preference: this backend comes first, and what it cannot serve, or is not proved for, goes
        by default.
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
from sparse_kernels.self_check import proof
from sparse_kernels.self_check.cases import SCORED

logger = logging.getLogger("sparse_kernels")

BACKENDS: dict[str, Any] = {"cpp": cpp, "triton": triton, "torch": reference, "cuda": cuda}
GPU = ("cuda", "triton")
FAMILIES = {"gpu": GPU}
# Kinds of devices that a backend serves by default; the reference serves all. Triton's interpreter, on a CPU, is for
# tests: it serves where it is asked for.
_KINDS = {"cpp": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",), "torch": None}


class Server(NamedTuple):
    """A backend's two functions for one operation."""

    backend: str
    by_name: bool  # never chosen by default
    kinds: tuple[str, ...] | None  # of devices, by default; None for all
    unsupported_reason: Callable[[Any], str | None]
    serve: Callable[[Any], Any]


def _servers(op: str, default: str, by_name: str = "") -> tuple[Server, ...]:
    def server(name: str, named: bool) -> Server:
        module = BACKENDS[name]
        return Server(name, named, _KINDS[name], getattr(module, f"{op}_unsupported_reason"), getattr(module, op))

    return (*(server(name, False) for name in default.split()), *(server(name, True) for name in by_name.split()))


# The kernels of each kind of device come first and the reference, which serves everything, last. An operation without
# the reference is made of others, and a backend here has it as one call. The scores of ``cuda`` are ``triton``'s.
TABLE: dict[str, tuple[Server, ...]] = {
    "row_stats": _servers("row_stats", "cpp triton torch", "cuda"),
    "gate_rows": _servers("gate_rows", "cpp triton torch", "cuda"),
    "compact": _servers("compact", "cpp cuda torch"),
    "control": _servers("control", "cpp cuda torch"),
    "gather_rows": _servers("gather_rows", "cpp cuda torch"),
    "scatter_rows": _servers("scatter_rows", "cpp cuda torch"),
    "select": _servers("select", "cpp cuda"),
    "gate_step": _servers("gate_step", "cpp cuda"),
}
_logged: set[str] = set()
_forced: str | None = os.environ.get("SPARSE_KERNELS_BACKEND") or None
_preferred: str | None = os.environ.get("SPARSE_KERNELS_PREFER") or None


class BackendUnavailable(ValueError):
    """Raised if the backend asked for by name cannot serve a call; the message says why."""


def choose(op: str, call: Any, name: str | None) -> tuple[str, Callable[[Any], Any]]:
    """Return the name and the function of the backend for a call, decided by metadata alone.

    Args:
        op: the operation; one that the reference serves.
        call: the checked call.
        name: the backend or family asked for; None for the first that can serve.

    Raises:
        BackendUnavailable: the backend asked for cannot serve the call.
    """
    found = _demanded(op, call, name) if name or _forced else None
    found = found or _first(op, call)
    assert found is not None  # the reference serves all
    return found.backend, found.serve


def serve_fused(op: str, call: Any, name: str | None) -> Any | None:
    """Serve an operation that some backends have as one call; None if the caller must compose it.

    Args:
        op: ``select`` or ``gate_step``.
        call: the checked call.
        name: the backend or family asked for; None for any default one.
    """
    demand = name or _forced
    if demand is None:
        found = _first(op, call)
        return None if found is None else found.serve(call)
    for server in TABLE[op]:
        if server.backend in members(demand) and _reason(server, call) is None:
            return server.serve(call)
    return None


def members(name: str) -> tuple[str, ...]:
    """Return the backends that a name stands for, or raise.

    Args:
        name: a backend or a family.

    Raises:
        BackendUnavailable: there is none of that name.
    """
    if name in BACKENDS:
        return (name,)
    if name in FAMILIES:
        return FAMILIES[name]
    raise BackendUnavailable(f"unknown backend {name!r}; use one of {', '.join((*BACKENDS, *FAMILIES))}")


def named(op: str, name: str) -> list[Server]:
    """Return the servers that a name stands for, without those of a family that only their own name chooses.

    Args:
        op: the operation.
        name: a backend or a family.
    """
    some = members(name)
    return [s for s in TABLE[op] if s.backend in some and (s.backend == name or not s.by_name)]


def _demanded(op: str, call: Any, name: str | None) -> Server | None:
    """Return the server that a call or the process demands; None where the process's demand does not reach."""
    demand = name or _forced
    assert demand is not None
    servers = named(op, demand)
    reasons: dict[str, str] = {}
    for server in servers:
        reason = _reason(server, call)
        if reason is None:
            return server
        reasons[server.backend] = reason
    kind = call.device.type
    if name is None and not any(server.kinds is None or kind in server.kinds for server in servers):
        _log_once(f"{op} on {kind} goes by default: {demand}, which SPARSE_KERNELS_BACKEND names, has none there")
        return None
    if not servers:
        served_by = ", ".join(server.backend for server in TABLE[op])
        raise BackendUnavailable(f"backend {demand!r} has no {op}; use one of {served_by}")
    why = "; ".join(reason if backend == demand else f"{backend}: {reason}" for backend, reason in reasons.items())
    raise BackendUnavailable(f"backend {demand!r} cannot serve this {op}: {why}")


def _first(op: str, call: Any) -> Server | None:
    """Return the first server for this kind of device that can serve the call, and is proved where it must be."""
    kind = call.device.type
    for server in TABLE[op] if _preferred is None else preferring(op, _preferred):
        if server.by_name or (server.kinds is not None and kind not in server.kinds):
            continue
        reason = _reason(server, call)
        if reason is None and server.backend in GPU:
            dtype = call.logits.dtype if op in SCORED else None
            reason = proof.unproved_reason(server.backend, BACKENDS[server.backend], op, dtype, call.device)
        if reason is None:
            return server
        _log_once(f"{op}: {server.backend} not used: {reason}")
    return None


def preferring(op: str, name: str) -> list[Server]:
    """Return the servers of an operation, first those that a name stands for, for every kind of device.

    Args:
        op: the operation.
        name: a backend or a family.
    """
    first = [Server(s.backend, False, None, s.unsupported_reason, s.serve) for s in named(op, name)]
    return [*first, *TABLE[op]]


def _reason(server: Server, call: Any) -> str | None:
    """Return why a backend cannot serve a call, or None."""
    known = call.known
    if known is not None and server.unsupported_reason in known.able:
        return None
    reason = server.unsupported_reason(call)
    if reason is None and server.backend != "torch":
        # Here for all that take addresses, so that no operand's address leaves Python unlooked at.
        reason = tensors_unsupported_reason(call.operands())
    if reason is None and known is not None:
        known.able.add(server.unsupported_reason)
    return reason


@contextlib.contextmanager
def forced(name: str | None) -> Iterator[None]:
    """Demand a backend in the block, as SPARSE_KERNELS_BACKEND does for a process.

    Args:
        name: one of ``BACKENDS`` or ``FAMILIES``; None for no demand.
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
