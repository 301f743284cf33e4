"""A checked request to an operation: what the public functions build and the backends serve.

Checks cost host time only: shapes, dtypes and devices, never values on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparse_kernels.tracing import is_noted_negative
from sparse_kernels.types import CONTROL_COUNTERS, CONTROL_VALUES, STATISTICS, ControlState, Selection

FLOATING = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_STATISTICS = frozenset(STATISTICS)
_WEIGHABLE = _STATISTICS - {"argmax"}


@dataclass(slots=True)
class StatsCall:
    """A ``row_stats`` request."""

    logits: Tensor  # [..., classes, ...], floating
    targets: Tensor  # int64 or int32, logits' shape without ``dim``
    outputs: Collection[str]
    dim: int
    temperature: float
    softcap: float
    label_smoothing: float
    ignore_index: int

    def __post_init__(self) -> None:
        logits, targets = self.logits, self.targets
        if logits.dtype not in FLOATING:
            raise TypeError(f"logits are {logits.dtype}; wanted float32, bfloat16, float16 or float64")
        if targets.dtype is not torch.int64 and targets.dtype is not torch.int32:
            raise TypeError(f"targets are {targets.dtype}; wanted int64 or int32 class indices")
        shape = logits.shape
        ndim = len(shape)
        if not -ndim <= self.dim < ndim:
            raise ValueError(f"dim={self.dim} is not a dimension of logits of shape {tuple(shape)}")
        if self.dim in (-1, ndim - 1):
            self.dim = -1
            rows = shape[:-1]
        else:
            self.dim %= ndim
            rows = shape[: self.dim] + shape[self.dim + 1 :]
        if targets.shape != rows:
            raise ValueError(
                f"targets have shape {tuple(targets.shape)}; logits of shape {tuple(shape)} "
                f"with classes in dim {self.dim} want {tuple(rows)}"
            )
        if not (logits.is_cpu and targets.is_cpu) and targets.device != logits.device:  # is_cpu costs a fifth
            raise ValueError(f"targets are on {targets.device}, logits on {logits.device}")
        if shape[self.dim] == 0:
            raise ValueError(f"logits of shape {tuple(shape)} have no classes in dim {self.dim}")
        if not self.temperature > 0.0:
            raise ValueError(f"temperature={self.temperature}; wanted a value above 0")
        if not self.softcap >= 0.0:
            raise ValueError(f"softcap={self.softcap}; wanted 0 (none) or above")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing={self.label_smoothing}; wanted a value in [0, 1]")
        for name in self.outputs:  # a loop: PyTorch 2.6's compiler does not know set.issuperset
            if name not in _STATISTICS:
                unknown = sorted(set(self.outputs) - _STATISTICS)
                raise ValueError(f"unknown outputs {unknown}; known: {', '.join(STATISTICS)}")
        if is_noted_negative(logits):
            self.logits = logits.resolve_neg()

    @property
    def classes(self) -> int:
        return self.logits.shape[self.dim]

    def raise_bad_target(self, row: int) -> NoReturn:
        """The error for the flat ``row`` of targets whose value is out of range."""
        value = int(self.targets.flatten()[row])
        raise ValueError(
            f"target {value} in row {row} is out of range: wanted 0 to {self.classes - 1}, "
            f"or ignore_index {self.ignore_index}"
        )


@dataclass(slots=True)
class GateCall(StatsCall):
    """A ``gate_rows`` request."""

    threshold: Tensor  # one element, floating, on the logits' device
    weights: Mapping[str, float]
    offset: Tensor | None  # targets' shape, floating
    gate_temperature: float
    p_min: float
    seed: int
    step: int | Tensor

    def __post_init__(self) -> None:
        # Not super(): slots=True makes a second class, which zero-argument super() does not know.
        StatsCall.__post_init__(self)
        self._check_threshold()
        logits, weights = self.logits, self.weights
        known = bool(weights)
        for name in weights:
            known = known and name in _WEIGHABLE
        if not known:
            weighable = ", ".join(s for s in STATISTICS if s in _WEIGHABLE)
            raise ValueError(f"weights are for {sorted(weights)}; wanted one or more of: {weighable}")
        offset = self.offset
        if offset is not None:
            if offset.shape != self.targets.shape or not offset.dtype.is_floating_point:
                raise ValueError(
                    f"offset is {offset.dtype} of shape {tuple(offset.shape)}; "
                    f"wanted a floating tensor of shape {tuple(self.targets.shape)}"
                )
            if offset.device != logits.device:
                raise ValueError(f"offset is on {offset.device}, logits on {logits.device}")
        if not self.gate_temperature >= 0.0:
            raise ValueError(f"gate_temperature={self.gate_temperature}; wanted 0 (a threshold) or above")
        if not 0.0 <= self.p_min <= 1.0:
            raise ValueError(f"p_min={self.p_min}; wanted a probability in [0, 1]")

    def _check_threshold(self) -> None:
        logits, threshold = self.logits, self.threshold
        if threshold.numel() != 1 or not threshold.dtype.is_floating_point:
            raise ValueError(
                f"threshold is {threshold.dtype} of shape {tuple(threshold.shape)}; wanted one floating element"
            )
        if not (logits.is_cpu and threshold.is_cpu) and threshold.device != logits.device:
            raise ValueError(f"threshold is on {threshold.device}, logits on {logits.device}")


@dataclass(slots=True)
class CompactCall:
    """A ``compact`` request."""

    mask: Tensor  # bool [rows]
    weight: Tensor | None  # floating [rows]
    capacity: int | None

    def __post_init__(self) -> None:
        mask, weight, capacity = self.mask, self.weight, self.capacity
        if mask.dtype is not torch.bool or mask.dim() != 1:
            raise ValueError(f"mask is {mask.dtype} of shape {tuple(mask.shape)}; wanted bool of shape [rows]")
        if weight is not None:
            if weight.shape != mask.shape or weight.dtype is not torch.float32:
                raise ValueError(
                    f"weight is {weight.dtype} of shape {tuple(weight.shape)}; "
                    f"wanted float32 of shape {tuple(mask.shape)}"
                )
            if weight.device != mask.device:
                raise ValueError(f"weight is on {weight.device}, mask on {mask.device}")
        if capacity is not None:
            _check_capacity(capacity)


def _check_capacity(capacity: int) -> None:
    if not (isinstance(capacity, int) and 0 <= capacity <= 2**31 - 1):
        raise ValueError(f"capacity={capacity!r}; wanted None or an int in [0, 2^31)")


_LABELS = frozenset((torch.int64, torch.int32, torch.bool))


@dataclass(slots=True)
class ControlCall:
    """A ``control`` request."""

    state: ControlState
    significance: Tensor  # floating [..., rows], the state's shape before rows
    setpoint: Tensor  # float32, one element a state
    labels: Tensor | None  # int64, int32 or bool, significance's shape
    ignore_index: int
    mass: Tensor | None  # floating, significance's shape
    overflow: Tensor | None  # int32, one element a state
    gate_temperature: float
    p_min: float

    def __post_init__(self) -> None:
        (values, counters), significance, setpoint = self.state, self.significance, self.setpoint
        shape = significance.shape
        if not significance.dtype.is_floating_point or not shape:
            raise ValueError(
                f"significance is {significance.dtype} of shape {tuple(shape)}; wanted floating [..., rows]"
            )
        for name, tensor, dtype, size in (
            ("values", values, torch.float32, len(CONTROL_VALUES)),
            ("counters", counters, torch.int64, len(CONTROL_COUNTERS)),
        ):
            if tensor.dtype is not dtype or tensor.shape != (*shape[:-1], size):
                raise ValueError(
                    f"state's {name} are {tensor.dtype} of shape {tuple(tensor.shape)}; "
                    f"wanted {dtype} of shape {(*shape[:-1], size)}"
                )
        states = counters.numel() // len(CONTROL_COUNTERS)
        if setpoint.dtype is not torch.float32 or setpoint.numel() != states:
            raise ValueError(
                f"setpoint is {setpoint.dtype} of shape {tuple(setpoint.shape)}; wanted float32, {states} in number"
            )
        labels, mass, overflow = self.labels, self.mass, self.overflow
        if labels is not None and (labels.shape != shape or labels.dtype not in _LABELS):
            raise ValueError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)}; "
                f"wanted int64, int32 or bool of shape {tuple(shape)}"
            )
        if mass is not None and (mass.shape != shape or not mass.dtype.is_floating_point):
            raise ValueError(f"mass is {mass.dtype} of shape {tuple(mass.shape)}; wanted floating of {tuple(shape)}")
        if overflow is not None and (overflow.dtype is not torch.int32 or overflow.numel() != states):
            raise ValueError(f"overflow is {overflow.dtype} of shape {tuple(overflow.shape)}; wanted int32")
        device = significance.device
        for other in (values, counters, setpoint, labels, mass, overflow):
            if other is not None and other.device != device:
                raise ValueError(f"a tensor is on {other.device}, significance on {device}")


def refuse_control(call: ControlCall, refuse_tensor: Callable[[Tensor], str | None]) -> str | None:
    """Why no compiled kernel serves the call, or None; ``refuse_tensor`` says it of a backend's tensors."""
    reason = refuse_tensor(call.significance) or refuse_tensor(call.state.values)
    if reason is None and call.significance.dtype is not torch.float32:
        reason = f"significance is {call.significance.dtype}; it serves float32"
    return reason or refuse_state(call.state)


def refuse_state(state: ControlState) -> str | None:
    """Why no compiled kernel moves the state, or None."""
    if state.values.is_contiguous() and state.counters.is_contiguous():
        return None
    return "a state that is not contiguous cannot be moved in place"


@dataclass(slots=True)
class Tree:
    """The tensors of a nested structure, and the way back to it."""

    tree: Any
    tensors: list[Tensor] = field(init=False)  # in the tree's order
    _leaves: list[Any] = field(init=False)
    _spec: pytree.TreeSpec | None = field(init=False)  # None: the tree has one level

    def __post_init__(self) -> None:
        tensors = _of_one_level(self.tree)
        if tensors is not None:
            self.tensors, self._spec = tensors, None
        else:
            self._leaves, self._spec = pytree.tree_flatten(self.tree)
            self.tensors = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]

    def check(self, rows: int, device: torch.device) -> None:
        """Every tensor has ``rows`` rows on ``device``."""
        on_cpu = device.type == "cpu"
        for tensor in self.tensors:
            if tensor.dim() == 0 or tensor.shape[0] != rows:
                raise ValueError(
                    f"a tensor of shape {tuple(tensor.shape)} does not fit the selection: it wants {rows} rows in dim 0"
                )
            if not (on_cpu and tensor.is_cpu) and tensor.device != device:  # is_cpu costs a fifth
                raise ValueError(f"a tensor is on {tensor.device}, the selection on {device}")

    def rebuild(self, tensors: list[Tensor]) -> Any:
        """The tree with its tensors replaced, in order; what is not a tensor stays."""
        if self._spec is None:
            kind = type(self.tree)
            if kind is dict:
                return dict(zip(self.tree, tensors, strict=True))
            return tensors[0] if isinstance(self.tree, Tensor) else kind(tensors)
        replaced = iter(tensors)
        leaves = [next(replaced) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return pytree.tree_unflatten(leaves, self._spec)


@dataclass(slots=True)
class TreeCall(Tree):
    """A ``gather_rows`` or ``scatter_rows`` request; ``rows`` is what dim 0 of every tensor must be."""

    selection: Selection
    rows: int

    def __post_init__(self) -> None:
        Tree.__post_init__(self)
        self.check(self.rows, self.selection.index.device)


@dataclass(slots=True)
class SelectCall(GateCall):
    """A ``select`` request."""

    tree: Any  # rows as the targets flattened; None for nothing
    capacity: int | None
    packing: Tree | None = field(init=False)

    def __post_init__(self) -> None:
        GateCall.__post_init__(self)
        if self.capacity is not None:
            _check_capacity(self.capacity)
        self.packing = None if self.tree is None else Tree(self.tree)
        if self.packing is not None:
            self.packing.check(self.targets.numel(), self.targets.device)


@dataclass(slots=True)
class GateStepCall(GateCall):
    """A ``gate_step`` request; ``threshold`` is ``state.values``, which begins with it."""

    capacity: int | None
    state: ControlState
    setpoint: Tensor  # float32, one element
    by_mass: bool

    def __post_init__(self) -> None:
        GateCall.__post_init__(self)
        if self.capacity is not None:
            _check_capacity(self.capacity)

    def _check_threshold(self) -> None:
        logits, (values, counters), setpoint = self.logits, self.state, self.setpoint
        if values.dtype is not torch.float32 or values.shape != _VALUES_SHAPE:
            raise ValueError(f"state's values are {values.dtype} of shape {tuple(values.shape)}; wanted one state's")
        if counters.dtype is not torch.int64 or counters.shape != _COUNTERS_SHAPE:
            raise ValueError(
                f"state's counters are {counters.dtype} of shape {tuple(counters.shape)}; wanted one state's"
            )
        if setpoint.dtype is not torch.float32 or setpoint.numel() != 1:
            raise ValueError(f"setpoint is {setpoint.dtype} of shape {tuple(setpoint.shape)}; wanted one float32")
        if not (logits.is_cpu and values.is_cpu and counters.is_cpu and setpoint.is_cpu):
            for tensor in (values, counters, setpoint):
                if tensor.device != logits.device:
                    raise ValueError(
                        f"the controller's {tuple(tensor.shape)} are on {tensor.device}, logits on {logits.device}"
                    )


_VALUES_SHAPE, _COUNTERS_SHAPE = (len(CONTROL_VALUES),), (len(CONTROL_COUNTERS),)


def _of_one_level(tree: Any) -> list[Tensor] | None:
    """The tensors of a tree that is one, or a plain tuple, list or dict of nothing else; None for any other.

    Most batches are, and the general flatten takes longer than a small gather.
    """
    if isinstance(tree, Tensor):
        return [tree]
    kind = type(tree)
    if kind is tuple or kind is list:
        leaves = list(tree)
    elif kind is dict:
        leaves = list(tree.values())
    else:
        return None
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            return None
    return leaves
