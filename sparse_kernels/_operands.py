"""Vetting of one operand or argument: what it is, and that its bytes are its values. Looks at metadata alone."""

from __future__ import annotations

import inspect
import math
import numbers
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_kernels._tracing import dynamo_compiling, is_lazy_negative, is_lazy_zeros
from sparse_kernels.types import STATISTICS, WEIGHABLE, Selection

_STRIDED = torch.strided
_WEIGHABLE = frozenset(WEIGHABLE)
_INDICES = (torch.int64, torch.int32)


def kind(value: Any) -> str:
    """Return the name of a value's type, with its module unless that is Python's own, and a short value itself."""
    cls = type(value)
    name: str = cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    text = repr(value) if isinstance(value, (str, int, float, list, tuple, set, dict)) else ""
    return f"{name} {text}" if 0 < len(text) <= 40 else name


def described(tensor: Tensor) -> str:
    """Return dtype and shape in words."""
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def vetted(name: str, operand: Any, hint: str = "") -> Tensor:
    """Return a tensor whose bytes are its values, or raise.

    Args:
        name: of the argument.
        operand: what the caller gave.
        hint: ends the message about what is no tensor. Default: nothing.

    Raises:
        TypeError: it is no tensor, or a sparse, nested or other tensor without strides.
    """
    if not isinstance(operand, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {kind(operand)}{hint}")
    if operand.layout is not _STRIDED:
        raise TypeError(f"`{name}` must be a dense (torch.strided) tensor, got {operand.layout}")
    return operand.resolve_neg() if not dynamo_compiling() and operand.is_neg() else operand


def with_memory(tensor: Tensor) -> Tensor:
    """Return the tensor with bytes that are its values.

    Some of PyTorch's derivatives are zeros without any memory, or negated views, which no kernel reads.
    """
    if is_lazy_zeros(tensor):
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor.resolve_neg() if is_lazy_negative(tensor) else tensor


def check_device(name: str, tensor: Tensor, of: str, device: torch.device) -> None:
    """Raise unless the tensor is on the device of another operand, which ``of`` names."""
    if tensor.device != device:
        raise ValueError(f"`{name}` must be on {device} as {of}, got {tensor.device}")


def vetted_selection(selection: Any) -> Selection:
    """Return a selection whose tensors are what ``compact`` would have made, or raise.

    Args:
        selection: what the caller gave, perhaps made by hand.

    Raises:
        TypeError: it is no Selection, or one of its tensors has another dtype.
        ValueError: one of its tensors has another shape or device.
    """
    if not isinstance(selection, Selection):
        raise TypeError(
            f"`selection` must be a Selection, as compact() returns it, got {kind(selection)}; "
            "for a bare index use tensor[index]"
        )
    index, weight, count, overflow, size = selection
    vetted_index, _, size = vetted_places(index, count, size)
    if not isinstance(weight, Tensor) or weight.dtype is not torch.float32:
        raise TypeError(f"`selection.weight` must be a float32 tensor, got {_of(weight)}")
    if weight.shape != index.shape:
        raise ValueError(f"`selection.weight` must have shape {tuple(index.shape)}, got {tuple(weight.shape)}")
    _check_number("overflow", overflow)
    if not (index.is_cpu and weight.is_cpu and overflow.is_cpu):
        check_device("selection.weight", weight, "its index", index.device)
        check_device("selection.overflow", overflow, "its index", index.device)
    return selection if vetted_index is index else selection._replace(index=vetted_index)


def vetted_places(index: Any, count: Any, size: Any) -> tuple[Tensor, Tensor, Any]:
    """Return what of a selection says where rows lie: the index as int64, the count and the size.

    Args:
        index: int64 or int32 [slots].
        count: int32 or int64, one element.
        size: number of rows, at least 0.

    Raises:
        TypeError: another dtype, or no tensor.
        ValueError: another shape or device.
    """
    if not isinstance(index, Tensor) or index.dtype not in _INDICES:
        raise TypeError(f"`selection.index` must be an int64 tensor, got {_of(index)}")
    if index.dim() != 1:
        raise ValueError(f"`selection.index` must have shape [slots], got {tuple(index.shape)}")
    _check_number("count", count)
    if not (index.is_cpu and count.is_cpu):
        check_device("selection.count", count, "its index", index.device)
    if not isinstance(size, (int, torch.SymInt)):
        raise TypeError(f"`selection.size` must be an int, got {kind(size)}")
    if size < 0:
        raise ValueError(f"`selection.size` must be 0 or above, got {size}")
    index = vetted("selection.index", index)
    return index if index.dtype is torch.int64 else index.to(torch.int64), vetted("selection.count", count), size


def _check_number(name: str, number: Any) -> None:
    if not isinstance(number, Tensor) or number.dtype not in _INDICES:
        raise TypeError(f"`selection.{name}` must be an int32 tensor, got {_of(number)}")
    if number.numel() != 1:
        raise ValueError(f"`selection.{name}` must have one element, got shape {tuple(number.shape)}")


def _of(value: Any) -> str:
    return described(value) if isinstance(value, Tensor) else kind(value)


def integer(name: str, value: Any) -> int:
    """Return an argument as Python's int, or raise if it is none."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be an int, got {kind(value)}") from None


def number(name: str, value: Any) -> float:
    """Return an argument as Python's float, or raise if it is no number."""
    if isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.numel() == 1):
        return float(value)
    raise TypeError(f"`{name}` must be a number, got {kind(value)}")


def scalar(name: str, value: Any, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Return a number as a tensor without dimensions.

    Args:
        name: of the argument.
        value: any real number of Python or NumPy.
        dtype: floating.
        device: default: PyTorch's own.

    Raises:
        ValueError: it is finite and beyond what the dtype holds.
    """
    if torch.finfo(dtype).max < abs(value) < math.inf:
        raise ValueError(f"`{name}` must be a number that {dtype} can hold, got {kind(value)}")
    return torch.full((), float(value), dtype=dtype, device=device)


def statistic_names(outputs: Any, known: Collection[str] = STATISTICS) -> Collection[str]:
    """Return the names of statistics, checked; a single name may stand for itself."""
    if type(outputs) is tuple:  # what is usual first: asking for a Collection takes longer than all the rest
        pass
    elif isinstance(outputs, str):
        outputs = (outputs,)
    elif not isinstance(outputs, Collection):
        raise TypeError(f"`outputs` must be names of statistics, got {kind(outputs)}")
    names: Collection[str] = outputs
    for name in names:
        if name not in known:
            unknown = [name for name in names if name not in known]
            raise ValueError(f"`outputs` must be among {', '.join(known)}; got {unknown}")
    return names


def check_statistic_weights(weights: Any) -> None:
    """Raise unless this maps statistics to numbers."""
    if type(weights) is not dict and not isinstance(weights, Mapping):
        raise TypeError(f"`weights` must map statistics to numbers, such as {{'loss': 1.0}}, got {kind(weights)}")
    known = bool(weights)
    for name in weights:  # a loop: PyTorch 2.6's compiler does not know set.issuperset
        known = known and name in _WEIGHABLE
    if not known:
        raise ValueError(f"`weights` must name one or more of {', '.join(WEIGHABLE)}; got {list(weights)}")
    for name, weight in weights.items():
        if not isinstance(weight, (int, float)):
            number(f"weights[{name!r}]", weight)


_UNSERVED = {  # keywords of PyTorch's cross-entropies, and what does their work here
    "weight": "multiply each row's loss by the weight of its target's class",
    "reduction": "reduce the rows' losses, as by `.loss.mean()`",
    "reduce": "reduce the rows' losses, as by `.loss.mean()`",
    "size_average": "reduce the rows' losses, as by `.loss.mean()`",
    "bias": "give a head's bias as `linear_bias`",
    "options": "give a head's number of rows at once as `chunk`",
}


def refuse_unserved(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raise for keywords that a function does not take.

    Args:
        function: a public function, whose last parameter gathers such keywords.
        given: the keywords, at least one.

    Raises:
        TypeError: always.
    """
    name, value = next(iter(given.items()))
    taken = [key for key in inspect.signature(function).parameters if key != "unserved"]
    expected = _UNSERVED.get(name, f"it takes {', '.join(taken)}")
    got = described(value) if isinstance(value, Tensor) else kind(value)
    raise TypeError(f"{function.__name__} has no argument `{name}`, got {got}: {expected}")
