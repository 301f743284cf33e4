"""Checked calls of the operations: built by the public functions, served by the backends.

This is the one place where operands and settings are checked. The checks cost host time only: they look at shapes,
dtypes and devices, never at values on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparse_kernels._tracing import dynamo_compiling, is_lazy_negative
from sparse_kernels.types import CONTROL_COUNTERS, CONTROL_VALUES, STATISTICS, WEIGHABLE, ControlState, Selection

_FLOATING = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_LABELS = frozenset((torch.int64, torch.int32, torch.bool))
_STATISTICS = frozenset(STATISTICS)
_WEIGHABLE = frozenset(WEIGHABLE)
_STATE = (("values", torch.float32, len(CONTROL_VALUES)), ("counters", torch.int64, len(CONTROL_COUNTERS)))


class Settings(NamedTuple):
    """Numbers that hold for every row of a call, passed whole from the operations to the kernels.

    csrc/bindings/settings.h reads the fields in this order; torch_library takes its schemas from them.
    """

    temperature: float = 1.0  # in [_LEAST, _MOST]
    softcap: float = 0.0  # the same, or 0: none
    label_smoothing: float = 0.0  # in [0, 1]
    ignore_index: int = -100
    gate_temperature: float = 0.0  # the same, or 0: a threshold without draws
    p_min: float = 0.0  # in [0, 1]
    seed: int = 0  # of the draws, modulo 2^64
    step: int | Tensor = 0  # of the draws, modulo 2^64; a tensor has one int64 element


_new_tuple = tuple.__new__
_LEAST, _MOST = 1e-30, 1e30  # of a number that scales others: far from the ends of float32, where products overflow


def _refuse_scale(name: str, rule: str, value: float) -> NoReturn:
    limits = f", from {_LEAST:.0e} to {_MOST:.0e}" if value > 0.0 else ""
    raise ValueError(f"`{name}` must be {rule}{limits}, got {value}")


def checked_settings(
    temperature: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    gate_temperature: float = 0.0,
    p_min: float = 0.0,
    seed: int = 0,
    step: int | Tensor = 0,
) -> Settings:
    """Return these settings, or raise the error that names the first one out of range."""
    if not _LEAST <= temperature <= _MOST:
        _refuse_scale("temperature", "above 0", temperature)
    if softcap != 0.0 and not _LEAST <= softcap <= _MOST:
        _refuse_scale("softcap", "0 (none) or above", softcap)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"`label_smoothing` must be in [0, 1], got {label_smoothing}")
    if gate_temperature != 0.0 and not _LEAST <= gate_temperature <= _MOST:
        _refuse_scale("gate_temperature", "0 (a threshold) or above", gate_temperature)
    if not 0.0 <= p_min <= 1.0:
        raise ValueError(f"`p_min` must be a probability in [0, 1], got {p_min}")
    values = temperature, softcap, label_smoothing, ignore_index, gate_temperature, p_min, seed, step
    # A named tuple's constructor takes longer than all of the above; a compiler must see it.
    return Settings(*values) if dynamo_compiling() else _new_tuple(Settings, values)


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _check_device(name: str, tensor: Tensor, of: str, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"`{name}` must be on {device} as {of}, got {tensor.device}")


@dataclass(slots=True)
class StatsCall:
    """A checked ``row_stats`` call."""

    logits: Tensor  # [..., classes, ...], floating
    targets: Tensor  # int64 or int32, logits' shape without ``dim``
    outputs: Collection[str]
    dim: int  # -1 for the last
    settings: Settings

    def __post_init__(self) -> None:
        logits, targets = self.logits, self.targets
        if logits.dtype not in _FLOATING:
            raise TypeError(f"`logits` must be float32, bfloat16, float16 or float64, got {logits.dtype}")
        if targets.dtype is not torch.int64 and targets.dtype is not torch.int32:
            raise TypeError(f"`targets` must be int64 or int32 class indices, got {targets.dtype}")
        shape = logits.shape
        ndim = len(shape)
        if not -ndim <= self.dim < ndim:
            raise ValueError(f"`dim` must be a dimension of the logits, of shape {tuple(shape)}, got {self.dim}")
        if self.dim in (-1, ndim - 1):
            self.dim = -1
            rows = shape[:-1]
        else:
            self.dim %= ndim
            rows = shape[: self.dim] + shape[self.dim + 1 :]
        if targets.shape != rows:
            raise ValueError(
                f"`targets` must have shape {tuple(rows)} for logits of shape {tuple(shape)} "
                f"with classes in dim {self.dim}, got {tuple(targets.shape)}"
            )
        if not (logits.is_cpu and targets.is_cpu):  # is_cpu costs a fifth of a comparison of devices
            _check_device("targets", targets, "the logits", logits.device)
        if shape[self.dim] == 0:
            raise ValueError(f"`logits` of shape {tuple(shape)} have no classes in dim {self.dim}")
        for name in self.outputs:  # a loop: PyTorch 2.6's compiler does not know set.issuperset
            if name not in _STATISTICS:
                unknown = sorted(set(self.outputs) - _STATISTICS)
                raise ValueError(f"`outputs` must be among {', '.join(STATISTICS)}; got {unknown}")
        if is_lazy_negative(logits):
            self.logits = logits.resolve_neg()

    @property
    def classes(self) -> int:
        return self.logits.shape[self.dim]

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of the arithmetic and of every per-row result."""
        return torch.float64 if self.logits.dtype is torch.float64 else torch.float32

    def raise_bad_target(self, row: int) -> NoReturn:
        """Raise the error for the flat ``row`` of targets whose value is out of range."""
        value = int(self.targets.flatten()[row])
        raise ValueError(
            f"target {value} in row {row} is out of range: it must be in [0, {self.classes - 1}], "
            f"or `ignore_index`, {self.settings.ignore_index}"
        )


def check_inplace_backward(logits: Tensor) -> None:
    """Raise unless a gradient may take the memory of these logits."""
    if logits.is_leaf:
        raise ValueError(
            "`inplace_backward` must be False for logits that are a leaf that requires grad: their values would be lost"
        )
    extent = 1  # elements that the dimensions of smaller stride reach over
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1:
            if stride < extent:
                raise ValueError(
                    "`inplace_backward` must be False for logits that overlap themselves in memory, "
                    f"got shape {tuple(logits.shape)} and strides {logits.stride()}"
                )
            extent = stride * (size - 1) + extent


@dataclass(slots=True)
class GateCall(StatsCall):
    """A checked ``gate_rows`` call."""

    threshold: Tensor  # one element, floating, on the logits' device
    weights: Mapping[str, float]
    offset: Tensor | None  # targets' shape, floating

    def __post_init__(self) -> None:
        # Not super(): slots=True makes a second class, which zero-argument super() does not know.
        StatsCall.__post_init__(self)
        self._check_threshold()
        weights, offset = self.weights, self.offset
        known = bool(weights)
        for name in weights:
            known = known and name in _WEIGHABLE
        if not known:
            raise ValueError(f"`weights` must name one or more of {', '.join(WEIGHABLE)}; got {sorted(weights)}")
        for name, weight in weights.items():
            if not -_MOST <= weight <= _MOST:
                raise ValueError(f"`weights` must be numbers from -{_MOST:.0e} to {_MOST:.0e}, got {name}={weight}")
        if offset is not None:
            if offset.shape != self.targets.shape or not offset.dtype.is_floating_point:
                raise ValueError(
                    f"`offset` must be floating of shape {tuple(self.targets.shape)}, got {_described(offset)}"
                )
            _check_device("offset", offset, "the logits", self.logits.device)

    def _check_threshold(self) -> None:
        logits, threshold = self.logits, self.threshold
        if threshold.numel() != 1 or not threshold.dtype.is_floating_point:
            raise ValueError(f"`threshold` must be one floating element, got {_described(threshold)}")
        if not (logits.is_cpu and threshold.is_cpu):
            _check_device("threshold", threshold, "the logits", logits.device)


@dataclass(slots=True)
class CompactCall:
    """A checked ``compact`` call."""

    mask: Tensor  # bool [rows]
    weight: Tensor | None  # float32 [rows]
    capacity: int | None

    def __post_init__(self) -> None:
        mask, weight = self.mask, self.weight
        if mask.dtype is not torch.bool or mask.dim() != 1:
            raise ValueError(f"`mask` must be bool of shape [rows], got {_described(mask)}")
        if weight is not None:
            if weight.shape != mask.shape or weight.dtype is not torch.float32:
                raise ValueError(f"`weight` must be float32 of shape {tuple(mask.shape)}, got {_described(weight)}")
            _check_device("weight", weight, "the mask", mask.device)
        _check_capacity(self.capacity)


def _check_capacity(capacity: int | None) -> None:
    if capacity is not None and not (isinstance(capacity, int) and 0 <= capacity <= 2**31 - 1):
        raise ValueError(f"`capacity` must be None or an int in [0, 2^31), got {capacity!r}")


@dataclass(slots=True)
class ControlCall:
    """A checked ``control`` call."""

    state: ControlState
    significance: Tensor  # floating [..., rows], the state's shape before rows
    setpoint: Tensor  # float32, one element a state
    labels: Tensor | None  # int64, int32 or bool, significance's shape
    mass: Tensor | None  # floating, significance's shape
    overflow: Tensor | None  # int32, one element a state
    settings: Settings  # ignore_index, gate_temperature and p_min alone count

    def __post_init__(self) -> None:
        (values, counters), significance, setpoint = self.state, self.significance, self.setpoint
        shape = significance.shape
        if not significance.dtype.is_floating_point or not shape:
            raise ValueError(f"`significance` must be floating [..., rows], got {_described(significance)}")
        for (name, dtype, size), tensor in zip(_STATE, self.state, strict=True):
            if tensor.dtype is not dtype or tensor.shape != (*shape[:-1], size):
                raise ValueError(
                    f"the state's {name} must be {dtype} of shape {(*shape[:-1], size)}, got {_described(tensor)}"
                )
        states = counters.numel() // len(CONTROL_COUNTERS)
        if setpoint.dtype is not torch.float32 or setpoint.numel() != states:
            raise ValueError(f"`setpoint` must be float32 with {states} elements, got {_described(setpoint)}")
        labels, mass, overflow = self.labels, self.mass, self.overflow
        if labels is not None and (labels.shape != shape or labels.dtype not in _LABELS):
            raise ValueError(f"`labels` must be int64, int32 or bool of shape {tuple(shape)}, got {_described(labels)}")
        if mass is not None and (mass.shape != shape or not mass.dtype.is_floating_point):
            raise ValueError(f"`mass` must be floating of shape {tuple(shape)}, got {_described(mass)}")
        if overflow is not None and (overflow.dtype is not torch.int32 or overflow.numel() != states):
            raise ValueError(f"`overflow` must be int32 with {states} elements, got {_described(overflow)}")
        operands = {
            "state.values": values, "state.counters": counters, "setpoint": setpoint, "labels": labels, "mass": mass,
            "overflow": overflow,
        }  # fmt: skip
        for name, operand in operands.items():
            if operand is not None:
                _check_device(name, operand, "the significance", significance.device)


TensorReason = Callable[[Tensor], str | None]


def control_unsupported_reason(call: ControlCall, tensor_reason: TensorReason) -> str | None:
    """Return why no compiled kernel serves the call, or None.

    Args:
        call: the call.
        tensor_reason: the same question for one tensor, asked of a backend.
    """
    reason = tensor_reason(call.significance) or tensor_reason(call.state.values)
    if reason is None and call.significance.dtype is not torch.float32:
        reason = f"significance is {call.significance.dtype}; it serves float32"
    return reason or state_unsupported_reason(call.state)


def state_unsupported_reason(state: ControlState) -> str | None:
    """Return why no compiled kernel updates the state, or None."""
    if state.values.is_contiguous() and state.counters.is_contiguous():
        return None
    return "a state that is not contiguous cannot be updated in place"


def first_unsupported_reason(tensors: list[Tensor], tensor_reason: TensorReason) -> str | None:
    """Return the reason of the first tensor that a backend does not take, or None."""
    for tensor in tensors:
        reason = tensor_reason(tensor)
        if reason is not None:
            return reason
    return None


@dataclass(slots=True)
class Tree:
    """Tensors of a nested structure, and the way back to it."""

    tree: Any
    tensors: list[Tensor] = field(init=False)  # in the tree's order
    _leaves: list[Any] = field(init=False)
    _spec: pytree.TreeSpec | None = field(init=False)  # None: the tree has one level

    def __post_init__(self) -> None:
        tensors = _tensors_of_one_level(self.tree)
        if tensors is not None:
            self.tensors, self._spec = tensors, None
        else:
            self._leaves, self._spec = pytree.tree_flatten(self.tree)
            self.tensors = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]

    def check(self, rows: int, device: torch.device) -> None:
        """Raise unless every tensor has ``rows`` rows on ``device``."""
        on_cpu = device.type == "cpu"
        for tensor in self.tensors:
            if tensor.dim() == 0 or tensor.shape[0] != rows:
                raise ValueError(
                    f"every tensor of `tree` must have {rows} rows in dim 0, got one of shape {tuple(tensor.shape)}"
                )
            if not (on_cpu and tensor.is_cpu):
                _check_device("tree", tensor, "the selection", device)

    def rebuild(self, tensors: list[Tensor]) -> Any:
        """Return the tree with its tensors replaced, in order; all other leaves stay."""
        if self._spec is None:
            kind = type(self.tree)
            if kind is dict:
                return dict(zip(self.tree, tensors, strict=True))
            return tensors[0] if isinstance(self.tree, Tensor) else kind(tensors)
        replaced = iter(tensors)
        leaves = [next(replaced) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return pytree.tree_unflatten(leaves, self._spec)


def _tensors_of_one_level(tree: Any) -> list[Tensor] | None:
    """Return the tensors of a tensor, or of a plain tuple, list or dict of nothing else; None for any other tree.

    Most batches are one of these, and the general flatten takes longer than a small gather.
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


@dataclass(slots=True)
class TreeCall(Tree):
    """A checked ``gather_rows`` or ``scatter_rows`` call."""

    selection: Selection
    rows: int  # required of every tensor in dim 0

    def __post_init__(self) -> None:
        Tree.__post_init__(self)
        self.check(self.rows, self.selection.index.device)


@dataclass(slots=True)
class SelectCall(GateCall):
    """A checked ``select`` call."""

    tree: Any  # rows in the order of the targets flattened; None for nothing
    capacity: int | None
    packing: Tree | None = field(init=False)

    def __post_init__(self) -> None:
        GateCall.__post_init__(self)
        _check_capacity(self.capacity)
        self.packing = None if self.tree is None else Tree(self.tree)
        if self.packing is not None:
            self.packing.check(self.targets.numel(), self.targets.device)


@dataclass(slots=True)
class GateStepCall(GateCall):
    """A checked ``gate_step`` call; ``threshold`` is ``state.values``, whose first element it is."""

    capacity: int | None
    state: ControlState
    setpoint: Tensor  # float32, one element
    by_mass: bool

    def __post_init__(self) -> None:
        GateCall.__post_init__(self)
        _check_capacity(self.capacity)

    def _check_threshold(self) -> None:
        logits, (values, counters), setpoint = self.logits, self.state, self.setpoint
        for (name, dtype, size), tensor in zip(_STATE, self.state, strict=True):
            if tensor.dtype is not dtype or tensor.shape != (size,):
                raise ValueError(f"the state's {name} must be {dtype} of shape {(size,)}, got {_described(tensor)}")
        if setpoint.dtype is not torch.float32 or setpoint.numel() != 1:
            raise ValueError(f"`setpoint` must be one float32 element, got {_described(setpoint)}")
        if not (logits.is_cpu and values.is_cpu and counters.is_cpu and setpoint.is_cpu):
            for name, tensor in (("state.values", values), ("state.counters", counters), ("setpoint", setpoint)):
                _check_device(name, tensor, "the logits", logits.device)
