"""Triton kernels as a backend: CUDA tensors; CPU tensors under Triton's interpreter, for tests.

Environment: TRITON_INTERPRET=1 (Triton's own) before the first call. Triton is imported by the first
call that needs it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_kernels import reference
from sparse_kernels.calls import GateCall, StatsCall
from sparse_kernels.tracing import refuse_tensor
from sparse_kernels.triton_kernels.launch import choose
from sparse_kernels.types import STATISTICS, GatedRows, RowStats

WEIGHABLE = tuple(name for name in STATISTICS if name != "argmax")
MAX_PROGRAMS = 2**31 - 1  # of a grid's first dimension
_NO_WEIGHTS: dict[str, float] = {}


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("sparse_kernels.triton_kernels.row_stats")


@functools.cache
def _missing() -> str | None:
    return "triton is not installed" if importlib.util.find_spec("triton") is None else None


def interpreted() -> bool:
    """Whether kernels run on CPU tensors, in Python."""
    return os.environ.get("TRITON_INTERPRET") == "1" and _missing() is None and bool(_kernels().INTERPRETED)


def unavailable() -> str | None:
    """Why this backend cannot be used at all, or None."""
    reason = _missing()
    if reason is None and not torch.cuda.is_available() and not interpreted():
        reason = "no CUDA device, and not interpreted (TRITON_INTERPRET=1)"
    return reason


def detail() -> str:
    """Where the kernels run."""
    return "interpreted" if interpreted() else "CUDA"


def refuse_row_stats(call: StatsCall) -> str | None:
    """Why this call is not served, or None."""
    logits = call.logits
    if _missing() is not None:
        return _missing()
    if not logits.is_cuda and not (logits.is_cpu and interpreted()):
        return f"tensors are on {logits.device}, where Triton only runs interpreted (TRITON_INTERPRET=1)"
    reason = refuse_tensor(logits)
    if reason is not None:
        return reason
    if _layout(call, logits) is None:
        return f"the rows of strides {logits.stride()} are not two nested loops"
    return None


def refuse_gate_rows(call: GateCall) -> str | None:
    """Why this call is not served, or None."""
    return refuse_row_stats(call)


def _layout(call: StatsCall, *tensors: Tensor) -> tuple[int, int, list[tuple[int, int, int]]] | None:
    """Outer rows, inner rows, and each tensor's strides (outer, inner, class); None if it takes more loops."""
    dim = call.dim % call.logits.dim()
    loops: list[tuple[int, list[int]]] = []
    for axis, size in enumerate(call.logits.shape):
        if axis == dim or (size == 1 and call.logits.dim() > 2):  # one row has a stride, or it would compile anew
            continue
        strides = [tensor.stride(axis) for tensor in tensors]
        if loops and all(before == size * stride for before, stride in zip(loops[-1][1], strides, strict=True)):
            loops[-1] = (loops[-1][0] * size, strides)
        else:
            loops.append((size, strides))
    if len(loops) > 2:
        return None
    absent = (1, [0] * len(tensors))
    (outer, outer_strides), (inner, inner_strides) = [absent, absent, *loops][-2:]
    classes = [tensor.stride(dim) for tensor in tensors]
    return outer, inner, list(zip(outer_strides, inner_strides, classes, strict=True))


def _accumulator(call: StatsCall) -> torch.dtype:
    return torch.float64 if call.logits.dtype is torch.float64 else torch.float32


def _signed(value: int) -> int:
    """The low 64 bits, as Triton takes them."""
    return (value + 2**63) % 2**64 - 2**63


def _launch(kernel: Any, call: StatsCall, tensors: Sequence[Tensor], arguments: dict[str, Any]) -> None:
    found = _layout(call, *tensors)
    assert found is not None
    outer, inner, strides = found
    double = call.logits.dtype is torch.float64
    tile = choose(call.classes, strides[0][2], double)
    programs = outer * -(-inner // tile.rows)
    if programs == 0:
        return
    if programs > MAX_PROGRAMS:
        raise ValueError(f"{outer} x {inner} rows of {call.classes} classes want {programs} programs, above 2^31 - 1")
    names = ("outer_stride", "inner_stride", "class_stride")
    for prefix, of in zip(("", "gradient_"), strides, strict=False):
        arguments |= {f"{prefix}{name}": stride for name, stride in zip(names, of, strict=True)}
    with torch.cuda.device(call.logits.device) if call.logits.is_cuda else torch.no_grad():
        kernel[(programs,)](
            inner_rows=inner,
            classes=_kernels().scalar(call.classes),
            ignore_index=call.ignore_index,
            inverse_temperature=1.0 / call.temperature,
            softcap=float(call.softcap),
            label_smoothing=float(call.label_smoothing),
            DOUBLE=double,
            BLOCK_ROWS=tile.rows,
            BLOCK_COLUMNS=tile.columns,
            num_warps=tile.warps,
            **arguments,
        )


def flags(outputs: Sequence[str], weights: Sequence[str], backward: bool = False) -> dict[str, bool]:
    """What the forward kernel is compiled for."""
    asked = {*outputs, *weights}
    return {
        "LOSS": "loss" in asked,
        "ENTROPY": "entropy" in asked or backward,
        "SQUARES": not asked.isdisjoint(("grad_norm", "sum_squares")),
        "MARGIN": "margin" in asked,
        "ARGMAX": "argmax" in asked,
        **{f"W_{name.upper()}": name in weights for name in WEIGHABLE},
    }


def _forward(
    call: StatsCall,
    targets: Tensor,
    gate: dict[str, Any] | None = None,
    saved: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    reference.check_targets(call)  # CPU only
    accumulator = _accumulator(call)
    found = {
        name: torch.empty_like(targets, dtype=torch.int64 if name == "argmax" else accumulator)
        for name in dict.fromkeys(call.outputs)
    }
    weights = call.weights if isinstance(call, GateCall) else _NO_WEIGHTS
    arguments: dict[str, Any] = {
        "logits_ptr": call.logits,
        "targets_ptr": targets,
        **{f"{name}_ptr": found.get(name) for name in STATISTICS},
        **dict.fromkeys(("maximum_ptr", "log_sum_ptr")),
        **(saved or {}),
        **dict.fromkeys(("mask_ptr", "significance_ptr", "weight_ptr", "offset_ptr", "threshold_ptr", "invalid_ptr")),
        **{f"w_{name}": float(weights.get(name, 0.0)) for name in WEIGHABLE},
        "gate_temperature": 1.0,
        "p_min": 0.0,
        "seed": 0,
        "step": 0,
        "step_ptr": None,
        **(gate or {}),
        **flags(tuple(found), tuple(weights)),
    }
    _launch(_kernels().row_stats_kernel, call, [call.logits], arguments)
    return found


def row_stats(call: StatsCall) -> RowStats:
    """See ``sparse_kernels.row_stats``; not differentiable, which is for ``library`` to add."""
    return RowStats(**_forward(replace(call, logits=call.logits.detach()), call.targets.contiguous()))


def row_stats_saving(call: StatsCall) -> tuple[RowStats, Tensor, Tensor]:
    """``row_stats``, and what its gradient needs of each row: the maximum of the logits after the softcap, and the
    sum of exponentials."""
    call = replace(call, logits=call.logits.detach())
    targets = call.targets.contiguous()
    saved = {name: torch.empty_like(targets, dtype=_accumulator(call)) for name in ("maximum_ptr", "log_sum_ptr")}
    found = _forward(call, targets, saved=saved)
    return RowStats(**found), saved["maximum_ptr"], saved["log_sum_ptr"].exp()


def row_stats_backward(
    call: StatsCall, maximum: Tensor, total: Tensor, entropy: Tensor | None, given: dict[str, Tensor], out: Tensor
) -> None:
    """Writes the gradient in the logits to ``out``, which has their shape and dtype and may be the logits.

    ``given`` holds the upstream gradient of loss, entropy or both; all of the rows' tensors are contiguous.
    """
    call = replace(call, logits=call.logits.detach())
    gradient = out.detach()
    if _layout(call, call.logits, gradient) is None:  # the rows of both in two nested loops
        call = replace(call, logits=call.logits.contiguous())
        gradient = torch.empty_like(call.logits)
    arguments = {
        "logits_ptr": call.logits,
        "gradient_ptr": gradient,
        "targets_ptr": call.targets.contiguous(),
        "maximum_ptr": maximum,
        "log_sum_ptr": total.log(),
        "entropy_ptr": entropy,
        "loss_gradient_ptr": given.get("loss"),
        "entropy_gradient_ptr": given.get("entropy"),
    }
    _launch(_kernels().row_stats_backward_kernel, call, [call.logits, gradient], arguments)
    if gradient.data_ptr() != out.data_ptr():
        out.copy_(gradient)


def gate_rows(call: GateCall) -> GatedRows:
    """See ``sparse_kernels.gate_rows``."""
    call = replace(call, logits=call.logits.detach())
    targets, device = call.targets.contiguous(), call.logits.device
    mask = torch.empty_like(targets, dtype=torch.bool)
    significance = torch.empty_like(targets, dtype=_accumulator(call))
    weight = torch.empty_like(targets, dtype=torch.float32) if call.gate_temperature else None
    invalid = torch.zeros((), dtype=torch.int32, device=device)
    on_device = isinstance(call.step, Tensor) and call.step.device == device and weight is not None
    gate = {
        "mask_ptr": mask.view(torch.int8),
        "significance_ptr": significance,
        "weight_ptr": weight,
        "offset_ptr": None if call.offset is None else call.offset.detach().contiguous(),
        "threshold_ptr": call.threshold.detach(),
        "invalid_ptr": invalid,
        "gate_temperature": float(call.gate_temperature or 1.0),
        "p_min": float(call.p_min),
        "seed": _signed(call.seed),
        "step": 0 if on_device or weight is None else _signed(int(call.step)),
        "step_ptr": call.step if on_device else None,
    }
    found = _forward(call, targets, gate)
    return GatedRows(mask, significance, weight, RowStats(**found), invalid)
