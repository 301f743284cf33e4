"""Calls of plain CPU tensors that nobody watches: checked, allocated and run in one step of C++.

For a few rows each step in Python takes longer than the kernel. C++ reads and makes PyTorch's tensors through DLPack's
C exchange interface, which PyTorch has from 2.10 on. Each function here returns None for anything that is not the
common case, errors included: the general route of ``ops`` serves that, or says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_kernels import backends, cpp_backend
from sparse_kernels.tracing import unwatched
from sparse_kernels.types import ControlState, GatedRows, RowStats, Selected, Selection

_cpp: Any = getattr(cpp_backend, "_cpp", None)
_NO_STATS = RowStats()


def _exchange() -> bool:
    """Whether C++ and this PyTorch share an exchange interface."""
    interface = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if interface is None or not hasattr(_cpp, "use_exchange_api"):  # not built, or not since it is there
        return False
    return bool(_cpp.use_exchange_api(interface, Tensor, torch.nn.Parameter))


AVAILABLE = _exchange()


def serves(backend: str | None) -> bool:
    """Whether a call that asks for this backend may be tried here."""
    return (
        AVAILABLE
        and (backend is None or backend == "cpp")
        and (backends._forced is None or backends._forced == "cpp")
        and unwatched()
    )


def compact(mask: Tensor, weight: Tensor | None, capacity: int | None) -> Selection | None:
    found = _cpp.compact_plain(mask, weight, capacity)
    if found is None:
        return None
    index, kept_weight, count, overflow = found
    return Selection(index, kept_weight, count, overflow, mask.shape[0])


def gather_rows(tree: Any, selection: Selection) -> Any | None:
    return _cpp.gather_plain(tree, selection.index, selection.size, torch.is_grad_enabled())


def gate_rows(
    logits: Tensor, targets: Tensor, threshold: Tensor, weights: Mapping[str, float], *settings: Any
) -> GatedRows | None:
    """``settings``: temperature, softcap, label_smoothing, ignore_index, gate_temperature, p_min, seed, step."""
    found = _cpp.gate_rows_plain(logits, targets, threshold, weights, *settings)
    if found is None:
        return None
    mask, significance, weight, invalid = found
    return GatedRows(mask, significance, weight, _NO_STATS, invalid)


def select(
    logits: Tensor, targets: Tensor, threshold: Tensor, weights: Mapping[str, float], tree: Any, *settings: Any
) -> Selected | None:
    """``settings``: as ``gate_rows``, then the capacity. Nothing is packed of a tree that is for the general route."""
    found = _cpp.select_plain(logits, targets, threshold, weights, *settings, tree, torch.is_grad_enabled())
    if found is None:
        return None
    mask, significance, weight, invalid, index, kept_weight, count, overflow, packed = found
    gated = GatedRows(mask, significance, weight, _NO_STATS, invalid)
    return Selected(gated, Selection(index, kept_weight, count, overflow, targets.numel()), packed)


def gate_step(
    logits: Tensor, targets: Tensor, state: ControlState, weights: Mapping[str, float], *settings: Any
) -> Selected | None:
    """``settings``: as ``gate_rows`` with the counters for the step, then capacity, setpoint, by_mass."""
    found = _cpp.gate_step_plain(logits, targets, state.values, weights, *settings)
    if found is None:
        return None
    mask, significance, weight, invalid, index, kept_weight, count, overflow, grad_norm = found
    stats = _NO_STATS if grad_norm is None else RowStats(grad_norm=grad_norm)
    gated = GatedRows(mask, significance, weight, stats, invalid)
    return Selected(gated, Selection(index, kept_weight, count, overflow, targets.numel()), None)
