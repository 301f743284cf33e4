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
from sparse_kernels.triton_kernels.launch import BYTES, Launch, choose, merged, slices
from sparse_kernels.types import STATISTICS, GatedRows, RowStats

WEIGHABLE = tuple(name for name in STATISTICS if name != "argmax")
MAX_PROGRAMS = 2**31 - 1  # of a grid's first dimension
MAX_CLASSES = 2**30  # a row's columns are counted in 32 bits, a block past its end included
_NO_WEIGHTS: dict[str, float] = {}


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("sparse_kernels.triton_kernels.row_stats")


@functools.cache
def _backward_kernels() -> Any:
    return importlib.import_module("sparse_kernels.triton_kernels.row_stats_backward")


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
    if call.classes > MAX_CLASSES:
        return f"{call.classes} classes; it serves {MAX_CLASSES} at most"
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


@functools.cache
def processors(device: torch.device) -> int:
    """Of a GPU; a CPU interprets programs one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class _Plan:
    """How the kernels see the tensors of a call, the logits first, and the programs for them."""

    def __init__(self, call: StatsCall, tensors: Sequence[Tensor]) -> None:
        found = _layout(call, *tensors)
        assert found is not None
        self.outer, self.inner, strides = found
        logits, itemsize, classes = call.logits, call.logits.element_size(), call.classes
        self.logits = logits
        class_stride = 1 if classes == 1 else max(of[2] for of in strides)
        self.tile = choose(classes, class_stride, itemsize, len(tensors))
        programs = self.programs(self.tile)
        self.slices, slice_columns = 1, classes
        if programs > MAX_PROGRAMS:
            raise ValueError(
                f"{self.outer} x {self.inner} rows of {classes} classes want {programs} programs, above 2^31 - 1"
            )
        if programs:
            self.slices, slice_columns = slices(self.tile, programs, classes, processors(logits.device))
        width = BYTES // itemsize
        whole = classes <= self.tile.columns  # in one block: then rows must start on 16 bytes; else as the logits' do
        starts = [tensor.data_ptr() // itemsize for tensor in tensors]
        aligned = all(
            (start - (0 if whole else starts[0])) % width == 0
            and all(
                (stride - (0 if whole else stride_0)) % width == 0
                for stride, stride_0 in zip(of[:2], strides[0][:2], strict=True)
            )
            for start, of in zip(starts, strides, strict=True)
        ) and (not whole or classes % width == 0)
        names = ("outer_stride", "inner_stride", "class_stride")
        self.arguments: dict[str, Any] = {
            f"{prefix}{name}": stride
            for prefix, of in zip(("", "gradient_"), strides, strict=False)
            for name, stride in zip(names, of, strict=True)
        }
        self.arguments |= {
            "misaligned": starts[0] % width,
            "inner_rows": self.inner,
            "classes": classes,
            "slice_columns": slice_columns,
            "ignore_index": call.ignore_index,
            "inverse_temperature": 1.0 / call.temperature,
            "softcap": float(call.softcap),
            "label_smoothing": float(call.label_smoothing),
            "DOUBLE": itemsize == 8,
            "ALIGNED": aligned,
            # A row that is one block, but not aligned, is loaded as a loop's last block is: thread by thread.
            "LOOP": not whole or (self.tile.lanes > 1 and not aligned),
        }

    def programs(self, tile: Launch) -> int:
        """Of one slice."""
        return self.outer * -(-self.inner // tile.rows)

    def launch(self, kernel: Any, tile: Launch, slices: int, arguments: dict[str, Any]) -> None:
        """Run the programs of ``tile`` for every row and slice."""
        with torch.cuda.device(self.logits.device) if self.logits.is_cuda else torch.no_grad():
            kernel[(self.programs(tile), slices)](
                CONTIGUOUS=tile.contiguous,
                ROWS=tile.rows,
                CHUNKS=tile.chunks,
                LANES=tile.lanes,
                WIDTH=tile.width,
                num_warps=tile.warps,
                maxnreg=tile.registers,
                **self.arguments,
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
        **dict.fromkeys(("maximum_ptr", "total_ptr", "sums_ptr", "lowest_ptr")),
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
    plan, rows = _Plan(call, [call.logits]), targets.numel()
    kernels = _kernels()
    arguments |= {"rows": rows, "slices": plan.slices}
    if rows == 0:
        return found
    merge = merged(plan.tile, plan.slices, rows)
    if merge is None:
        plan.launch(kernels.row_stats_kernel, plan.tile, 1, arguments | {"PHASE": kernels.WHOLE})
        return found
    sums = torch.empty((7, plan.slices, rows), dtype=accumulator, device=targets.device)
    lowest = torch.empty((plan.slices, rows), dtype=torch.int32, device=targets.device)
    arguments |= {"sums_ptr": sums, "lowest_ptr": lowest}
    plan.launch(kernels.row_stats_kernel, plan.tile, plan.slices, arguments | {"PHASE": kernels.SLICE})
    plan.launch(kernels.row_stats_kernel, merge, 1, arguments | {"PHASE": kernels.MERGE})
    return found


def row_stats(call: StatsCall) -> RowStats:
    """See ``sparse_kernels.row_stats``; not differentiable, which is for ``library`` to add."""
    return RowStats(**_forward(replace(call, logits=call.logits.detach()), call.targets.contiguous()))


def row_stats_saving(call: StatsCall) -> tuple[RowStats, Tensor, Tensor]:
    """``row_stats``, and what its gradient needs of each row: the maximum of the logits after the softcap, and the
    sum of exponentials."""
    call = replace(call, logits=call.logits.detach())
    targets = call.targets.contiguous()
    saved = {name: torch.empty_like(targets, dtype=_accumulator(call)) for name in ("maximum_ptr", "total_ptr")}
    found = _forward(call, targets, saved=saved)
    return RowStats(**found), saved["maximum_ptr"], saved["total_ptr"]


def row_stats_backward(
    call: StatsCall, maximum: Tensor, total: Tensor, entropy: Tensor | None, given: dict[str, Tensor], out: Tensor
) -> None:
    """Writes the gradient in the logits to ``out``, which has their shape and dtype and may be the logits.

    ``maximum``, ``total`` and ``entropy`` are the forward's; ``given`` holds the upstream gradient of loss, entropy
    or both; all of the rows' tensors are contiguous, in the type of the results.
    """
    logits, targets = call.logits.detach(), call.targets.contiguous()
    if _layout(call, logits, out) is None:  # each is two nested loops, but both together are three
        logits = logits.movedim(call.dim, -1).contiguous()
        gradient = torch.empty_like(logits)
        row_stats_backward(replace(call, logits=logits, dim=-1), maximum, total, entropy, given, gradient)
        out.movedim(call.dim, -1).copy_(gradient)
        return
    plan = _Plan(replace(call, logits=logits), [logits, out])
    arguments = {
        "logits_ptr": logits,
        "gradient_ptr": out,
        "targets_ptr": targets,
        "maximum_ptr": maximum,
        "total_ptr": total,
        "entropy_ptr": entropy,
        "loss_gradient_ptr": given.get("loss"),
        "entropy_gradient_ptr": given.get("entropy"),
    }
    if targets.numel():
        plan.launch(_backward_kernels().row_stats_backward_kernel, plan.tile, plan.slices, arguments)


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
