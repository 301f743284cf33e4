"""Ways from a checked call to a backend.

The reference is called as it is: plain PyTorch, which everything sees through. A kernel is called directly if nobody
but the caller looks, since the dispatcher would cost a small call more than the kernel. It is called through
``torch_library`` if a gradient is needed, or if a compiler, a tracer or a dispatch mode must see it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from sparse_kernels import _dispatch, torch_library
from sparse_kernels._arguments import (
    CompactCall,
    ControlCall,
    GateCall,
    GateStepCall,
    SelectCall,
    Settings,
    StatsCall,
    TreeCall,
    check_inplace_backward,
)
from sparse_kernels._dispatch import choose, serve_fused
from sparse_kernels._known import known_of
from sparse_kernels._operands import vetted_selection
from sparse_kernels._tracing import observed, unwatched
from sparse_kernels.backends import cpp_direct
from sparse_kernels.types import DIFFERENTIABLE, GatedRows, RowStats, Selected, Selection


def _differentiable(outputs: Collection[str]) -> bool:
    # Not of a set: PyTorch before 2.9 fails to compile set.isdisjoint.
    for name in DIFFERENTIABLE:  # noqa: SIM110  a generator costs as much as the rest
        if name in outputs:
            return True
    return False


_NAMES = (tuple, list)
_PLAIN = (Tensor, torch.nn.Parameter)
_new = tuple.__new__  # a named tuple's own constructor is one more call of Python


def may_be_direct(backend: str | None, operand: Any, dim: int = -1) -> bool:
    """Return True if a call for this backend may be tried on ``cpp_direct``.

    Args:
        backend: the one asked for, or None.
        operand: the first operand, perhaps no tensor.
        dim: of the classes in the operand. Default: the last.
    """
    if not getattr(operand, "is_cpu", False) or (dim != -1 and dim != operand.ndim - 1):  # the last has two numbers
        return False
    name = backend or _dispatch._forced or _dispatch._preferred
    return cpp_direct.AVAILABLE and (name is None or name == "cpp") and unwatched()


def row_stats(
    logits: Tensor,
    targets: Tensor,
    outputs: str | Collection[str],
    dim: int,
    settings: Settings,
    backend: str | None,
    inplace_backward: bool,
) -> RowStats:
    """Check and serve a ``row_stats`` call."""
    if not inplace_backward and may_be_direct(backend, logits, dim):
        stats = _plain_row_stats(logits, targets, outputs, settings)
        if stats is not None:
            return stats
    known = known_of(StatsCall, (logits, targets), outputs, dim)
    call = StatsCall(logits, targets, outputs, dim, settings, known=known)
    logits = call.logits
    gradient = logits.requires_grad and torch.is_grad_enabled() and _differentiable(call.outputs)
    if inplace_backward and gradient:
        check_inplace_backward(logits)
    name, serve = choose("row_stats", call, backend)
    if name == "torch" or not (gradient or _seen(call)):
        served: RowStats = serve(call)
        return served
    return torch_library.row_stats(call, name, gradient=gradient, inplace_backward=inplace_backward)


def _plain_row_stats(
    logits: Tensor, targets: Tensor, outputs: str | Collection[str], settings: Settings
) -> RowStats | None:
    """Serve the common case by ``cpp_direct``; None for any other."""
    if type(outputs) not in _NAMES or type(logits) not in _PLAIN:
        return None
    gradient = logits.requires_grad and torch.is_grad_enabled() and _differentiable(outputs)
    fields = cpp_direct.row_stats(logits, targets, settings, outputs, gradient)
    if fields is None:
        return None
    if gradient:
        fields = torch_library.plain_row_stats(logits, targets, settings, fields)
    return _new(RowStats, fields)


def gate_rows(call: GateCall, backend: str | None) -> GatedRows:
    """Serve a ``gate_rows`` call."""
    name, serve = choose("gate_rows", call, backend)
    if name == "torch" or not _seen(call):
        gated: GatedRows = serve(call)
        return gated
    return torch_library.gate_rows(call, name)


def compact(call: CompactCall, backend: str | None) -> Selection:
    """Serve a ``compact`` call."""
    name, serve = choose("compact", call, backend)
    if name == "torch" or not observed(*call.operands()):
        selection: Selection = serve(call)
        return selection
    return torch_library.compact(call, name)


def control(call: ControlCall, backend: str | None) -> None:
    """Serve a ``control`` call."""
    name, serve = choose("control", call, backend)
    if name == "torch" or not observed(*call.operands()):
        serve(call)
    else:
        torch_library.control(call, name)


def gather_rows(tree: Any, selection: Selection, backend: str | None) -> Any:
    """Check and serve a ``gather_rows`` call."""
    if may_be_direct(backend, selection.index):
        packed = cpp_direct.gather_rows(tree, selection)
        if packed is not None:
            return packed
    selection = vetted_selection(selection)
    call = TreeCall(tree, selection, selection.size)
    name, serve = choose("gather_rows", call, backend)
    if name == "torch" or not _move_is_seen(call.operands()):
        return serve(call)
    return torch_library.gather_rows(call, name)


def scatter_rows(tree: Any, selection: Selection, backend: str | None) -> Any:
    """Check and serve a ``scatter_rows`` call."""
    selection = vetted_selection(selection)
    call = TreeCall(tree, selection, selection.index.shape[0], scatter=True)
    name, serve = choose("scatter_rows", call, backend)
    if name == "torch" or not _move_is_seen(call.operands()):
        return serve(call)
    return torch_library.scatter_rows(call, name)


def _seen(call: StatsCall) -> bool:
    """Return True if a compiler, a tracer or a dispatch mode must see the operators; nobody sees a known call."""
    return call.known is None and observed(*call.operands())


def _move_is_seen(tensors: list[Tensor]) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return observed(*tensors)


def select(call: SelectCall, backend: str | None) -> Selected:
    """Serve a ``select`` call, composed of its three operations unless a backend has it as one."""
    packing = call.packing
    alone = packing is None or not (packing.arrays or _move_is_seen(packing.tensors))  # no arrays, no gradient
    if alone and not _seen(call):
        served: Selected | None = serve_fused("select", call, backend)
        if served is not None:
            return served
    gated = gate_rows(call, backend)
    weight = None if gated.weight is None else gated.weight.flatten()
    selection = compact(CompactCall(gated.mask.flatten(), weight, call.capacity), backend)
    packed = None if call.tree is None else gather_rows(call.tree, selection, backend)
    return Selected(gated, selection, packed)


def gate_step(call: GateStepCall, backend: str | None) -> Selected:
    """Serve a ``gate_step`` call, composed of ``select`` and ``control`` unless a backend has it as one."""
    if not _seen(call):
        served: Selected | None = serve_fused("gate_step", call, backend)
        if served is not None:
            return served
    state, settings = call.state, call.settings
    if settings.gate_temperature:
        settings = settings._replace(step=state.counters[0])
    selected = select(
        SelectCall(
            call.logits, call.targets, call.outputs, call.dim, settings, state.values[0], call.weights, call.offset,
            None, call.capacity,
        ),
        backend,
    )  # fmt: skip
    gated, selection, _ = selected
    mass = gated.stats.grad_norm
    control(
        ControlCall(
            state, gated.significance.flatten(), call.setpoint, call.targets.flatten(),
            None if mass is None else mass.flatten(), selection.overflow, call.settings,
        ),
        backend,
    )  # fmt: skip
    return selected
