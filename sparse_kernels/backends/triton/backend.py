"""Backend ``triton``: Triton kernels on CUDA tensors, and on CPU tensors under Triton's interpreter, for tests.

Triton is imported by the first call that needs it.

Environment:
    TRITON_INTERPRET: Triton's own; set it to 1 before the first call, to interpret the kernels.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_kernels import reference
from sparse_kernels._arguments import GateCall, StatsCall
from sparse_kernels._tracing import tensor_unsupported_reason
from sparse_kernels.backends.triton.launch import BYTES, MERGE, SLICE, WHOLE, merged
from sparse_kernels.backends.triton.plan import Plan, Variant, layout
from sparse_kernels.types import GatedRows, RowStats

MAX_CLASSES = 2**30  # a row's columns are counted in 32 bits, a block past its end included
_NO_WEIGHTS: dict[str, float] = {}
_NOTHING: dict[str, Any] = {}


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("sparse_kernels.backends.triton.row_stats")


@functools.cache
def _backward_kernels() -> Any:
    return importlib.import_module("sparse_kernels.backends.triton.row_stats_backward")


_missing = "triton is not installed" if importlib.util.find_spec("triton") is None else None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def interpreted() -> bool:
    """Return True if kernels run on CPU tensors, in Python. A compiler takes the answer as it is."""
    return os.environ.get("TRITON_INTERPRET") == "1" and _missing is None and bool(_kernels().INTERPRETED)


def unavailable_reason() -> str | None:
    """Return why this backend cannot be used at all, or None."""
    reason = _missing
    if reason is None and not torch.cuda.is_available() and not interpreted():
        reason = "no CUDA device, and not interpreted (TRITON_INTERPRET=1)"
    return reason


def detail() -> str:
    """Return where the kernels run."""
    return "interpreted" if interpreted() else "CUDA"


def row_stats_unsupported_reason(call: StatsCall) -> str | None:
    """Return why this call is not served, or None."""
    logits = call.logits
    if _missing is not None:
        return _missing
    if not logits.is_cuda and not (logits.is_cpu and interpreted()):
        return f"tensors are on {logits.device}, where Triton only runs interpreted (TRITON_INTERPRET=1)"
    reason = tensor_unsupported_reason(logits)
    if reason is not None:
        return reason
    if not logits.is_contiguous() and layout(logits.shape, call.dim, [logits.stride()]) is None:
        return f"the rows of strides {logits.stride()} are not two nested loops"
    if call.classes > MAX_CLASSES:
        return f"{call.classes} classes; it serves {MAX_CLASSES} at most"
    return None


gate_rows_unsupported_reason = row_stats_unsupported_reason


def _signed(value: int) -> int:
    """Return the low 64 bits as a signed number, which Triton takes."""
    return (value + 2**63) % 2**64 - 2**63


@functools.cache
def processors(device: torch.device) -> int:
    """Return a GPU's number of processors; 1 for a CPU, which interprets programs one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


_cached_plan = functools.lru_cache(1024)(Plan)  # a batch is like the one before it


def _plan(call: StatsCall, *tensors: Tensor) -> Plan:
    logits = call.logits
    itemsize = logits.element_size()
    return _cached_plan(
        logits.shape,
        call.dim,
        logits.dtype,
        processors(logits.device),
        tuple([tensor.stride() for tensor in tensors]),
        tuple([tensor.data_ptr() % BYTES // itemsize for tensor in tensors]),
    )


def _forward(
    call: StatsCall,
    targets: Tensor,
    gate: dict[str, Any] | None = None,
    saved: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    reference.check_targets(call)  # CPU only
    results = {
        name: torch.empty_like(targets, dtype=torch.int64 if name == "argmax" else call.accumulator)
        for name in dict.fromkeys(call.outputs)
    }
    rows = targets.numel()
    if rows == 0:
        return results
    weights = call.weights if isinstance(call, GateCall) else _NO_WEIGHTS
    plan, kernels = _plan(call, call.logits), _kernels()
    names = tuple(results), tuple(weights)
    values: dict[str, Any] = {
        **(saved or _NOTHING),
        **(gate or _NOTHING),
        "logits_ptr": call.logits,
        "targets_ptr": targets,
        "rows": rows,
        "slices": plan.slices,
    }
    for name, tensor in results.items():
        values[name + "_ptr"] = tensor
    for name, weight in weights.items():
        values["w_" + name] = float(weight)
    merge, kernel = merged(plan.tile, plan.slices, rows), kernels.row_stats_kernel
    if merge is None:
        plan.launch(kernel, call, plan.tile, 1, Variant(*names, WHOLE), values)
        return results
    values["sums_ptr"] = torch.empty((7, plan.slices, rows), dtype=call.accumulator, device=targets.device)
    values["lowest_ptr"] = torch.empty((plan.slices, rows), dtype=torch.int32, device=targets.device)
    plan.launch(kernel, call, plan.tile, plan.slices, Variant(*names, SLICE), values)
    plan.launch(kernel, call, merge, 1, Variant(*names, MERGE), values)
    return results


def _detached(call: Any) -> Any:
    """Return the call without a gradient, which the interpreter would refuse to copy back."""
    return replace(call, logits=call.logits.detach()) if call.logits.requires_grad else call


def row_stats(call: StatsCall) -> RowStats:
    """Serve ``sparse_kernels.row_stats``; not differentiable, which ``torch_library`` adds."""
    return RowStats(**_forward(_detached(call), call.targets.contiguous()))


def row_stats_saving(call: StatsCall) -> tuple[RowStats, Tensor, Tensor]:
    """Serve ``row_stats``, and return what its gradient needs of each row.

    Returns:
        The statistics, the maximum of the logits after the softcap, and the sum of exponentials.
    """
    call = _detached(call)
    targets = call.targets.contiguous()
    saved = {name: torch.empty_like(targets, dtype=call.accumulator) for name in ("maximum_ptr", "total_ptr")}
    results = _forward(call, targets, saved=saved)
    return RowStats(**results), saved["maximum_ptr"], saved["total_ptr"]


def row_stats_backward(
    call: StatsCall, maximum: Tensor, total: Tensor, entropy: Tensor | None, upstream: dict[str, Tensor], out: Tensor
) -> None:
    """Write the gradient in the logits to ``out``.

    Args:
        call: the forward's call.
        maximum: saved by the forward, contiguous, of the targets' shape and the results' dtype.
        total: as ``maximum``.
        entropy: the forward's, contiguous; None without an upstream gradient of it.
        upstream: the contiguous upstream gradient of ``loss``, ``entropy`` or both, in the results' dtype.
        out: the logits' shape and dtype; it may be the logits.
    """
    call = _detached(call)
    logits, targets = call.logits, call.targets.contiguous()
    if layout(logits.shape, call.dim, [logits.stride(), out.stride()]) is None:
        # Each is two nested loops, but both together are three.
        logits = logits.movedim(call.dim, -1).contiguous()
        gradient = torch.empty_like(logits)
        row_stats_backward(replace(call, logits=logits, dim=-1), maximum, total, entropy, upstream, gradient)
        out.movedim(call.dim, -1).copy_(gradient)
        return
    if not targets.numel():
        return
    plan = _plan(call, logits, out)
    values = {
        "logits_ptr": logits,
        "gradient_ptr": out,
        "targets_ptr": targets,
        "maximum_ptr": maximum,
        "total_ptr": total,
        "entropy_ptr": entropy,
        "loss_gradient_ptr": upstream.get("loss"),
        "entropy_gradient_ptr": upstream.get("entropy"),
    }
    plan.launch(_backward_kernels().row_stats_backward_kernel, call, plan.tile, plan.slices, Variant(), values)


def gate_rows(call: GateCall) -> GatedRows:
    """Serve ``sparse_kernels.gate_rows``."""
    return _gate_rows(call, torch.zeros((), dtype=torch.int32, device=call.logits.device))


def gate_rows_uncounted(call: GateCall, finished: Tensor) -> GatedRows:
    """Serve ``gate_rows`` and leave ``invalid`` to be written by a kernel that follows on the stream: a launch less.

    Args:
        call: the call.
        finished: int32, for the kernel that follows: if there are rows, its first element is 0 by then.
    """
    return _gate_rows(call, torch.empty((), dtype=torch.int32, device=call.logits.device), finished)


def _gate_rows(call: GateCall, invalid: Tensor, finished: Tensor | None = None) -> GatedRows:
    call = _detached(call)
    targets, device, settings = call.targets.contiguous(), call.logits.device, call.settings
    mask = torch.empty_like(targets, dtype=torch.bool)
    significance = torch.empty_like(targets, dtype=call.accumulator)
    weight = torch.empty_like(targets, dtype=torch.float32) if settings.gate_temperature else None
    step = settings.step
    on_device = isinstance(step, Tensor) and step.device == device and weight is not None
    gate = {
        "mask_ptr": mask.view(torch.int8),
        "significance_ptr": significance,
        "weight_ptr": weight,
        "offset_ptr": None if call.offset is None else call.offset.detach().contiguous(),
        "threshold_ptr": call.threshold.detach(),
        "invalid_ptr": invalid if finished is None else None,
        "finished_ptr": finished,
        "gate_temperature": float(settings.gate_temperature or 1.0),
        "p_min": float(settings.p_min),
        "seed": _signed(settings.seed),
        "step": 0 if on_device or weight is None else _signed(int(step)),
        "step_ptr": step if on_device else None,
    }
    results = _forward(call, targets, gate)
    return GatedRows(mask, significance, weight, RowStats(**results), invalid)
