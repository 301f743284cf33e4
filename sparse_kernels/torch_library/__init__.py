"""Every operation as a PyTorch operator, ``torch.ops.sparse_kernels.*``.

Operators are what autograd, torch.compile, torch.export and dispatch modes see of a kernel. ``schemas`` defines them,
``gradients`` their derivatives, whichever backend computes them. The functions here call them with a checked call.

An operator's last argument names the backend that serves it, ``cpp``, ``triton`` or ``cuda``. The reference is none of
them: it is plain PyTorch, which all of these see through by themselves.

Where only autograd must see a kernel, an ``autograd.Function`` of the same gradient calls it: through the dispatcher
and PyTorch's wrappers a small call takes four times as long.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparse_kernels._arguments import CompactCall, ControlCall, GateCall, Settings, StatsCall, TreeCall
from sparse_kernels._tracing import observed
from sparse_kernels.torch_library import gradients
from sparse_kernels.torch_library.schemas import SCORING, flat_settings
from sparse_kernels.types import STATISTICS, GatedRows, RowStats, Selection

_ops = torch.ops.sparse_kernels

for _result in (RowStats, GatedRows, Selection):  # or a program that takes or returns one could not be saved
    pytree._register_namedtuple(_result, serialized_type_name=f"sparse_kernels.{_result.__name__}")


def row_stats(call: StatsCall, backend: str, *, gradient: bool, inplace_backward: bool) -> RowStats:
    """Serve a call that is observed or differentiable.

    Args:
        call: the call.
        backend: one that serves it.
        gradient: make the result differentiable in the logits.
        inplace_backward: let the gradient take the memory of the logits.
    """
    outputs = _in_order(call.outputs)
    operator = _ops.row_stats if observed(call.logits) else gradients.row_stats
    scoring = tuple(call.settings)[: len(SCORING)]  # PyTorch 2.6 does not compile a NamedTuple's slice
    results = operator(
        call.logits, call.targets, outputs, call.dim, *scoring,
        gradient, inplace_backward and gradient, backend,
    )  # fmt: skip
    # Behind the outputs: what was saved. Cut off, as PyTorch 2.6's compiler zips equal lengths alone.
    return RowStats(**dict(zip(outputs, results[: len(outputs)], strict=True)))


def plain_row_stats(
    logits: Tensor, targets: Tensor, settings: Settings, results: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Return a RowStats's fields, differentiable in the logits.

    Args:
        logits: of the call.
        targets: of the call.
        settings: of the call.
        results: what ``cpp_direct.row_stats`` returned for a gradient.
    """
    return gradients.plain_row_stats(logits, targets, settings, results)


def gate_rows(call: GateCall, backend: str) -> GatedRows:
    """Serve a call through the operator.

    Args:
        call: the call.
        backend: one that serves it.
    """
    outputs = _in_order(call.outputs)
    mask, significance, invalid, *rest = _ops.gate_rows(
        call.logits, call.targets, call.threshold, list(call.weights), [float(w) for w in call.weights.values()],
        call.offset, outputs, call.dim, *flat_settings(call.settings), backend,
    )  # fmt: skip
    weight = None
    if call.settings.gate_temperature:
        weight, *rest = rest
    return GatedRows(mask, significance, weight, RowStats(**dict(zip(outputs, rest, strict=True))), invalid)


def _in_order(outputs: Any) -> list[str]:
    """Return the outputs in the order of STATISTICS: the same graph for every order, and for a set in every process."""
    return [name for name in STATISTICS if name in outputs]


def compact(call: CompactCall, backend: str) -> Selection:
    """Serve a call through the operator.

    Args:
        call: the call.
        backend: one that serves it.
    """
    index, weight, count, overflow = _ops.compact(call.mask, call.weight, call.capacity, backend)
    return Selection(index, weight, count, overflow, call.mask.shape[0])


def control(call: ControlCall, backend: str) -> None:
    """Serve a call through the operator.

    Args:
        call: the call.
        backend: one that serves it.
    """
    settings = call.settings
    _ops.control(
        *call.state, call.significance, call.setpoint, call.labels, settings.ignore_index, call.mass, call.overflow,
        settings.gate_temperature, settings.p_min, backend,
    )  # fmt: skip


def gather_rows(call: TreeCall, backend: str) -> Any:
    """Serve a call that is observed or differentiable.

    Args:
        call: the call.
        backend: one that serves it.
    """
    return _move_tree("gather_rows", call, backend)


def scatter_rows(call: TreeCall, backend: str) -> Any:
    """Serve a call that is observed or differentiable.

    Args:
        call: the call.
        backend: one that serves it.
    """
    return _move_tree("scatter_rows", call, backend)


def _move_tree(name: str, call: TreeCall, backend: str) -> Any:
    index, _, count, _, size = call.selection
    tensors = call.tensors
    if observed(index, *tensors):
        return call.rebuild(getattr(_ops, name)(tensors, index, count, size, backend) if tensors else [])
    return call.rebuild(list(gradients.move_rows(name, index, count, size, backend, *tensors)))
