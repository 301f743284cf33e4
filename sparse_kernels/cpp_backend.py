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

from sparse_kernels import calls
from sparse_kernels.calls import CompactCall, ControlCall, GateCall, GateStepCall, SelectCall, StatsCall, TreeCall
from sparse_kernels.rows import empty_rows, rows_are_packed
from sparse_kernels.tracing import refuse_tensor
from sparse_kernels.types import GatedRows, RowStats, Selected, Selection

# The order of csrc/cpu/row_stats.h's Statistic.
_WEIGHABLE = ("loss", "entropy", "grad_norm", "sum_squares", "max_prob", "margin", "logsumexp")
SERVED = (*_WEIGHABLE, "argmax")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
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
    if not tensor.is_cpu:
        return f"tensors are on {tensor.device}, it serves cpu"
    return refuse_tensor(tensor)


def refuse_row_stats(call: StatsCall) -> str | None:
    """Why this call is not served, or None."""
    logits = call.logits
    reason = _refuse_tensor(logits)
    if reason is not None:
        return reason
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
_INDEX = torch.zeros(0, dtype=torch.int64)  # new_empty of it takes two thirds


def _real(call: StatsCall) -> torch.dtype:
    """What the logits are computed in, and everything that is one a row."""
    return torch.float64 if call.logits.dtype is torch.float64 else torch.float32


def _allocate(call: StatsCall, targets: Tensor) -> dict[str, Tensor]:
    real = _real(call)
    return {name: torch.empty_like(targets, dtype=torch.int64 if name == "argmax" else real) for name in call.outputs}


def _addresses(found: dict[str, Tensor]) -> tuple[int, ...]:
    return tuple(found[name].data_ptr() if name in found else 0 for name in _WRITTEN) if found else ()


def row_stats(call: StatsCall) -> RowStats:
    """See ``sparse_kernels.row_stats``; not differentiable, which is for ``library`` to add."""
    return RowStats(**_forward(call))


def row_stats_saving(call: StatsCall) -> tuple[RowStats, Tensor, Tensor]:
    """``row_stats``, and what its gradient needs of each row: the maximum of the logits after the softcap, and the
    sum of exponentials. A logsumexp in one number would be rounded to 1e-3 at 1e4."""
    found = _forward(call, ("saved_maximum", "saved_total"))
    maximum, total = found.pop("saved_maximum"), found.pop("saved_total")
    return RowStats(**found), maximum, total


def _forward(call: StatsCall, saved: tuple[str, ...] = ()) -> dict[str, Tensor]:
    targets = call.targets.contiguous()
    found = _allocate(call, targets)
    for name in saved:
        found[name] = torch.empty_like(targets, dtype=_real(call))
    bad_row = _cpp.row_stats(*_inputs(call, targets), _addresses(found))
    if bad_row >= 0:
        call.raise_bad_target(bad_row)
    return found


def row_stats_backward(
    call: StatsCall, maximum: Tensor, total: Tensor, entropy: Tensor | None, given: dict[str, Tensor], out: Tensor
) -> None:
    """Writes the gradient in the logits to ``out``, which has their shape and dtype and may be the logits.

    ``given`` holds the upstream gradient of loss, entropy or both; all of the rows' tensors are contiguous.
    """
    targets = call.targets.contiguous()
    layout = _layout(out, call.dim)
    gradient = out
    if layout is None:
        gradient = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        layout = _layout(gradient, call.dim)
    _cpp.row_stats_backward(
        *_inputs(call, targets),
        gradient.data_ptr(),
        layout,
        maximum.data_ptr(),
        total.data_ptr(),
        0 if entropy is None else entropy.data_ptr(),
        given["loss"].data_ptr() if "loss" in given else 0,
        given["entropy"].data_ptr() if "entropy" in given else 0,
    )
    if gradient is not out:
        out.copy_(gradient)


def gate_rows(call: GateCall) -> GatedRows:
    """See ``sparse_kernels.gate_rows``."""
    targets = call.targets.contiguous()
    real = _real(call)
    threshold = call.threshold if call.threshold.dtype is real else call.threshold.to(real)
    offset = None if call.offset is None else call.offset.to(real).contiguous()
    mask = torch.empty_like(targets, dtype=torch.bool)
    significance = torch.empty_like(targets, dtype=real)
    weight = torch.empty_like(targets, dtype=torch.float32) if call.gate_temperature else None
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
    return _compact(call.mask, call.weight, call.capacity)


def _compact(mask: Tensor, weight: Tensor | None, capacity: int | None) -> Selection:
    mask = mask.contiguous()
    weight = None if weight is None else weight.detach().contiguous()
    selection, arguments = _unpacked(mask, weight, capacity)
    _cpp.compact(*arguments)
    return selection


def _unpacked(mask: Tensor, weight_in: Tensor | None, slots: int | None) -> tuple[Selection, tuple[Any, ...]]:
    """A selection's memory, of ``slots`` or as many as are kept, and the arguments with which C++ writes it."""
    rows = mask.numel()
    counts: list[int] = []
    if slots is None:
        counts = _cpp.count_flags(mask.data_ptr(), rows)
        slots = sum(counts)
    index = _INDEX.new_empty(slots)
    weight = torch.empty_like(index, dtype=torch.float32)
    count, overflow = torch.empty_like(_COUNT), torch.empty_like(_COUNT)
    return Selection(index, weight, count, overflow, rows), (
        mask.data_ptr(),
        0 if weight_in is None else weight_in.data_ptr(),
        rows,
        counts,
        slots,
        index.data_ptr(),
        weight.data_ptr(),
        count.data_ptr(),
        overflow.data_ptr(),
    )


def refuse_control(call: ControlCall) -> str | None:
    """Why this call is not served, or None."""
    return calls.refuse_control(call, _refuse_tensor)


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


def refuse_select(call: SelectCall) -> str | None:
    """Why this call is not served as one, or None."""
    return refuse_gate_rows(call) or (None if call.packing is None else _refuse_tensors(call.packing.tensors))


def select(call: SelectCall) -> Selected:
    """See ``sparse_kernels.select``: the mask is packed while it is in the cache."""
    gated = gate_rows(call)
    mask, weight = gated.mask, gated.weight
    if mask.dim() != 1:
        mask, weight = mask.flatten(), None if weight is None else weight.flatten()
    selection = _compact(mask, weight, call.capacity)
    if call.packing is None:
        return Selected(gated, selection, None)
    return Selected(gated, selection, call.packing.rebuild(_gather(call.packing.tensors, selection)))


def refuse_gate_step(call: GateStepCall) -> str | None:
    """Why this call is not served as one, or None."""
    reason = refuse_gate_rows(call)
    if reason is None and call.logits.dtype is torch.float64:
        reason = "a controller's state is float32"
    return reason or calls.refuse_state(call.state)


def gate_step(call: GateStepCall) -> Selected:
    """See ``sparse_kernels.ops.gate_step``. Only ``gate_rows`` can fail, before the state has moved."""
    targets = call.targets = call.targets.contiguous()
    gated = gate_rows(call)
    selection, arguments = _unpacked(gated.mask, gated.weight, call.capacity)
    mass = gated.stats.grad_norm
    _cpp.compact_and_control(
        *arguments,
        call.state.values.data_ptr(),
        call.state.counters.data_ptr(),
        gated.significance.data_ptr(),
        targets.data_ptr(),
        4 if targets.dtype is torch.int32 else 8,
        call.ignore_index,
        0 if mass is None else mass.data_ptr(),
        call.setpoint.data_ptr(),
        call.gate_temperature,
        call.p_min,
    )
    return Selected(gated, selection, None)


def _refuse_tensors(tensors: list[Tensor]) -> str | None:
    for tensor in tensors:
        reason = _refuse_tensor(tensor)
        if reason is not None:
            return reason
        if tensor.layout is not torch.strided:
            return f"a {tensor.layout} tensor has no rows of bytes"
    return None


def _refuse_tree(call: TreeCall) -> str | None:
    return _refuse_tensor(call.selection.index) or _refuse_tensors(call.tensors)


refuse_gather_rows = refuse_scatter_rows = _refuse_tree


def gather_rows(call: TreeCall) -> Any:
    """See ``sparse_kernels.gather_rows``."""
    return call.rebuild(_gather(call.tensors, call.selection))


def scatter_rows(call: TreeCall) -> Any:
    """See ``sparse_kernels.scatter_rows``."""
    return call.rebuild(_scatter(call.tensors, call.selection))


def _gather(tensors: list[Tensor], selection: Selection) -> list[Tensor]:
    """The selected rows of each tensor, padding included, in one call of C++."""
    index = selection.index.contiguous()
    if selection.size == 0:  # nothing to read, not even for padding
        return [empty_rows(tensor, index.numel()).zero_() for tensor in tensors]
    slots = index.numel()
    packed = [tensor for tensor in tensors if tensor.is_contiguous() or rows_are_packed(tensor)]
    moved = _move_rows(_cpp.gather_rows, packed, index, slots, slots, selection.size)
    if len(packed) == len(tensors):
        return moved
    # Elements with gaps between them are not bytes to copy. C++ has looked at the index by now.
    left = iter(moved)
    return [next(left) if rows_are_packed(tensor) else tensor.index_select(0, index) for tensor in tensors]


def _scatter(tensors: list[Tensor], selection: Selection) -> list[Tensor]:
    """Each tensor's rows in their places and zeros elsewhere, padding dropped, in one call of C++."""
    index, kept = selection.index.contiguous(), int(selection.count)
    if not 0 <= kept <= index.numel():
        raise ValueError(f"selection count {kept} does not fit its {index.numel()} slots")
    packed = [tensor if rows_are_packed(tensor) else tensor.contiguous() for tensor in tensors]
    return _move_rows(_cpp.scatter_rows, packed, index, kept, selection.size, selection.size)


def _move_rows(
    function: Callable[..., int], tensors: list[Tensor], index: Tensor, slots: int, out_rows: int, rows: int
) -> list[Tensor]:
    """``function`` over tensors whose rows are packed."""
    moved: list[Tensor] = []
    moves: list[int] = []
    read: list[Tensor] = []
    for tensor in tensors:
        if tensor.is_conj() or tensor.is_neg():  # only noted: its bytes are not its values
            tensor = tensor.resolve_conj().resolve_neg()
            read.append(tensor)  # kept until C++ has read it
        out = empty_rows(tensor, out_rows)
        moved.append(out)
        moves += (
            tensor.data_ptr(),
            tensor.element_size() * tensor.stride(0),
            out.data_ptr(),
            out.nbytes // out_rows if out_rows else 0,
        )
    bad = function((*moves,), index.data_ptr(), slots, rows)
    if bad >= 0:
        raise ValueError(f"selection index {int(index[bad])} in slot {bad} is outside {rows} rows")
    return moved
