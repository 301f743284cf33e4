"""Small calls of plain CPU tensors: operands recognised, outputs made and the kernel run by one call of C++.

For a few rows each step in Python takes longer than the kernel. C++ reads and makes PyTorch's tensors through DLPack's
C exchange interface, which PyTorch has from 2.10 on. Each function returns None for anything but the common case,
errors included: the caller then takes the general route, which serves the call or says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_kernels._arguments import Settings
from sparse_kernels._tracing import mark_changed
from sparse_kernels.backends import cpp
from sparse_kernels.memory import untouched_zeros
from sparse_kernels.types import ControlState, GatedRows, RowStats, Selected, Selection

_cpp: Any = cpp.extension()
_NO_STATS = RowStats()
_new = tuple.__new__  # a named tuple's own constructor is one more call of Python


def _exchange() -> bool:
    """Return True if C++ and this PyTorch share an exchange interface."""
    interface = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    return interface is not None and _cpp is not None and _cpp.use_exchange_api(interface, Tensor, torch.nn.Parameter)


AVAILABLE = _exchange()


def row_stats(
    logits: Tensor, targets: Tensor, settings: Settings, outputs: Collection[str], for_gradient: bool
) -> tuple[Tensor | None, ...] | None:
    """Return the fields of ``sparse_kernels.row_stats``'s result, or None.

    Args:
        logits: as in ``sparse_kernels.row_stats``, with the classes in the last dimension.
        targets: as in ``sparse_kernels.row_stats``.
        settings: the call's settings.
        outputs: names of statistics.
        for_gradient: return the rows' maximum and total as well, behind the fields.
    """
    results: tuple[Tensor | None, ...] | None = _cpp.row_stats_plain(logits, targets, settings, outputs, for_gradient)
    return results


def row_stats_backward(
    logits: Tensor,
    targets: Tensor,
    settings: Settings,
    maximum: Tensor,
    total: Tensor,
    entropy: Tensor | None,
    of_loss: Tensor | None,
    of_entropy: Tensor | None,
) -> Tensor | None:
    """Return the gradient in the logits, in new memory, or None.

    Args:
        logits: of :func:`row_stats`.
        targets: of :func:`row_stats`.
        settings: of :func:`row_stats`.
        maximum: as :func:`row_stats` returned it.
        total: as :func:`row_stats` returned it.
        entropy: as :func:`row_stats` returned it.
        of_loss: the upstream gradient of the loss, or None.
        of_entropy: the upstream gradient of the entropy, or None.
    """
    gradient: Tensor | None = _cpp.row_stats_backward_plain(
        logits, targets, settings, maximum, total, entropy, of_loss, of_entropy, untouched_zeros
    )
    return gradient


def compact(mask: Tensor, weight: Tensor | None, capacity: int | None) -> Selection | None:
    """Serve ``sparse_kernels.compact``, or return None."""
    fields = _cpp.compact_plain(mask, weight, capacity)
    return None if fields is None else _new(Selection, fields)


def gather_rows(tree: Any, selection: Selection) -> Any | None:
    """Serve ``sparse_kernels.gather_rows``, or return None."""
    return _cpp.gather_plain(tree, selection, selection.size, torch.is_grad_enabled())


def gate_rows(
    logits: Tensor, targets: Tensor, threshold: float | Tensor, weights: Mapping[str, float], settings: Settings
) -> GatedRows | None:
    """Serve ``sparse_kernels.gate_rows`` without offset and outputs, or return None."""
    results = _cpp.gate_rows_plain(logits, targets, weights, settings, threshold)
    if results is None:
        return None
    mask, significance, weight, invalid = results
    return _new(GatedRows, (mask, significance, weight, _NO_STATS, invalid))


def select(
    logits: Tensor,
    targets: Tensor,
    threshold: float | Tensor,
    weights: Mapping[str, float],
    settings: Settings,
    tree: Any,
    capacity: int | None,
) -> Selected | None:
    """Serve ``sparse_kernels.select`` without offset and outputs, or return None.

    Nothing is packed of a tree that only the general route can pack.
    """
    results = _cpp.select_plain(logits, targets, weights, settings, threshold, capacity, tree, torch.is_grad_enabled())
    if results is None:
        return None
    mask, significance, weight, invalid, index, kept_weight, count, overflow, packed = results
    gated = _new(GatedRows, (mask, significance, weight, _NO_STATS, invalid))
    selection = _new(Selection, (index, kept_weight, count, overflow, targets.numel()))
    return _new(Selected, (gated, selection, packed))


def gate_step(
    logits: Tensor,
    targets: Tensor,
    state: ControlState,
    setpoint: float | Tensor,
    weights: Mapping[str, float],
    settings: Settings,
    capacity: int | None,
    by_mass: bool,
) -> Selected | None:
    """Serve ``sparse_kernels.ops.gate_step`` without offset, or return None; the step is the state's."""
    values, counters = state
    results = _cpp.gate_step_plain(logits, targets, weights, settings, values, counters, setpoint, capacity, by_mass)
    if results is None:
        return None
    mark_changed(state)
    mask, significance, weight, invalid, index, kept_weight, count, overflow, grad_norm = results
    stats = _NO_STATS if grad_norm is None else RowStats(grad_norm=grad_norm)
    gated = _new(GatedRows, (mask, significance, weight, stats, invalid))
    selection = _new(Selection, (index, kept_weight, count, overflow, targets.numel()))
    return _new(Selected, (gated, selection, None))
