"""Backend ``cuda``: the compiled CUDA kernels on tensors of one device, which are passed as addresses.

Scores come from the Triton kernels. ``select`` and ``gate_step`` are one Triton launch and one of ours, and a third
that gathers: the last block of the compaction counts the rows of NaN and updates the controller. Scores take a second
launch where it is the quicker way (``triton.launch.merged``): from 16,384 rows of 17 to 8,192 classes that a warp's
threads end together, and for rows so few and long that they are cut into slices. The compaction takes a second above
65,536 rows (``compact_shares.cuh``).

Everything is enqueued on PyTorch's current stream of the tensors' device, and nothing waits for the device except
``compact`` without a capacity. No tensor needs ``record_stream``: outputs and temporary storage are allocated for the
stream on which the kernels run, so the allocator's own order is enough. Inputs made on another stream are the
caller's to order, as for any PyTorch operation.

A bad index cannot be raised without waiting: gathered, it gives a row of zeros; scattered, it is skipped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
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
from sparse_kernels.backends import current
from sparse_kernels.backends.triton import backend as triton
from sparse_kernels.trees import Tree
from sparse_kernels.types import ControlState, GatedRows, Selected, Selection

_new = tuple.__new__  # a named tuple's own constructor is one more call of Python

_missing: str | None = None
try:
    from sparse_kernels import _cuda  # type: ignore[attr-defined,unused-ignore]
except ImportError as error:
    try:
        from sparse_kernels._build_info import CUDA_MISSING

        _missing = f"not built: {CUDA_MISSING}" if CUDA_MISSING else f"does not load: {error}"
    except ImportError:
        _missing = "not built (SPARSE_KERNELS_BUILD=none)"


def unavailable_reason() -> str | None:
    """Return why this backend cannot be used on the current device, or None. It looks once and remembers."""
    if _missing is not None:
        return _missing
    if torch.version.cuda is None:  # ROCm's tensors are on "cuda", too
        return "this PyTorch is built without CUDA"
    return device_reason(torch.cuda.current_device()) if torch.cuda.is_available() else "no CUDA device"


def detail() -> str:
    """Return the architectures that the kernels were compiled for, and the device's."""
    major, minor = torch.cuda.get_device_capability()
    return f"compiled for {_cuda.architectures}; the device is {major}.{minor}"


@functools.cache
def _looked_up(device: int) -> str | None:
    runtime, driver = _cuda.versions()
    capability = torch.cuda.get_device_capability(device)
    return driver_reason(runtime, driver) or architecture_reason(_cuda.architectures, capability, runtime, driver)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def device_reason(device: int) -> str | None:
    """Return why no kernel of this build can be launched on a device, or None. It looks once and remembers.

    Args:
        device: its index.
    """
    return _looked_up(device)


def driver_reason(runtime: int, driver: int) -> str | None:
    """Return why a driver cannot run a CUDA runtime, or None: it runs any of its own major version, and older ones.

    Args:
        runtime: version of the runtime, as 12040.
        driver: the newest version that the driver supports; 0 without a driver.
    """
    if driver == 0:
        return "no NVIDIA driver"
    if driver // 1000 < runtime // 1000:
        return (
            f"built with CUDA {_dotted(runtime)}, and the driver supports up to {_dotted(driver)}: update the driver, "
            f"or build with nvcc {driver // 1000}"
        )
    return None


def architecture_reason(compiled: str, capability: tuple[int, int], runtime: int, driver: int) -> str | None:
    """Return why a device cannot run what was compiled, or None.

    Machine code runs on the later devices of its major version. PTX runs on every later device, if the driver knows
    the version of CUDA that it is of. A suffix (9.0a) means that device alone.

    Args:
        compiled: architectures in TORCH_CUDA_ARCH_LIST's notation.
        capability: of the device.
        runtime: version that the kernels were compiled with, as 12040.
        driver: the newest version that the driver supports.
    """
    major, minor = capability
    too_new = ""
    for name in compiled.split():
        number, ptx = name.removesuffix("+PTX"), name.endswith("+PTX")
        of = int(number.split(".")[0]), int(number.split(".")[1].rstrip("af"))
        if of == (major, minor) or (number[-1].isdigit() and of[0] == major and of[1] <= minor):
            return None
        if ptx and number[-1].isdigit() and of <= capability:
            if driver >= runtime:
                return None
            too_new = f", and the driver cannot compile PTX of CUDA {_dotted(runtime)}"
    return (
        f"compiled for {compiled}, and the device is {major}.{minor}{too_new}: build on this machine, or set "
        f'TORCH_CUDA_ARCH_LIST="{major}.{minor}"'
    )


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _tensor_unsupported_reason(tensor: Tensor) -> str | None:
    if _missing is not None:
        return _missing
    if not tensor.is_cuda:
        return f"tensors are on {tensor.device}, it serves cuda"
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    return device_reason(tensor.device.index)  # type: ignore[no-any-return, unused-ignore]


def row_stats_unsupported_reason(call: StatsCall) -> str | None:
    """Return why this call is not served, or None."""
    return _tensor_unsupported_reason(call.logits) or triton.row_stats_unsupported_reason(call)


gate_rows_unsupported_reason = row_stats_unsupported_reason
row_stats, gate_rows = triton.row_stats, triton.gate_rows
row_stats_saving, row_stats_backward = triton.row_stats_saving, triton.row_stats_backward


def compact_unsupported_reason(call: CompactCall) -> str | None:
    """Return why this call is not served, or None."""
    return _tensor_unsupported_reason(call.mask)


def control_unsupported_reason(call: ControlCall) -> str | None:
    """Return why this call is not served, or None."""
    return _arguments.control_unsupported_reason(call, _tensor_unsupported_reason)


def gather_rows_unsupported_reason(call: TreeCall) -> str | None:
    """Return why this call is not served, or None."""
    return _tensor_unsupported_reason(call.selection.index)


scatter_rows_unsupported_reason = gather_rows_unsupported_reason


def _step_unsupported_reason(call: GateCall) -> str | None:
    reason = gate_rows_unsupported_reason(call)
    if reason is None and call.logits.dtype is torch.float64:
        reason = "the rows of NaN are counted in float32"
    return reason


def select_unsupported_reason(call: SelectCall) -> str | None:
    """Return why this call is not served as one, or None."""
    return _step_unsupported_reason(call)


def gate_step_unsupported_reason(call: GateStepCall) -> str | None:
    """Return why this call is not served as one, or None."""
    return _step_unsupported_reason(call) or _arguments.state_unsupported_reason(call.state)


def _enqueue(function: Callable[..., Any], device: torch.device, *arguments: Any) -> Any:
    """Call the extension with ``device`` as PyTorch's current device, on its current stream there."""
    with current.on(device):  # the extension leaves the device current; this puts the caller's back
        return function(*arguments, device.index, current.stream_address(device.index))


@functools.lru_cache(maxsize=64)  # a host query of some microseconds; batches come in few sizes
def _storage_bytes(rows: int, with_control: bool, device: torch.device) -> int:
    return int(_enqueue(_cuda.compact_storage_bytes, device, rows, with_control))


def _storage(rows: int, with_control: bool, device: torch.device) -> Tensor:
    """Allocate int32 storage; with control, a kernel before the compaction must set its first element to 0."""
    return torch.empty(_storage_bytes(rows, with_control, device) // 4, dtype=torch.int32, device=device)


def compact(call: CompactCall) -> Selection:
    """Serve ``sparse_kernels.compact``. Without a capacity the count is read first: the one synchronisation."""
    weight = None if call.weight is None else call.weight.detach().contiguous()
    storage = _storage(call.mask.shape[0], False, call.mask.device)
    count = torch.empty((), dtype=torch.int32, device=storage.device)
    return _compact(call.mask.contiguous(), weight, call.capacity, None, storage, count)


def _compact(
    mask: Tensor,
    weight_in: Tensor | None,
    capacity: int | None,
    control: tuple[Any, ...] | None,
    storage: Tensor,
    count: Tensor,
) -> Selection:
    """Pack the flattened rows of contiguous tensors.

    Args:
        mask: of the rows.
        weight_in: of each row, float32; None for 1.
        capacity: slots; None for as many as there are rows to pack.
        control: the result of ``_control``, or None.
        storage: the result of ``_storage``.
        count: int32 of no dimension, to be written; the overflow is made like it.
    """
    rows, device = mask.numel(), mask.device
    slots = int(torch.count_nonzero(mask)) if capacity is None else capacity
    index = torch.empty(slots, dtype=torch.int64, device=device)
    weight = torch.empty(slots, dtype=torch.float32, device=device)
    overflow = torch.empty_like(count)
    _enqueue(
        _cuda.compact,
        device,
        mask.data_ptr(),
        0 if weight_in is None else weight_in.data_ptr(),
        rows,
        slots,
        index.data_ptr(),
        weight.data_ptr(),
        count.data_ptr(),
        overflow.data_ptr(),
        control,
        storage.data_ptr(),
        storage.nbytes,
    )
    return _new(Selection, (index, weight, count, overflow, rows))


def _control(
    significance: Tensor,
    settings: Settings,
    labels: Tensor | None = None,
    mass: Tensor | None = None,
    state: ControlState | None = None,
    setpoint: Tensor | None = None,
    invalid: Tensor | None = None,
) -> tuple[Any, ...]:
    """Return the extension's Control, from contiguous tensors: ControlArgs of cuda/control.h."""
    return (
        significance.data_ptr(),
        0 if labels is None else labels.data_ptr(),
        0 if labels is None else labels.element_size(),
        0 if mass is None else mass.data_ptr(),
        0 if state is None else state.values.data_ptr(),
        0 if state is None else state.counters.data_ptr(),
        0 if setpoint is None else setpoint.data_ptr(),
        0 if invalid is None else invalid.data_ptr(),
        settings,
    )


def control(call: ControlCall) -> None:
    """Serve ``sparse_kernels.control``: one launch, of a block for each state."""
    significance, setpoint = call.significance.detach().contiguous(), call.setpoint.contiguous()
    labels = None if call.labels is None else call.labels.contiguous()
    mass = None if call.mass is None else call.mass.detach().float().contiguous()
    overflow = None if call.overflow is None else call.overflow.contiguous()
    _enqueue(
        _cuda.control,
        significance.device,
        _control(significance, call.settings, labels, mass, call.state, setpoint),
        0 if overflow is None else overflow.data_ptr(),
        setpoint.numel(),
        significance.shape[-1],
    )
    _tracing.mark_changed(call.state)


def _score(call: GateCall) -> tuple[GatedRows, Tensor]:
    """Return the scores, and the storage of the compaction that must follow and count their rows of NaN."""
    call.targets = call.targets.contiguous()
    storage = _storage(call.targets.numel(), True, call.logits.device)
    return triton.gate_rows_uncounted(call, storage), storage


def select(call: SelectCall) -> Selected:
    """Serve ``sparse_kernels.select``: the scores', the compaction, and a gather if anything is packed."""
    gated, storage = _score(call)
    control = _control(gated.significance, call.settings, invalid=gated.invalid)
    selection = _compact(gated.mask, gated.weight, call.capacity, control, storage, torch.empty_like(gated.invalid))
    packed = None if call.packing is None else _gather(call.packing, selection)
    return Selected(gated, selection, packed)


def gate_step(call: GateStepCall) -> Selected:
    """Serve ``sparse_kernels.ops.gate_step``: the scores' launches, and one of the compaction with the control."""
    gated, storage = _score(call)
    control = _control(
        gated.significance, call.settings, call.targets, gated.stats.grad_norm, call.state, call.setpoint,
        gated.invalid,
    )  # fmt: skip
    selection = _compact(gated.mask, gated.weight, call.capacity, control, storage, torch.empty_like(gated.invalid))
    _tracing.mark_changed(call.state)
    return _new(Selected, (gated, selection, None))


def gather_rows(call: TreeCall) -> Any:
    """Serve ``sparse_kernels.gather_rows``, without gradient, which ``torch_library`` adds.

    One launch moves 32 tensors. Tensors whose rows have gaps (columns cut out) are gathered by PyTorch.
    """
    return _gather(call, call.selection)


def _gather(call: Tree, selection: Selection) -> Any:
    index, slots, rows = _index(selection), selection.index.shape[0], selection.size
    if rows == 0:  # nothing to read, not even for padding
        return call.rebuild([empty_rows(tensor, slots).zero_() for tensor in call.tensors])
    outputs: list[Tensor] = []
    moves: list[tuple[int, int, int, int]] = []
    read: list[Tensor] = []  # alive until the kernel is enqueued
    for operand in call.tensors:
        tensor = _materialised(operand)
        if not rows_are_packed(tensor):
            outputs.append(tensor.index_select(0, index))
            continue
        out = empty_rows(tensor, slots)
        outputs.append(out)
        moves.append(_move(tensor, out))
        read.append(tensor)
    if moves:
        _enqueue(_cuda.gather_rows, index.device, moves, index.data_ptr(), slots, rows)
    return call.rebuild(outputs)


def scatter_rows(call: TreeCall) -> Any:
    """Serve ``sparse_kernels.scatter_rows``; not differentiable. One launch for 32 tensors, after their zeros."""
    index, slots, rows = _index(call.selection), call.selection.index.shape[0], call.selection.size
    count = call.selection.count.to(index.device, torch.int32)
    operands = [_materialised(tensor) for tensor in call.tensors]
    packed = [tensor if rows_are_packed(tensor) else tensor.contiguous() for tensor in operands]
    outputs = [empty_rows(tensor, rows).zero_() for tensor in packed]
    moves = [_move(tensor, out) for tensor, out in zip(packed, outputs, strict=True)]
    if moves:
        _enqueue(_cuda.scatter_rows, index.device, moves, index.data_ptr(), slots, count.data_ptr(), rows)
    return call.rebuild(outputs)


def _index(selection: Selection) -> Tensor:
    """Return the index as the extension reads it, int64 [slots]; a selection need not come from ``compact``."""
    return selection.index.to(torch.int64).contiguous()


def _materialised(tensor: Tensor) -> Tensor:
    """Return the tensor detached, its bytes equal to its values: a conjugated or negated view only has a flag."""
    return tensor.detach().resolve_conj().resolve_neg()


def _move(tensor: Tensor, out: Tensor) -> tuple[int, int, int, int]:
    """Return RowsToMove of cuda/gather.h: two addresses, the input's row stride in bytes, and bytes of a row."""
    row_bytes = tensor.element_size() * tensor.shape[1:].numel()
    return tensor.data_ptr(), out.data_ptr(), tensor.element_size() * tensor.stride(0), row_bytes
