"""Draws in proportion to 100 million weights that change: a tree of partial sums, 64 children a node.

``torch.multinomial`` takes at most 2^24 weights and reads all of them in each call. Here a draw and a change each
touch one node a level, five nodes for 100 million rows. Every sum is a function of the leaves alone (see
csrc/cpu/sum_tree.h), so the leaves are the whole state. C++ and the tensor arithmetic that replaces it where it was
not built find the same rows from the same numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_kernels._operands import described, vetted, with_memory
from sparse_kernels.backends import cpp as cpp_backend
from sparse_kernels.philox import philox

FAN, GROUP = 64, 8
_cpp: Any = cpp_backend.extension()
_INTEGERS = frozenset((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))
_MASK = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


def uniform_double(rows: Tensor, *, seed: int, step: int, cpp: bool | None = None) -> Tensor:
    """Return each row's number for this seed and step: float64 in [0, 1), multiples of 2^-53.

    Args:
        rows: integers on the CPU; a row's number does not depend on the others.
        seed: modulo 2^64.
        step: modulo 2^64.
        cpp: True for C++, False for tensor arithmetic. Default: C++ if it was built.
    """
    rows = _operand("rows", rows, torch.int64)
    if _use_cpp(cpp):
        out = torch.empty_like(rows, dtype=torch.float64)
        _cpp.philox_uniform(seed & _MASK64, step & _MASK64, rows.data_ptr(), rows.numel(), out.data_ptr())
        return out
    zero = torch.zeros_like(rows)
    counter = (rows & _MASK, rows >> 32, zero + (step & _MASK), zero + (step >> 32 & _MASK))
    first, second, *_ = philox(counter, seed)
    return ((first >> 5 << 26) + (second >> 6)).double() * 2.0**-53


class SumTree:
    """Tree of partial sums over non-negative leaves.

    Args:
        leaves: float32 [N] on the CPU; NaN counts as 0. Kept, not copied: after a change call ``update`` or ``build``.
        cpp: True for C++, False for tensor arithmetic. Default: C++ if it was built.

    Raises:
        TypeError: leaves that are no dense tensor.
        ValueError: leaves of another shape, dtype or device.

    Example:
        >>> tree = SumTree(torch.tensor([1.0, 3.0]))
        >>> tree.find(torch.tensor([0.5, 2.0], dtype=torch.float64))
        tensor([0, 1])
    """

    def __init__(self, leaves: Tensor, *, cpp: bool | None = None) -> None:
        kept = with_memory(vetted("leaves", leaves))
        if leaves.dtype is not torch.float32 or leaves.ndim != 1 or not leaves.numel() or not leaves.is_contiguous():
            raise ValueError(f"`leaves` must be contiguous float32 [N], N > 0; got {leaves.dtype} {list(leaves.shape)}")
        if not leaves.is_cpu or kept is not leaves:
            raise ValueError("`leaves` must be on the CPU, no negated view and no zeros without memory")
        self.leaves = leaves
        self.levels: list[Tensor] = []
        nodes = leaves.numel()
        while nodes > 1 or not self.levels:
            nodes = -(-nodes // FAN)
            self.levels.append(torch.empty(nodes, dtype=torch.float64, device="cpu"))
        self.cpp = _use_cpp(cpp)
        self.build()

    @property
    def total(self) -> float:
        """Sum of the leaves."""
        return float(self.levels[-1][0])

    def build(self) -> None:
        """Recompute all sums from the leaves."""
        if self.cpp:
            _cpp.sum_tree_build(*self._addresses())
            return
        below = self.leaves
        for level in self.levels:
            for begin in range(0, len(level), 1 << 16):  # a slice at a time: 64 doubles a node
                end = min(begin + (1 << 16), len(level))
                level[begin:end] = _sum_by_halving(_children(below, torch.arange(begin, end, device="cpu")))
            below = level

    def update(self, index: Tensor) -> None:
        """Recompute the sums above leaves that have changed.

        Args:
            index: integers, the leaves; repeats are allowed.

        Raises:
            TypeError: an index that is no integers.
            IndexError: an index outside the leaves.
        """
        index = _operand("index", index, torch.int64).flatten().clone()  # another thread may change the caller's
        if not index.numel():
            return
        low, high = index.aminmax()
        if low < 0 or high >= self.leaves.numel():
            raise IndexError(f"`index` must be in [0, {self.leaves.numel() - 1}], got {int(low)} to {int(high)}")
        if self.cpp:
            _cpp.sum_tree_update(*self._addresses(), index.data_ptr(), index.numel())
            return
        below, nodes = self.leaves, index
        for level in self.levels:
            nodes = torch.unique(nodes // FAN)
            level[nodes] = _sum_by_halving(_children(below, nodes))
            below = level

    def find(self, targets: Tensor) -> Tensor:
        """Return for each target the first leaf at which the running sum of the leaves is above it, int64.

        Args:
            targets: floating, in [0, total); taken as float64.
        """
        targets = _operand("targets", targets, torch.float64)
        if self.cpp:
            out = torch.empty_like(targets, dtype=torch.int64)
            _cpp.sum_tree_find(*self._addresses(), targets.data_ptr(), targets.numel(), out.data_ptr())
            return out
        shape, targets = targets.shape, targets.reshape(-1)
        node = torch.zeros_like(targets, dtype=torch.int64)
        for below in (*reversed(self.levels[:-1]), self.leaves):
            groups = _children(below, node).reshape(-1, GROUP, GROUP)
            group, targets = _pick(_sum_by_halving(groups), targets)
            child, targets = _pick(groups[torch.arange(len(group), device="cpu"), group], targets)
            node = node * FAN + group * GROUP + child
        return node.reshape(shape)

    def _addresses(self) -> tuple[int, int, tuple[int, ...]]:
        return self.leaves.data_ptr(), self.leaves.numel(), tuple(level.data_ptr() for level in self.levels)


def _operand(name: str, operand: Any, dtype: torch.dtype) -> Tensor:
    """Return a contiguous CPU tensor of this dtype, converted from another integer or floating one."""
    if isinstance(operand, (list, tuple, np.ndarray)):
        operand = torch.as_tensor(operand)
    tensor = with_memory(vetted(name, operand))
    floating = dtype.is_floating_point
    known = tensor.is_floating_point() if floating else tensor.dtype in _INTEGERS
    if not known and tensor.numel():  # an empty list has no dtype of its own
        raise TypeError(f"`{name}` must be {'floating' if floating else 'integers'}, got {described(tensor)}")
    if not tensor.is_cpu:
        raise ValueError(f"`{name}` must be on the CPU, got {tensor.device}")
    return tensor.detach().to(dtype).contiguous()


def _use_cpp(requested: bool | None) -> bool:
    missing = cpp_backend.unavailable_reason()
    if requested and missing is not None:
        raise RuntimeError(f"`cpp` must be None or False: the C++ backend is {missing}")
    return missing is None if requested is None else requested


def _children(below: Tensor, nodes: Tensor) -> Tensor:
    """Return the children of each node, float64 [n, FAN]; 0 for one that is missing or NaN."""
    place = nodes[:, None] * FAN + torch.arange(FAN, device="cpu")
    inside = place < below.numel()
    children = below[place.clamp(max=below.numel() - 1)].double()
    return torch.where(inside & ~children.isnan(), children, 0.0)


def _sum_by_halving(children: Tensor) -> Tensor:
    """Sum over the last dim, a power of two long, in C++'s order."""
    half = children.shape[-1]
    while half > 1:
        half //= 2
        children = children[..., :half] + children[..., half : 2 * half]
    return children[..., 0]


def _pick(weights: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first place in each row whose running sum is above the target, and the target less the sum before."""
    after = weights.cumsum(1)
    above = after > targets[:, None]
    # Rounding may leave none above: then the last that weighs anything.
    last = weights.shape[1] - 1 - (weights > 0.0).flip(1).to(torch.uint8).argmax(1)
    place = torch.where(above.any(1), above.to(torch.uint8).argmax(1), last)
    before = torch.where(place > 0, after.gather(1, (place - 1).clamp(min=0)[:, None]).squeeze(1), 0.0)
    return place, targets - before


def assign(leaves: Tensor, index: Tensor, values: Tensor) -> None:
    """Set leaves[index] = values, the last one if an index repeats: PyTorch promises no order of its own.

    Args:
        leaves: float32 [N] on the CPU, changed in place.
        index: int64.
        values: of the index's shape.
    """
    leaves.numpy()[index.numpy()] = np.asarray(values)
