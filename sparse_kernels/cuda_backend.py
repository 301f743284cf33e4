"""The CUDA kernels as a backend: tensors of one device, handed over as addresses.

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

from sparse_kernels.calls import CompactCall, TreeCall
from sparse_kernels.rows import empty_rows, rows_are_packed
from sparse_kernels.tracing import refuse_tensor
from sparse_kernels.types import Selection

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


def refuse_compact(call: CompactCall) -> str | None:
    """Why this call is not served, or None."""
    if call.mask.shape[0] > MAX_ROWS:
        return f"the mask has {call.mask.shape[0]} rows; it serves up to {MAX_ROWS}"
    return _refuse_tensor(call.mask)


def _refuse_tree(call: TreeCall) -> str | None:
    reason = _refuse_tensor(call.selection.index)
    for tensor in call.tensors:
        reason = reason or _refuse_tensor(tensor)
    return reason


refuse_gather_rows = refuse_scatter_rows = _refuse_tree


def _enqueue(function: Callable[..., Any], device: torch.device, *arguments: Any) -> Any:
    """Calls the extension with ``device`` as PyTorch's current one, on its current stream there."""
    with torch.cuda.device(device):  # the extension leaves the device current; this puts the caller's back
        return function(*arguments, device.index, torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(maxsize=64)  # a host query of some microseconds; batches come in few sizes
def _storage_bytes(rows: int, device: torch.device) -> int:
    return int(_enqueue(_cuda.compact_storage_bytes, device, rows))


def compact(call: CompactCall) -> Selection:
    """See ``sparse_kernels.compact``. Without a capacity the count is read first: the one synchronisation."""
    mask, device = call.mask.contiguous(), call.mask.device
    weight_in = None if call.weight is None else call.weight.detach().contiguous()
    rows = mask.shape[0]
    slots = int(torch.count_nonzero(mask)) if call.capacity is None else call.capacity
    index = torch.empty(slots, dtype=torch.int64, device=device)
    weight = torch.empty(slots, dtype=torch.float32, device=device)
    count = torch.empty((), dtype=torch.int32, device=device)
    overflow = torch.empty_like(count)
    storage = torch.empty(_storage_bytes(rows, device), dtype=torch.uint8, device=device)
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
        storage.data_ptr(),
        storage.numel(),
    )
    return Selection(index, weight, count, overflow, rows)


def gather_rows(call: TreeCall) -> Any:
    """See ``sparse_kernels.gather_rows``, without gradient, which is for ``library`` to add. One launch for 32 tensors.

    Tensors whose rows have gaps (columns cut out) are gathered by PyTorch.
    """
    index, slots, rows = _index(call.selection), call.selection.index.shape[0], call.selection.size
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
