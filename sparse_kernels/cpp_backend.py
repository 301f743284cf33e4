"""The compiled extension as a backend: C++ on CPU tensors, handed over as addresses.

Environment: SPARSE_KERNELS_CPU=portable|avx2|avx512 forces an instruction set (for tests and
comparisons); without it the widest that the processor has is used.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch  # before the extension, so that it shares PyTorch's OpenMP runtime and thread pool
from torch import Tensor

from sparse_kernels import reference
from sparse_kernels.calls import CompactCall, ControlCall, GateCall, StatsCall, TreeCall
from sparse_kernels.types import DIFFERENTIABLE, GatedRows, RowStats, Selection

# The order of csrc/cpu/row_stats.h's Statistic.
_WEIGHABLE = ("loss", "entropy", "grad_norm", "sum_squares", "max_prob", "margin", "logsumexp")
SERVED = (*_WEIGHABLE, "argmax")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# What C++ writes: the statistics, and the maximum and the sum of exponentials that a backward needs.
_WRITTEN = (*SERVED, "saved_maximum", "saved_total")
_MAX_ROW_DIMENSIONS = 4  # csrc/cpu/row_stats.h's RowLayout
_NO_STATS = RowStats()

_missing: str | None = None
try:
    from sparse_kernels import _cpp  # type: ignore[attr-defined,unused-ignore]

    if os.environ.get("SPARSE_KERNELS_CPU"):
        _cpp.set_instruction_set(os.environ["SPARSE_KERNELS_CPU"])
except ImportError as error:
    try:
        from sparse_kernels._build_info import CPP_MISSING

        _missing = f"not built: {CPP_MISSING}" if CPP_MISSING else f"does not load: {error}"
        warnings.warn(
            f"sparse_kernels: the C++ backend is {_missing}; the slower PyTorch reference serves. "
            "Install a C++ compiler and reinstall, or set SPARSE_KERNELS_BUILD=none to mean it.",
            RuntimeWarning,
            stacklevel=2,
        )
    except ImportError:
        _missing = "not built (SPARSE_KERNELS_BUILD=none)"


def unavailable() -> str | None:
    """Why this backend cannot be used at all, or None."""
    return _missing


def detail() -> str:
    """The instruction set in use, and the threads."""
    return f"{_cpp.instruction_set()}, {_cpp.max_threads()} threads"


def _refuse_tensor(tensor: Tensor) -> str | None:
    if _missing is not None:
        return _missing
    if torch.compiler.is_compiling():
        return "being traced; the reference is what can be compiled"
    if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
        return f"a {type(tensor).__name__} has no address"
    if not tensor.is_cpu:
        return f"tensors are on {tensor.device}, it serves cpu"
    return None


def refuse_row_stats(call: StatsCall) -> str | None:
    """Why this call is not served, or None."""
    logits = call.logits
    reason = _refuse_tensor(logits)
    if reason is not None:
        return reason
    if logits.dtype not in _DTYPES:
        return f"logits are {logits.dtype}; it serves float32, bfloat16 and float16"
    if not logits.is_contiguous() and _layout(logits, call.dim) is None:
        return f"logits of strides {logits.stride()} have too many dimensions that do not collapse"
    return None


refuse_gate_rows = refuse_row_stats


def _layout(logits: Tensor, dim: int) -> tuple[int, ...] | None:
    """The classes' stride, the outermost rows' stride, and size and stride of each further dimension of
    the rows; None where there are more of them than C++ takes."""
    shape = logits.shape
    if dim == -1 and logits.is_contiguous():
        return 1, shape[-1]
    strides = list(logits.stride())
    sizes = list(shape)
    classes, class_stride = sizes.pop(dim), strides.pop(dim)
    rows: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if rows and rows[-1][1] == size * stride:
            rows[-1] = rows[-1][0] * size, stride
        else:
            rows.append((size, stride))
    if len(rows) > _MAX_ROW_DIMENSIONS:
        return None
    outermost = rows[0][1] if rows else 0
    return (class_stride if classes > 1 else 1, outermost, *(number for row in rows[1:] for number in row))


def _inputs(call: StatsCall, targets: Tensor) -> tuple[Any, ...]:
    logits = call.logits
    return (
        logits.data_ptr(),
        _DTYPES[logits.dtype],
        targets.numel(),
        logits.shape[call.dim],
        _layout(logits, call.dim),
        targets.data_ptr(),
        targets.dtype is torch.int32,
        call.ignore_index,
        call.temperature,
        call.softcap,
        call.label_smoothing,
    )


# empty_like takes half the time of empty, which counts where a call takes 10 us.
_COUNT = torch.zeros((), dtype=torch.int32)


def _allocate(call: StatsCall, targets: Tensor) -> dict[str, Tensor]:
    return {
        name: torch.empty_like(targets, dtype=torch.int64 if name == "argmax" else torch.float32)
        for name in call.outputs
    }


def _addresses(found: dict[str, Tensor]) -> tuple[int, ...]:
    return tuple(found[name].data_ptr() if name in found else 0 for name in _WRITTEN) if found else ()


def row_stats(call: StatsCall) -> RowStats:
    """See ``sparse_kernels.row_stats``."""
    if call.logits.requires_grad and torch.is_grad_enabled() and not set(DIFFERENTIABLE).isdisjoint(call.outputs):
        names = tuple(dict.fromkeys(call.outputs))
        return RowStats(**dict(zip(names, _stats_with_gradient(call.logits, call, names), strict=True)))
    return RowStats(**_forward(call))


def _forward(call: StatsCall, saved: tuple[str, ...] = ()) -> dict[str, Tensor]:
    targets = call.targets.contiguous()
    found = _allocate(call, targets)
    for name in saved:
        found[name] = torch.empty_like(targets, dtype=torch.float32)
    bad_row = _cpp.row_stats(*_inputs(call, targets), _addresses(found))
    if bad_row >= 0:
        call.raise_bad_target(bad_row)
    return found


def _backward(
    call: StatsCall, maximum: Tensor, total: Tensor, entropy: Tensor | None, given: dict[str, Tensor]
) -> Tensor:
    targets = call.targets.contiguous()
    gradient = torch.empty_like(call.logits)
    layout = _layout(gradient, call.dim)
    if layout is None:
        gradient = torch.empty(call.logits.shape, dtype=call.logits.dtype)
        layout = _layout(gradient, call.dim)
    upstream = {name: g.float().contiguous() for name, g in given.items()}
    _cpp.row_stats_backward(
        *_inputs(call, targets),
        gradient.data_ptr(),
        layout,
        maximum.data_ptr(),
        total.data_ptr(),
        0 if entropy is None else entropy.data_ptr(),
        upstream["loss"].data_ptr() if "loss" in upstream else 0,
        upstream["entropy"].data_ptr() if "entropy" in upstream else 0,
    )
    return gradient


class _RowStatsFunction(torch.autograd.Function):
    """Forward in C++; the gradient of loss and entropy too, from the logits, each row's maximum and its sum
    of exponentials: a logsumexp in one number would be rounded to 1e-3 at 1e4."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: StatsCall, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        ctx.call = StatsCall(
            logits.detach(), call.targets, names, call.dim, call.temperature, call.softcap, call.label_smoothing,
            call.ignore_index,
        )  # fmt: skip
        ctx.names = names
        ctx.set_materialize_grads(False)
        found = _forward(ctx.call, ("saved_maximum", "saved_total"))
        ctx.save_for_backward(logits, found["saved_maximum"], found["saved_total"], found.get("entropy"))
        ctx.mark_non_differentiable(*(found[name] for name in names if name not in DIFFERENTIABLE))
        return tuple(found[name] for name in names)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        logits, maximum, total, entropy = ctx.saved_tensors
        given = {
            name: g for name, g in zip(ctx.names, gradients, strict=True) if name in DIFFERENTIABLE and g is not None
        }
        if not given:
            return None, None, None
        if torch.is_grad_enabled():  # create_graph=True: what was saved knows no second derivative
            gradient = reference.differentiable_gradient(ctx.call, logits, given)
        else:
            gradient = _backward(ctx.call, maximum, total, entropy, given)
        return gradient, None, None


_stats_with_gradient: Callable[[Tensor, StatsCall, tuple[str, ...]], tuple[Tensor, ...]] = _RowStatsFunction.apply


def gate_rows(call: GateCall) -> GatedRows:
    """See ``sparse_kernels.gate_rows``."""
    targets = call.targets.contiguous()
    threshold = call.threshold if call.threshold.dtype is torch.float32 else call.threshold.float()
    offset = None if call.offset is None else call.offset.float().contiguous()
    mask = torch.empty_like(targets, dtype=torch.bool)
    significance = torch.empty_like(targets, dtype=torch.float32)
    weight = torch.empty_like(significance) if call.gate_temperature else None
    invalid = torch.empty_like(_COUNT)
    found = _allocate(call, targets)
    bad_row = _cpp.gate_rows(
        *_inputs(call, targets),
        _addresses(found),
        mask.data_ptr(),
        significance.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if offset is None else offset.data_ptr(),
        (*[call.weights.get(name, 0.0) for name in _WEIGHABLE],),
        threshold.data_ptr(),
        call.gate_temperature,
        call.p_min,
        call.seed & 0xFFFFFFFFFFFFFFFF,
        int(call.step) & 0xFFFFFFFFFFFFFFFF if weight is not None else 0,
        invalid.data_ptr(),
    )
    if bad_row >= 0:
        call.raise_bad_target(bad_row)
    return GatedRows(mask, significance, weight, RowStats(**found) if found else _NO_STATS, invalid)


def refuse_compact(call: CompactCall) -> str | None:
    """Why this call is not served, or None."""
    return _refuse_tensor(call.mask)


def compact(call: CompactCall) -> Selection:
    """See ``sparse_kernels.compact``."""
    mask = call.mask.contiguous()
    weight_in = None if call.weight is None else call.weight.detach().contiguous()
    rows = mask.numel()
    slots = call.capacity
    if slots is None:
        slots = _cpp.count_flags(mask.data_ptr(), rows)
    index = torch.empty(slots, dtype=torch.int64)
    weight = torch.empty_like(index, dtype=torch.float32)
    count, overflow = torch.empty_like(_COUNT), torch.empty_like(_COUNT)
    _cpp.compact(
        mask.data_ptr(),
        0 if weight_in is None else weight_in.data_ptr(),
        rows,
        slots,
        index.data_ptr(),
        weight.data_ptr(),
        count.data_ptr(),
        overflow.data_ptr(),
    )
    return Selection(index, weight, count, overflow, rows)


def refuse_control(call: ControlCall) -> str | None:
    """Why this call is not served, or None."""
    reason = _refuse_tensor(call.significance) or _refuse_tensor(call.state.values)
    if reason is None and call.significance.dtype is not torch.float32:
        reason = f"significance is {call.significance.dtype}; it serves float32"
    if reason is None and not (call.state.values.is_contiguous() and call.state.counters.is_contiguous()):
        reason = "a state that is not contiguous cannot be moved in place"
    return reason


def control(call: ControlCall) -> None:
    """See ``sparse_kernels.control``."""
    significance, setpoint = call.significance.detach().contiguous(), call.setpoint.contiguous()
    labels = None if call.labels is None else call.labels.contiguous()
    mass = None if call.mass is None else call.mass.detach().float().contiguous()
    overflow = None if call.overflow is None else call.overflow.contiguous()
    _cpp.control(
        call.state.values.data_ptr(),
        call.state.counters.data_ptr(),
        significance.data_ptr(),
        0 if labels is None else labels.data_ptr(),
        0 if labels is None else labels.element_size(),
        call.ignore_index,
        0 if mass is None else mass.data_ptr(),
        setpoint.data_ptr(),
        0 if overflow is None else overflow.data_ptr(),
        setpoint.numel(),
        significance.shape[-1],
        call.gate_temperature,
        call.p_min,
    )


def _refuse_tree(call: TreeCall) -> str | None:
    reason = _refuse_tensor(call.selection.index)
    for tensor in call.tensors:
        reason = reason or _refuse_tensor(tensor)
    return reason


refuse_gather_rows = refuse_scatter_rows = _refuse_tree


def gather_rows(call: TreeCall) -> Any:
    """See ``sparse_kernels.gather_rows``."""
    return call.rebuild([_with_gradient(tensor, call.selection, False) for tensor in call.tensors])


def scatter_rows(call: TreeCall) -> Any:
    """See ``sparse_kernels.scatter_rows``."""
    return call.rebuild([_with_gradient(rows, call.selection, True) for rows in call.tensors])


def _with_gradient(tensor: Tensor, selection: Selection, scatter: bool) -> Tensor:
    if tensor.requires_grad and torch.is_grad_enabled():
        return _apply_move(tensor, selection, scatter)
    return (_scatter if scatter else _gather)(tensor, selection)


class _MoveRows(torch.autograd.Function):
    """Gather and scatter are each other's transposes, so each is the other's gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, selection: Selection, scatter: bool) -> Tensor:
        ctx.selection, ctx.scatter = selection, scatter
        return (_scatter if scatter else _gather)(tensor.detach(), selection)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        moved = _with_gradient(gradient, ctx.selection, not ctx.scatter)
        if ctx.scatter:  # padding read row 0, and its slot had no part in the forward
            moved = moved * ctx.selection.valid().reshape(-1, *[1] * (moved.dim() - 1))
        return moved, None, None


_apply_move: Callable[[Tensor, Selection, bool], Tensor] = _MoveRows.apply


def _gather(tensor: Tensor, selection: Selection) -> Tensor:
    slots = selection.index.numel()
    packed = tensor.is_contiguous()
    channels_last = not packed and tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    if selection.size == 0 or not (packed or channels_last):
        return reference.gather_tensor(tensor, selection)
    # Bytes are bytes: rows of images keep their layout.
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((slots, *tensor.shape[1:]), dtype=tensor.dtype, memory_format=memory_format)
    index = selection.index.contiguous()
    bad = _cpp.gather_rows(
        tensor.data_ptr(), selection.size, _row_bytes(tensor), index.data_ptr(), slots, out.data_ptr()
    )
    if bad >= 0:
        raise ValueError(f"selection index {int(index[bad])} in slot {bad} is outside {selection.size} rows")
    return out


def _scatter(rows: Tensor, selection: Selection) -> Tensor:
    rows, index, kept = rows.contiguous(), selection.index.contiguous(), int(selection.count)
    if not 0 <= kept <= index.numel():
        raise ValueError(f"selection count {kept} does not fit its {index.numel()} slots")
    out = torch.zeros((selection.size, *rows.shape[1:]), dtype=rows.dtype)
    bad = _cpp.scatter_rows(rows.data_ptr(), _row_bytes(rows), index.data_ptr(), kept, out.data_ptr(), selection.size)
    if bad >= 0:
        raise ValueError(f"selection index {int(index[bad])} in slot {bad} is outside {selection.size} rows")
    return out


def _row_bytes(tensor: Tensor) -> int:
    rows = tensor.size(0)
    return tensor.element_size() * (tensor.numel() // rows) if rows else 0
