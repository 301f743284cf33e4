"""Backend ``cpp``: the compiled C++ extension on CPU tensors, which are passed as addresses.

Environment:
    SPARSE_KERNELS_CPU: ``portable``, ``avx2``, ``avx512`` or ``neon``, to force an instruction set for tests and
        comparisons. By default the widest one of the processor is used.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch  # before the extension, so that it shares PyTorch's OpenMP runtime and thread pool
from torch import Tensor

from sparse_kernels import _arguments, _tracing
from sparse_kernels._arguments import (
    CompactCall,
    ControlCall,
    GateCall,
    GateStepCall,
    SelectCall,
    Settings,
    StatsCall,
    TreeCall,
)
from sparse_kernels._row_layout import empty_rows, rows_are_packed
from sparse_kernels.types import WEIGHABLE, GatedRows, RowStats, Selected, Selection

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
# Written by C++ in this order: the statistics of row_stats.h's Statistic, the argmax, and the maximum and
# the sum of exponentials, which a backward needs.
_WRITTEN = (*WEIGHABLE, "argmax", "saved_maximum", "saved_total")
_MAX_ROW_DIMENSIONS = 4  # row_stats.h's RowLayout
_NO_STATS = RowStats()

_missing: str | None = None
try:
    from sparse_kernels import _cpp  # type: ignore[attr-defined,unused-ignore]

    if os.environ.get("SPARSE_KERNELS_CPU"):
        try:
            _cpp.set_instruction_set(os.environ["SPARSE_KERNELS_CPU"])
        except ValueError as error:
            raise ValueError(f"`SPARSE_KERNELS_CPU` must be an instruction set to use: {error}") from None
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


def extension() -> Any:
    """Return the compiled module, or None if it was not built."""
    return None if _missing is not None else _cpp


def unavailable_reason() -> str | None:
    """Return why this backend cannot be used at all, or None."""
    return _missing


LARGE: int = 0 if _missing is not None else _cpp.LARGE  # bytes from which on a tensor's memory is worth a thought


def large_pages(tensor: Tensor) -> Tensor:
    """Ask the system for large pages under a tensor that is to be written; return the tensor.

    Fresh memory is mapped page by page when it is first written: with pages of 4 KB that takes longer than the writing.
    A hint: nothing changes without this backend, where the system ignores it, nor for a tensor that is small or not
    on a CPU.

    Args:
        tensor: contiguous.
    """
    size = tensor.numel() * tensor.element_size()
    if _tensor_unsupported_reason(tensor) is None and size >= LARGE:
        _cpp.request_large_pages(tensor.data_ptr(), size)
    return tensor


def detail() -> str:
    """Return the instruction set in use and the number of threads."""
    return f"{_cpp.instruction_set()}, {_cpp.max_threads()} threads"


def _tensor_unsupported_reason(tensor: Tensor) -> str | None:
    if _missing is not None:
        return _missing
    if not tensor.is_cpu:
        return f"tensors are on {tensor.device}, it serves cpu"
    return None


def row_stats_unsupported_reason(call: StatsCall) -> str | None:
    """Return why this call is not served, or None."""
    logits = call.logits
    reason = _tensor_unsupported_reason(logits)
    if reason is not None:
        return reason
    if not logits.is_contiguous() and _layout(logits, call.dim) is None:
        return f"logits of strides {logits.stride()} have too many dimensions that do not collapse"
    return None


gate_rows_unsupported_reason = row_stats_unsupported_reason


def _layout(logits: Tensor, dim: int) -> tuple[int, ...] | None:
    """Return the strides of classes and outermost rows, then size and stride of each further dimension of the rows.

    None if the rows have more dimensions than C++ takes.
    """
    shape = logits.shape
    # Strides of a tensor without elements lead nowhere, and may be any.
    if logits.numel() == 0 or (dim == -1 and logits.is_contiguous()):
        return 1, shape[dim]
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


def _inputs(call: StatsCall, targets: Tensor, settings: Settings) -> tuple[Any, ...]:
    logits = call.logits
    return (
        logits.data_ptr(),
        _DTYPES[logits.dtype],
        targets.numel(),
        logits.shape[call.dim],
        _layout(logits, call.dim),
        targets.data_ptr(),
        targets.dtype is torch.int32,
        settings,
    )


# empty_like takes half the time of empty, which counts where a call takes 10 us.
_COUNT = torch.zeros((), dtype=torch.int32)
_INDEX = torch.zeros(0, dtype=torch.int64)  # new_empty of it takes two thirds


def _allocate(call: StatsCall, targets: Tensor) -> dict[str, Tensor]:
    real = call.accumulator
    return {name: torch.empty_like(targets, dtype=torch.int64 if name == "argmax" else real) for name in call.outputs}


def _addresses(results: dict[str, Tensor]) -> tuple[int, ...]:
    return tuple(results[name].data_ptr() if name in results else 0 for name in _WRITTEN) if results else ()


def row_stats(call: StatsCall) -> RowStats:
    """Serve ``sparse_kernels.row_stats``; not differentiable, which ``torch_library`` adds."""
    return RowStats(**_forward(call))


def row_stats_saving(call: StatsCall) -> tuple[RowStats, Tensor, Tensor]:
    """Serve ``row_stats``, and return what its gradient needs of each row.

    Returns:
        The statistics, the maximum of the logits after the softcap, and the sum of exponentials. A logsumexp in one
        number would be rounded to 1e-3 at 1e4.
    """
    results = _forward(call, ("saved_maximum", "saved_total"))
    maximum, total = results.pop("saved_maximum"), results.pop("saved_total")
    return RowStats(**results), maximum, total


def _forward(call: StatsCall, saved: tuple[str, ...] = ()) -> dict[str, Tensor]:
    targets = call.targets.contiguous()
    results = _allocate(call, targets)
    for name in saved:
        results[name] = torch.empty_like(targets, dtype=call.accumulator)
    bad_row = _cpp.row_stats(*_inputs(call, targets, call.settings), _addresses(results))
    if bad_row >= 0:
        call.raise_bad_target(bad_row)
    return results


def row_stats_backward(
    call: StatsCall, maximum: Tensor, total: Tensor, entropy: Tensor | None, upstream: dict[str, Tensor], out: Tensor,
    *, zeroed: bool = False,
) -> None:  # fmt: skip
    """Write the gradient in the logits to ``out``.

    Args:
        call: the forward's call.
        maximum: saved by the forward, contiguous, of the targets' shape.
        total: as ``maximum``.
        entropy: the forward's, contiguous; None without an upstream gradient of it.
        upstream: the contiguous upstream gradient of ``loss``, ``entropy`` or both.
        out: the logits' shape and dtype; it may be the logits.
        zeroed: ``out`` holds zeros, so that rows without a gradient need not be written.
    """
    targets = call.targets.contiguous()
    layout = _layout(out, call.dim)
    gradient = out
    if layout is None:
        zeroed = False
        gradient = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        layout = _layout(gradient, call.dim)
    _cpp.row_stats_backward(
        *_inputs(call, targets, call.settings),
        gradient.data_ptr(),
        layout,
        maximum.data_ptr(),
        total.data_ptr(),
        0 if entropy is None else entropy.data_ptr(),
        upstream["loss"].data_ptr() if "loss" in upstream else 0,
        upstream["entropy"].data_ptr() if "entropy" in upstream else 0,
        zeroed,
    )
    if gradient is not out:
        out.copy_(gradient)


def gate_rows(call: GateCall) -> GatedRows:
    """Serve ``sparse_kernels.gate_rows``."""
    targets, settings = call.targets.contiguous(), call.settings
    real = call.accumulator
    threshold = call.threshold if call.threshold.dtype is real else call.threshold.to(real)
    offset = None if call.offset is None else call.offset.to(real).contiguous()
    mask = torch.empty_like(targets, dtype=torch.bool)
    significance = torch.empty_like(targets, dtype=real)
    weight = None
    if settings.gate_temperature:
        weight = torch.empty_like(targets, dtype=torch.float32)
        if isinstance(call.step, Tensor):
            settings = settings._replace(step=int(call.step.flatten()[0]))
    invalid = torch.empty_like(_COUNT)
    results = _allocate(call, targets)
    bad_row = _cpp.gate_rows(
        *_inputs(call, targets, settings),
        _addresses(results),
        mask.data_ptr(),
        significance.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if offset is None else offset.data_ptr(),
        {name: float(value) for name, value in call.weights.items()},
        threshold.data_ptr(),
        invalid.data_ptr(),
    )
    if bad_row >= 0:
        call.raise_bad_target(bad_row)
    return GatedRows(mask, significance, weight, RowStats(**results) if results else _NO_STATS, invalid)


def compact_unsupported_reason(call: CompactCall) -> str | None:
    """Return why this call is not served, or None."""
    return _tensor_unsupported_reason(call.mask)


def compact(call: CompactCall) -> Selection:
    """Serve ``sparse_kernels.compact``."""
    return _compact(call.mask, call.weight, call.capacity)


def _compact(mask: Tensor, weight: Tensor | None, capacity: int | None) -> Selection:
    mask = mask.contiguous()
    weight = None if weight is None else weight.detach().contiguous()
    selection, arguments = _allocate_selection(mask, weight, capacity)
    _cpp.compact(*arguments)
    return selection


def _allocate_selection(mask: Tensor, weight_in: Tensor | None, slots: int | None) -> tuple[Selection, tuple[Any, ...]]:
    """Return a selection of ``slots``, by default as many as are kept, and the arguments with which C++ fills it."""
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


def control_unsupported_reason(call: ControlCall) -> str | None:
    """Return why this call is not served, or None."""
    return _arguments.control_unsupported_reason(call, _tensor_unsupported_reason)


def control(call: ControlCall) -> None:
    """Serve ``sparse_kernels.control``."""
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
        0 if mass is None else mass.data_ptr(),
        setpoint.data_ptr(),
        0 if overflow is None else overflow.data_ptr(),
        setpoint.numel(),
        significance.shape[-1],
        call.settings,
    )
    _tracing.mark_changed(call.state)


def select_unsupported_reason(call: SelectCall) -> str | None:
    """Return why this call is not served as one, or None."""
    return gate_rows_unsupported_reason(call)


def select(call: SelectCall) -> Selected:
    """Serve ``sparse_kernels.select``: the mask is packed while it is in the cache."""
    gated = gate_rows(call)
    mask, weight = gated.mask, gated.weight
    if mask.dim() != 1:
        mask, weight = mask.flatten(), None if weight is None else weight.flatten()
    selection = _compact(mask, weight, call.capacity)
    if call.packing is None:
        return Selected(gated, selection, None)
    return Selected(gated, selection, call.packing.rebuild(_gather(call.packing.tensors, selection)))


def gate_step_unsupported_reason(call: GateStepCall) -> str | None:
    """Return why this call is not served as one, or None."""
    reason = gate_rows_unsupported_reason(call)
    if reason is None and call.logits.dtype is torch.float64:
        reason = "a controller's state is float32"
    return reason or _arguments.state_unsupported_reason(call.state)


def gate_step(call: GateStepCall) -> Selected:
    """Serve ``sparse_kernels.ops.gate_step``. Only ``gate_rows`` can fail, before the state has changed."""
    targets = call.targets = call.targets.contiguous()
    gated = gate_rows(call)
    selection, arguments = _allocate_selection(gated.mask, gated.weight, call.capacity)
    mass = gated.stats.grad_norm
    _cpp.compact_and_control(
        *arguments,
        call.state.values.data_ptr(),
        call.state.counters.data_ptr(),
        gated.significance.data_ptr(),
        targets.data_ptr(),
        4 if targets.dtype is torch.int32 else 8,
        0 if mass is None else mass.data_ptr(),
        call.setpoint.data_ptr(),
        call.settings,
    )
    _tracing.mark_changed(call.state)
    return Selected(gated, selection, None)


def gather_rows_unsupported_reason(call: TreeCall) -> str | None:
    """Return why this call is not served, or None."""
    return _tensor_unsupported_reason(call.selection.index)


scatter_rows_unsupported_reason = gather_rows_unsupported_reason


def gather_rows(call: TreeCall) -> Any:
    """Serve ``sparse_kernels.gather_rows``."""
    return call.rebuild(_gather(call.tensors, call.selection))


def scatter_rows(call: TreeCall) -> Any:
    """Serve ``sparse_kernels.scatter_rows``."""
    return call.rebuild(_scatter(call.tensors, call.selection))


def _gather(tensors: list[Tensor], selection: Selection) -> list[Tensor]:
    """Return the selected rows of each tensor, padding included, by one call of C++."""
    index = selection.index.contiguous()
    if selection.size == 0:  # nothing to read, not even for padding
        return [empty_rows(tensor, index.numel()).zero_() for tensor in tensors]
    slots = index.numel()
    together = [tensor.is_contiguous() or rows_are_packed(tensor) for tensor in tensors]
    packed = [tensor for tensor, whole in zip(tensors, together, strict=True) if whole]
    moved = _move_rows(_cpp.gather_rows, packed, index, slots, slots, selection.size)
    if len(packed) == len(tensors):
        return moved
    # Elements with gaps between them are not bytes to copy. C++ has looked at the index by now.
    left = iter(moved)
    return [
        next(left) if whole else tensor.index_select(0, index) for tensor, whole in zip(tensors, together, strict=True)
    ]


def _scatter(tensors: list[Tensor], selection: Selection) -> list[Tensor]:
    """Return each tensor's rows in their places, zeros elsewhere and no padding, by one call of C++."""
    index, kept = selection.index.contiguous(), int(selection.count)
    if not 0 <= kept <= index.numel():
        raise ValueError(f"selection count {kept} does not fit its {index.numel()} slots")
    packed = [tensor if rows_are_packed(tensor) else tensor.contiguous() for tensor in tensors]
    return _move_rows(_cpp.scatter_rows, packed, index, kept, selection.size, selection.size)


def _move_rows(
    function: Callable[..., int], tensors: list[Tensor], index: Tensor, slots: int, out_rows: int, rows: int
) -> list[Tensor]:
    """Call C++'s ``function`` on tensors whose rows are packed."""
    moved: list[Tensor] = []
    moves: list[int] = []
    read: list[Tensor] = []
    for tensor in tensors:
        if tensor.is_conj() or tensor.is_neg():  # lazily: its bytes are not its values
            tensor = tensor.resolve_conj().resolve_neg()
            read.append(tensor)  # alive until C++ has read it
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
