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
_NOTHING: dict[str, Any] = {}


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
    if not logits.is_contiguous() and _layout(logits.shape, call.dim, [logits.stride()]) is None:
        return f"the rows of strides {logits.stride()} are not two nested loops"
    if call.classes > MAX_CLASSES:
        return f"{call.classes} classes; it serves {MAX_CLASSES} at most"
    return None


def refuse_gate_rows(call: GateCall) -> str | None:
    """Why this call is not served, or None."""
    return refuse_row_stats(call)


def _layout(
    shape: Sequence[int], dim: int, strides: Sequence[Sequence[int]]
) -> tuple[int, int, list[tuple[int, int, int]]] | None:
    """Outer rows, inner rows, and each tensor's strides (outer, inner, class); None if it takes more loops."""
    dim %= len(shape)
    loops: list[tuple[int, list[int]]] = []
    for axis, size in enumerate(shape):
        if axis == dim or (size == 1 and len(shape) > 2):  # one row has a stride, or it would compile anew
            continue
        along = [of[axis] for of in strides]
        if loops and all(before == size * stride for before, stride in zip(loops[-1][1], along, strict=True)):
            loops[-1] = (loops[-1][0] * size, along)
        else:
            loops.append((size, along))
    if len(loops) > 2:
        return None
    absent = (1, [0] * len(strides))
    (outer, outer_strides), (inner, inner_strides) = [absent, absent, *loops][-2:]
    classes = [of[dim] for of in strides]
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
    """How the kernels see tensors of a shape, the logits first, and the programs for them."""

    def __init__(
        self,
        shape: Sequence[int],
        dim: int,
        dtype: torch.dtype,
        processors: int,
        strides: Sequence[Sequence[int]],
        starts: Sequence[int],  # of each tensor, in elements past a multiple of 16 bytes
    ) -> None:
        found = _layout(shape, dim, strides)
        assert found is not None
        self.outer, self.inner, loops = found
        itemsize, classes = dtype.itemsize, shape[dim]
        class_stride = 1 if classes == 1 else max(of[2] for of in loops)
        self.tile = choose(classes, class_stride, itemsize, len(strides))
        programs = self.programs(self.tile)
        self.slices, slice_columns = 1, classes
        if programs > MAX_PROGRAMS:
            raise ValueError(
                f"{self.outer} x {self.inner} rows of {classes} classes want {programs} programs, above 2^31 - 1"
            )
        if programs:
            self.slices, slice_columns = slices(self.tile, programs, classes, processors)
        width = BYTES // itemsize
        whole = classes <= self.tile.columns  # in one block: then rows must start on 16 bytes; else as the logits' do
        aligned = all(
            (start - (0 if whole else starts[0])) % width == 0
            and all(
                (stride - (0 if whole else stride_0)) % width == 0
                for stride, stride_0 in zip(of[:2], loops[0][:2], strict=True)
            )
            for start, of in zip(starts, loops, strict=True)
        ) and (not whole or classes % width == 0)
        names = ("outer_stride", "inner_stride", "class_stride")
        self.arguments: dict[str, Any] = {
            f"{prefix}{name}": stride
            for prefix, of in zip(("", "gradient_"), loops, strict=False)
            for name, stride in zip(names, of, strict=True)
        }
        self.arguments |= {
            "misaligned": starts[0],
            "inner_rows": self.inner,
            "classes": classes,
            "slice_columns": slice_columns,
            "DOUBLE": itemsize == 8,
            "ALIGNED": aligned,
            # A row that is one block, but not aligned, is loaded as a loop's last block is: thread by thread.
            "LOOP": not whole or (self.tile.lanes > 1 and not aligned),
        }

    def programs(self, tile: Launch) -> int:
        """Of one slice."""
        return self.outer * -(-self.inner // tile.rows)

    def launch(self, kernel: Any, call: StatsCall, tile: Launch, slices: int, arguments: dict[str, Any]) -> None:
        """Run the programs of ``tile`` for every row and slice."""
        with torch.cuda.device(call.logits.device) if call.logits.is_cuda else torch.no_grad():
            kernel[(self.programs(tile), slices)](
                ignore_index=call.ignore_index,
                inverse_temperature=1.0 / call.temperature,
                softcap=float(call.softcap),
                label_smoothing=float(call.label_smoothing),
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


_kept_plan = functools.lru_cache(1024)(_Plan)  # a batch is like the one before it


def _plan(call: StatsCall, *tensors: Tensor) -> _Plan:
    logits = call.logits
    itemsize = logits.element_size()
    return _kept_plan(
        logits.shape,
        call.dim,
        logits.dtype,
        processors(logits.device),
        tuple([tensor.stride() for tensor in tensors]),
        tuple([tensor.data_ptr() % BYTES // itemsize for tensor in tensors]),
    )


@functools.lru_cache(1024)
def _constants(outputs: tuple[str, ...], weights: tuple[str, ...]) -> dict[str, Any]:
    """What the forward kernel is compiled for, and no more."""
    asked = {*outputs, *weights}
    pointers = (
        *STATISTICS, "maximum", "total", "sums", "lowest", "mask", "significance", "weight", "offset", "threshold",
        "invalid", "finished", "step",
    )  # fmt: skip
    return {
        **dict.fromkeys(f"{name}_ptr" for name in pointers),
        **dict.fromkeys((f"w_{name}" for name in WEIGHABLE), 0.0),
        "gate_temperature": 1.0,
        "p_min": 0.0,
        "seed": 0,
        "step": 0,
        "LOSS": "loss" in asked,
        "ENTROPY": "entropy" in asked,
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
    rows = targets.numel()
    if rows == 0:
        return found
    weights = call.weights if isinstance(call, GateCall) else _NO_WEIGHTS
    plan, kernels = _plan(call, call.logits), _kernels()
    arguments: dict[str, Any] = {
        **_constants(tuple(found), tuple(weights)),
        **(saved or _NOTHING),
        **(gate or _NOTHING),
        "logits_ptr": call.logits,
        "targets_ptr": targets,
        "rows": rows,
        "slices": plan.slices,
    }
    for name, of_row in found.items():
        arguments[name + "_ptr"] = of_row
    for name, weight in weights.items():
        arguments["w_" + name] = float(weight)
    merge = merged(plan.tile, plan.slices, rows)
    if merge is None:
        arguments["PHASE"] = kernels.WHOLE
        plan.launch(kernels.row_stats_kernel, call, plan.tile, 1, arguments)
        return found
    arguments["sums_ptr"] = torch.empty((7, plan.slices, rows), dtype=accumulator, device=targets.device)
    arguments["lowest_ptr"] = torch.empty((plan.slices, rows), dtype=torch.int32, device=targets.device)
    plan.launch(kernels.row_stats_kernel, call, plan.tile, plan.slices, arguments | {"PHASE": kernels.SLICE})
    plan.launch(kernels.row_stats_kernel, call, merge, 1, arguments | {"PHASE": kernels.MERGE})
    return found


def _detached(call: Any) -> Any:
    """The call without a gradient, which the interpreter would refuse to copy back."""
    return replace(call, logits=call.logits.detach()) if call.logits.requires_grad else call


def row_stats(call: StatsCall) -> RowStats:
    """See ``sparse_kernels.row_stats``; not differentiable, which is for ``library`` to add."""
    return RowStats(**_forward(_detached(call), call.targets.contiguous()))


def row_stats_saving(call: StatsCall) -> tuple[RowStats, Tensor, Tensor]:
    """``row_stats``, and what its gradient needs of each row: the maximum of the logits after the softcap, and the
    sum of exponentials."""
    call = _detached(call)
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
    call = _detached(call)
    logits, targets = call.logits, call.targets.contiguous()
    if _layout(logits.shape, call.dim, [logits.stride(), out.stride()]) is None:
        # Each is two nested loops, but both together are three.
        logits = logits.movedim(call.dim, -1).contiguous()
        gradient = torch.empty_like(logits)
        row_stats_backward(replace(call, logits=logits, dim=-1), maximum, total, entropy, given, gradient)
        out.movedim(call.dim, -1).copy_(gradient)
        return
    if not targets.numel():
        return
    plan = _plan(call, logits, out)
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
    plan.launch(_backward_kernels().row_stats_backward_kernel, call, plan.tile, plan.slices, arguments)


def gate_rows(call: GateCall) -> GatedRows:
    """See ``sparse_kernels.gate_rows``."""
    return _gate_rows(call, torch.zeros((), dtype=torch.int32, device=call.logits.device))


def gate_rows_uncounted(call: GateCall, finished: Tensor) -> GatedRows:
    """``gate_rows`` in one launch, its ``invalid`` left to be written by a kernel that follows on the stream.

    ``finished``, int32, is for that kernel too: where there are rows, its first element is 0 by then.
    """
    return _gate_rows(call, torch.empty((), dtype=torch.int32, device=call.logits.device), finished)


def _gate_rows(call: GateCall, invalid: Tensor, finished: Tensor | None = None) -> GatedRows:
    call = _detached(call)
    targets, device = call.targets.contiguous(), call.logits.device
    mask = torch.empty_like(targets, dtype=torch.bool)
    significance = torch.empty_like(targets, dtype=_accumulator(call))
    weight = torch.empty_like(targets, dtype=torch.float32) if call.gate_temperature else None
    on_device = isinstance(call.step, Tensor) and call.step.device == device and weight is not None
    gate = {
        "mask_ptr": mask.view(torch.int8),
        "significance_ptr": significance,
        "weight_ptr": weight,
        "offset_ptr": None if call.offset is None else call.offset.detach().contiguous(),
        "threshold_ptr": call.threshold.detach(),
        "invalid_ptr": invalid if finished is None else None,
        "finished_ptr": finished,
        "gate_temperature": float(call.gate_temperature or 1.0),
        "p_min": float(call.p_min),
        "seed": _signed(call.seed),
        "step": 0 if on_device or weight is None else _signed(int(call.step)),
        "step_ptr": call.step if on_device else None,
    }
    found = _forward(call, targets, gate)
    return GatedRows(mask, significance, weight, RowStats(**found), invalid)
