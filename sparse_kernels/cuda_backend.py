"""The CUDA kernels as a backend: tensors of one device, handed over as addresses. Scores are Triton's.

``select`` and ``gate_step`` are one launch of Triton's and one of ours, and a third that gathers: the compaction
counts the rows of NaN and moves the controller, in its last block.

Everything is enqueued on PyTorch's current stream of the tensors' device, and nothing waits for the device except
``compact`` without a capacity. No tensor needs ``record_stream``: outputs and temporary storage are allocated for the
same stream that the kernels run on, so the allocator's own order is enough; inputs made on another stream are the
caller's to order, as for any operation of PyTorch's.

A bad index cannot be raised without waiting: gathered, it gives a row of zeros; scattered, it is skipped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_kernels import calls, triton_backend
from sparse_kernels.calls import CompactCall, ControlCall, GateCall, GateStepCall, SelectCall, StatsCall, Tree, TreeCall
from sparse_kernels.rows import empty_rows, rows_are_packed
from sparse_kernels.tracing import refuse_tensor
from sparse_kernels.triton_backend import row_stats_backward, row_stats_saving  # noqa: F401  for library
from sparse_kernels.types import ControlState, GatedRows, Selected, Selection

MAX_ROWS = 2**31 - 1  # of a mask: counts are int32

_missing: str | None = None
try:
    from sparse_kernels import _cuda  # type: ignore[attr-defined,unused-ignore]
except ImportError as error:
    try:
        from sparse_kernels._build_info import CUDA_MISSING

        _missing = f"not built: {CUDA_MISSING}" if CUDA_MISSING else f"does not load: {error}"
    except ImportError:
        _missing = "not built (SPARSE_KERNELS_BUILD=none)"


def unavailable() -> str | None:
    """Why this backend cannot be used at all, or None."""
    if _missing is not None:
        return _missing
    if torch.version.cuda is None:  # ROCm's tensors say that they are on cuda, too
        return "this PyTorch is built without CUDA"
    return None if torch.cuda.is_available() else "no CUDA device"


def detail() -> str:
    """The architectures that the kernels were compiled for, and the device's."""
    major, minor = torch.cuda.get_device_capability()
    return f"compiled for {_cuda.architectures}; the device is {major}.{minor}"


def _refuse_tensor(tensor: Tensor) -> str | None:
    if _missing is not None:
        return _missing
    if not tensor.is_cuda:
        return f"tensors are on {tensor.device}, it serves cuda"
    return refuse_tensor(tensor) or unavailable()


def refuse_row_stats(call: StatsCall) -> str | None:
    """Why this call is not served, or None."""
    return _refuse_tensor(call.logits) or triton_backend.refuse_row_stats(call)


refuse_gate_rows = refuse_row_stats
row_stats, gate_rows = triton_backend.row_stats, triton_backend.gate_rows


def _refuse_rows(rows: int) -> str | None:
    return None if rows <= MAX_ROWS else f"the mask has {rows} rows; it serves up to {MAX_ROWS}"


def refuse_compact(call: CompactCall) -> str | None:
    """Why this call is not served, or None."""
    return _refuse_rows(call.mask.shape[0]) or _refuse_tensor(call.mask)


def _refuse_tree(call: TreeCall) -> str | None:
    return _refuse_tensor(call.selection.index) or _refuse_tensors(call.tensors)


def _refuse_tensors(tensors: list[Tensor]) -> str | None:
    for tensor in tensors:
        reason = _refuse_tensor(tensor)
        if reason is not None:
            return reason
    return None


refuse_gather_rows = refuse_scatter_rows = _refuse_tree


def refuse_control(call: ControlCall) -> str | None:
    """Why this call is not served, or None."""
    return calls.refuse_control(call, _refuse_tensor)


def _refuse_step(call: GateCall) -> str | None:
    reason = refuse_gate_rows(call) or _refuse_rows(call.targets.numel())
    if reason is None and call.logits.dtype is torch.float64:
        reason = "the rows of NaN are counted in float32"
    return reason


def refuse_select(call: SelectCall) -> str | None:
    """Why this call is not served as one, or None."""
    return _refuse_step(call) or (None if call.packing is None else _refuse_tensors(call.packing.tensors))


def refuse_gate_step(call: GateStepCall) -> str | None:
    """Why this call is not served as one, or None."""
    return _refuse_step(call) or calls.refuse_state(call.state)


def _enqueue(function: Callable[..., Any], device: torch.device, *arguments: Any) -> Any:
    """Calls the extension with ``device`` as PyTorch's current one, on its current stream there."""
    with torch.cuda.device(device):  # the extension leaves the device current; this puts the caller's back
        return function(*arguments, device.index, torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(maxsize=64)  # a host query of some microseconds; batches come in few sizes
def _storage_bytes(rows: int, with_control: bool, device: torch.device) -> int:
    return int(_enqueue(_cuda.compact_storage_bytes, device, rows, with_control))


def _storage(rows: int, with_control: bool, device: torch.device) -> Tensor:
    """int32: a kernel before the compaction sets the first element to 0, where there is control."""
    return torch.empty(_storage_bytes(rows, with_control, device) // 4, dtype=torch.int32, device=device)


def compact(call: CompactCall) -> Selection:
    """See ``sparse_kernels.compact``. Without a capacity the count is read first: the one synchronisation."""
    weight = None if call.weight is None else call.weight.detach().contiguous()
    storage = _storage(call.mask.shape[0], False, call.mask.device)
    return _compact(call.mask.contiguous(), weight, call.capacity, None, storage)


def _compact(
    mask: Tensor, weight_in: Tensor | None, capacity: int | None, control: tuple[Any, ...] | None, storage: Tensor
) -> Selection:
    """Of contiguous tensors, whose flattened rows are packed; ``control`` is what ``_control`` gives."""
    rows, device = mask.numel(), mask.device
    slots = int(torch.count_nonzero(mask)) if capacity is None else capacity
    index = torch.empty(slots, dtype=torch.int64, device=device)
    weight = torch.empty(slots, dtype=torch.float32, device=device)
    count = torch.empty((), dtype=torch.int32, device=device)
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
    return Selection(index, weight, count, overflow, rows)


def _control(
    significance: Tensor,
    labels: Tensor | None = None,
    ignore_index: int = 0,
    mass: Tensor | None = None,
    state: ControlState | None = None,
    setpoint: Tensor | None = None,
    invalid: Tensor | None = None,
    gate_temperature: float = 0.0,
    p_min: float = 0.0,
) -> tuple[Any, ...]:
    """The extension's Control, of contiguous tensors: csrc/cuda/control.h's ControlArgs."""
    return (
        significance.data_ptr(),
        0 if labels is None else labels.data_ptr(),
        0 if labels is None else labels.element_size(),
        ignore_index,
        0 if mass is None else mass.data_ptr(),
        0 if state is None else state.values.data_ptr(),
        0 if state is None else state.counters.data_ptr(),
        0 if setpoint is None else setpoint.data_ptr(),
        0 if invalid is None else invalid.data_ptr(),
        gate_temperature,
        p_min,
    )


def control(call: ControlCall) -> None:
    """See ``sparse_kernels.control``. One launch, of a block for each state."""
    significance, setpoint = call.significance.detach().contiguous(), call.setpoint.contiguous()
    labels = None if call.labels is None else call.labels.contiguous()
    mass = None if call.mass is None else call.mass.detach().float().contiguous()
    overflow = None if call.overflow is None else call.overflow.contiguous()
    _enqueue(
        _cuda.control,
        significance.device,
        _control(
            significance, labels, call.ignore_index, mass, call.state, setpoint,
            gate_temperature=call.gate_temperature, p_min=call.p_min,
        ),
        0 if overflow is None else overflow.data_ptr(),
        setpoint.numel(),
        significance.shape[-1],
    )  # fmt: skip


def _score(call: GateCall) -> tuple[GatedRows, Tensor]:
    """The scores, and the storage of the compaction that is to follow and count their rows of NaN."""
    call.targets = call.targets.contiguous()
    storage = _storage(call.targets.numel(), True, call.logits.device)
    return triton_backend.gate_rows_uncounted(call, storage), storage


def select(call: SelectCall) -> Selected:
    """See ``sparse_kernels.select``: three launches, two where nothing is packed."""
    gated, storage = _score(call)
    control = _control(gated.significance, invalid=gated.invalid)
    selection = _compact(gated.mask, gated.weight, call.capacity, control, storage)
    packed = None if call.packing is None else _gather(call.packing, selection)
    return Selected(gated, selection, packed)


def gate_step(call: GateStepCall) -> Selected:
    """See ``sparse_kernels.ops.gate_step``: two launches."""
    gated, storage = _score(call)
    control = _control(
        gated.significance, call.targets, call.ignore_index, gated.stats.grad_norm, call.state, call.setpoint,
        gated.invalid, call.gate_temperature, call.p_min,
    )  # fmt: skip
    return Selected(gated, _compact(gated.mask, gated.weight, call.capacity, control, storage), None)


def gather_rows(call: TreeCall) -> Any:
    """See ``sparse_kernels.gather_rows``, without gradient, which is for ``library`` to add. One launch for 32 tensors.

    Tensors whose rows have gaps (columns cut out) are gathered by PyTorch.
    """
    return _gather(call, call.selection)


def _gather(call: Tree, selection: Selection) -> Any:
    index, slots, rows = _index(selection), selection.index.shape[0], selection.size
    if rows == 0:  # nothing to read, not even for padding
        return call.rebuild([empty_rows(tensor, slots).zero_() for tensor in call.tensors])
    outputs: list[Tensor] = []
    moves: list[tuple[int, int, int, int]] = []
    kept: list[Tensor] = []  # what the addresses are of
    for given in call.tensors:
        tensor = _bytes_as_they_are(given)
        if not rows_are_packed(tensor):
            outputs.append(tensor.index_select(0, index))
            continue
        out = empty_rows(tensor, slots)
        outputs.append(out)
        moves.append(_move(tensor, out))
        kept.append(tensor)
    if moves:
        _enqueue(_cuda.gather_rows, index.device, moves, index.data_ptr(), slots, rows)
    return call.rebuild(outputs)


def scatter_rows(call: TreeCall) -> Any:
    """See ``sparse_kernels.scatter_rows``; not differentiable. One launch for 32 tensors, after their zeros."""
    index, slots, rows = _index(call.selection), call.selection.index.shape[0], call.selection.size
    count = call.selection.count.to(index.device, torch.int32)
    given = [_bytes_as_they_are(tensor) for tensor in call.tensors]
    packed = [tensor if rows_are_packed(tensor) else tensor.contiguous() for tensor in given]
    outputs = [empty_rows(tensor, rows).zero_() for tensor in packed]
    moves = [_move(tensor, out) for tensor, out in zip(packed, outputs, strict=True)]
    if moves:
        _enqueue(_cuda.scatter_rows, index.device, moves, index.data_ptr(), slots, count.data_ptr(), rows)
    return call.rebuild(outputs)


def _index(selection: Selection) -> Tensor:
    """int64 [slots], as the extension reads it: a selection need not come from ``compact``."""
    return selection.index.to(torch.int64).contiguous()


def _bytes_as_they_are(tensor: Tensor) -> Tensor:
    """The tensor detached, its values what its bytes say: a conjugated or negated view only has a flag."""
    return tensor.detach().resolve_conj().resolve_neg()


def _move(tensor: Tensor, out: Tensor) -> tuple[int, int, int, int]:
    """Addresses, bytes from a row of ``tensor`` to the next, and bytes of a row: csrc/cuda/gather.h's RowsToMove."""
    row_bytes = tensor.element_size() * tensor.shape[1:].numel()
    return tensor.data_ptr(), out.data_ptr(), tensor.element_size() * tensor.stride(0), row_bytes
