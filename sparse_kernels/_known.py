"""Findings about calls that were checked before, kept for later calls with the same metadata.

What holds for one call because of its tensors' shapes, strides, dtypes, devices and layouts holds for every call like
it, so that a training loop asks once. What depends on values, gradients, modes, demands or verdicts is no finding: it
is asked in each call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from sparse_kernels._tracing import unwatched

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_metadata = operator.attrgetter("shape", "dtype", "device", "layout")
_stride, _is_negated, _is_lazy_zeros = Tensor.stride, Tensor.is_neg, Tensor._is_zerotensor

MOST = 256  # kinds of calls; beyond, all are forgotten


class Known:
    """Findings about one kind of call.

    Attributes:
        checked: what the checks made of the options; None before a call has passed them.
        able: the backends' functions that found nothing unsupported.
        plans: of a backend.
    """

    __slots__ = ("able", "checked", "plans")

    def __init__(self) -> None:
        self.checked: tuple[Any, ...] | None = None
        self.able: set[Callable[[Any], str | None]] = set()
        self.plans: dict[Hashable, Any] = {}


_kinds: dict[Hashable, Known] = {}


def known_of(kind: type, tensors: tuple[Any, ...], outputs: Any, dim: Any, offset: Any = None) -> Known | None:
    """Return the findings about calls like this one; None where there are none to be kept.

    None as well where a compiler, a mode or a transform may see the call, and for anything but plain tensors.

    Args:
        kind: class of the call.
        tensors: every other tensor of the call than the offset.
        outputs: names of statistics, as given.
        dim: of the classes, as given.
        offset: as given. Default: none.
    """
    if not unwatched() or type(outputs) is not tuple or type(dim) is not int:
        return None
    if offset is not None:
        tensors = *tensors, offset
    if not _PLAIN.issuperset(map(type, tensors)):
        return None
    if True in map(_is_negated, tensors) or True in map(_is_lazy_zeros, tensors):  # their bytes are not their values
        return None
    try:
        key = kind, outputs, dim, offset is None, *map(_metadata, tensors), *map(_stride, tensors)
        found = _kinds.get(key)
    except (TypeError, RuntimeError):  # a name without a hash, a tensor without strides
        return None
    if found is None:
        if len(_kinds) >= MOST:
            _kinds.clear()
        found = _kinds[key] = Known()
    return found
