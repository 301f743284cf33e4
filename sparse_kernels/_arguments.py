"""Checked calls of the operations: built by the public functions, served by the backends.

This is the one place where operands and settings are checked. The checks cost host time only: they look at shapes,
dtypes and devices, never at values on a device.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from torch import Tensor

from sparse_kernels._known import Known
from sparse_kernels._moves import TreeCall as TreeCall  # so that all calls are found here
from sparse_kernels._operands import (
    check_device,
    check_statistic_weights,
    described,
    integer,
    kind,
    scalar,
    statistic_names,
    vetted,
)
from sparse_kernels._settings import MOST, bad_target
from sparse_kernels._settings import Settings as Settings  # so that whatever a call is made of is found here
from sparse_kernels._settings import checked_settings as checked_settings
from sparse_kernels._tracing import is_lazy_negative
from sparse_kernels.trees import Tree
from sparse_kernels.types import CONTROL_COUNTERS, CONTROL_VALUES, ControlState

_FLOATING = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_LABELS = frozenset((torch.int64, torch.int32, torch.bool))
_MAX_ROWS = 2**31 - 1  # that a selection is made of: its counts are int32
_STATE = (("values", torch.float32, len(CONTROL_VALUES)), ("counters", torch.int64, len(CONTROL_COUNTERS)))


@dataclass(slots=True)
class StatsCall:
    """A checked ``row_stats`` call. A copy with other tensors needs ``known=None``."""

    logits: Tensor  # [..., classes, ...], floating
    targets: Tensor  # int64 or int32, logits' shape without ``dim``
    outputs: Collection[str]
    dim: int  # -1 for the last
    settings: Settings
    known: Known | None = field(default=None, kw_only=True)  # about calls like this one

    def __post_init__(self) -> None:
        known = self.known
        if known is None or known.checked is None:
            self._check()
            if known is not None:
                known.checked = self.dim, self.outputs
        else:
            self.dim, self.outputs = known.checked

    def _check(self) -> None:
        logits = self.logits = vetted("logits", self.logits, "; use torch.as_tensor(logits)")
        given: Any = self.targets
        if not isinstance(given, Tensor) and isinstance(given, (list, tuple, np.ndarray)):
            given = torch.as_tensor(given, device=logits.device)
        targets = self.targets = vetted("targets", given)
        if logits.dtype not in _FLOATING:
            swapped = ": are `logits` and `targets` in each other's place?" if targets.dtype in _FLOATING else ""
            raise TypeError(f"`logits` must be float32, bfloat16, float16 or float64, got {logits.dtype}{swapped}")
        if targets.dtype is not torch.int64 and targets.dtype is not torch.int32:
            raise TypeError(f"`targets` must be int64 or int32 class indices, got {targets.dtype}")
        shape = logits.shape
        ndim = len(shape)
        if type(self.dim) is not int:
            self.dim = integer("dim", self.dim)
        if not -ndim <= self.dim < ndim:
            raise ValueError(f"`dim` must be a dimension of the logits, of shape {tuple(shape)}, got {self.dim}")
        if self.dim in (-1, ndim - 1):
            self.dim = -1
            rows = shape[:-1]
        else:
            self.dim %= ndim
            rows = shape[: self.dim] + shape[self.dim + 1 :]
        if targets.shape != rows:
            fits = [d for d in range(ndim) if targets.shape == shape[:d] + shape[d + 1 :]]
            raise ValueError(
                f"`targets` must have shape {tuple(rows)} for logits of shape {tuple(shape)} "
                f"with classes in dim {self.dim}, got {tuple(targets.shape)}"
                + (f"; for classes in dim {fits[0]} use dim={fits[0]}" if fits else "")
            )
        if not (logits.is_cpu and targets.is_cpu):  # is_cpu costs a fifth of a comparison of devices
            check_device("targets", targets, "the logits", logits.device)
        if shape[self.dim] == 0:
            raise ValueError(f"`logits` of shape {tuple(shape)} have no classes in dim {self.dim}")
        if self.outputs:
            self.outputs = statistic_names(self.outputs)

    def operands(self) -> list[Tensor]:
        """Return every tensor of the call."""
        return [self.logits, self.targets]

    @property
    def device(self) -> torch.device:
        return self.logits.device

    @property
    def classes(self) -> int:
        return self.logits.shape[self.dim]

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of the arithmetic and of every per-row result."""
        return torch.float64 if self.logits.dtype is torch.float64 else torch.float32

    def raise_bad_target(self, row: int) -> NoReturn:
        """Raise the error for the flat ``row`` of targets whose value is out of range."""
        raise bad_target(int(self.targets.flatten()[row]), row, self.classes, self.settings.ignore_index)


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
    weights: Mapping[str, float]  # of the statistics
    offset: Tensor | None  # targets' shape, floating

    def __post_init__(self) -> None:
        # Not super(): slots=True makes a second class, which zero-argument super() does not know.
        StatsCall.__post_init__(self)
        check_statistic_weights(self.weights)
        for name, weight in self.weights.items():
            if not -MOST <= weight <= MOST:
                raise ValueError(f"`weights` must be numbers from -{MOST:.0e} to {MOST:.0e}, got {name}={weight}")

    def _check(self) -> None:
        StatsCall._check(self)
        self._check_threshold()
        if self.offset is not None:
            offset = self.offset = vetted("offset", self.offset)
            if offset.shape != self.targets.shape or not offset.dtype.is_floating_point:
                raise ValueError(
                    f"`offset` must be floating of shape {tuple(self.targets.shape)}, got {described(offset)}"
                )
            check_device("offset", offset, "the logits", self.logits.device)
        step = self.settings.step
        if isinstance(step, Tensor) and not step.is_cpu:
            check_device("step", step, "the logits", self.logits.device)

    @property
    def step(self) -> int | Tensor:
        """The number of the draws; of a tensor the first element counts."""
        return self.settings.step

    def operands(self) -> list[Tensor]:
        """Return every tensor of the call."""
        operands = [self.logits, self.targets, self.threshold]
        if self.offset is not None:
            operands.append(self.offset)
        if isinstance(self.settings.step, Tensor):
            operands.append(self.settings.step)
        return operands

    def _check_threshold(self) -> None:
        logits = self.logits
        given: Any = self.threshold
        if isinstance(given, numbers.Real):
            given = scalar("threshold", given, self.accumulator, logits.device)
        threshold = self.threshold = vetted("threshold", given)
        if threshold.numel() != 1 or not threshold.dtype.is_floating_point:
            raise ValueError(f"`threshold` must be one floating element, got {described(threshold)}")
        if not (logits.is_cpu and threshold.is_cpu):
            check_device("threshold", threshold, "the logits", logits.device)


@dataclass(slots=True)
class CompactCall:
    """A checked ``compact`` call."""

    mask: Tensor  # bool [rows]
    weight: Tensor | None  # float32 [rows]
    capacity: int | None
    known: ClassVar[None] = None

    def __post_init__(self) -> None:
        mask = self.mask = vetted("mask", self.mask, "; use torch.as_tensor(mask)")
        if mask.dtype is not torch.bool or mask.dim() != 1:
            how = "; use mask.flatten()" if mask.dtype is torch.bool else ""
            raise ValueError(f"`mask` must be bool of shape [rows], got {described(mask)}{how}")
        if self.weight is not None:
            weight = self.weight = vetted("weight", self.weight)
            if weight.shape != mask.shape or weight.dtype is not torch.float32:
                raise ValueError(f"`weight` must be float32 of shape {tuple(mask.shape)}, got {described(weight)}")
            check_device("weight", weight, "the mask", mask.device)
        _check_countable("mask", mask)
        self.capacity = _checked_capacity(self.capacity)

    def operands(self) -> list[Tensor]:
        """Return every tensor of the call."""
        return [self.mask] if self.weight is None else [self.mask, self.weight]

    @property
    def device(self) -> torch.device:
        return self.mask.device


def _check_countable(name: str, of_rows: Tensor) -> None:
    rows = of_rows.numel()
    if isinstance(rows, int) and rows > _MAX_ROWS:  # a compiler's symbol would become a guard
        raise ValueError(f"`{name}` must have fewer than 2^31 rows to select from, got {rows}")


def _checked_capacity(capacity: Any) -> int | None:
    if capacity is None:
        return None
    slots: Any = capacity
    if not isinstance(capacity, (int, torch.SymInt)):
        slots = operator.index(capacity) if hasattr(capacity, "__index__") else -1
    if not 0 <= slots <= 2**31 - 1:
        raise ValueError(f"`capacity` must be None or an int in [0, 2^31), got {capacity!r}")
    return slots  # type: ignore[no-any-return]


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
    known: ClassVar[None] = None

    def __post_init__(self) -> None:
        significance = self.significance = vetted("significance", self.significance)
        shape = significance.shape
        if not significance.dtype.is_floating_point or not shape:
            raise ValueError(f"`significance` must be floating [..., rows], got {described(significance)}")
        check_state(self.state, shape[:-1])
        states = self.state.counters.numel() // len(CONTROL_COUNTERS)
        self.setpoint = _checked_setpoint(self.setpoint, shape[:-1], states, significance.device)
        self.labels = _optional("labels", self.labels)
        self.mass = _optional("mass", self.mass)
        self.overflow = _optional("overflow", self.overflow)
        labels, mass, overflow = self.labels, self.mass, self.overflow
        if labels is not None and (labels.shape != shape or labels.dtype not in _LABELS):
            raise ValueError(f"`labels` must be int64, int32 or bool of shape {tuple(shape)}, got {described(labels)}")
        if mass is not None and (mass.shape != shape or not mass.dtype.is_floating_point):
            raise ValueError(f"`mass` must be floating of shape {tuple(shape)}, got {described(mass)}")
        if overflow is not None and (overflow.dtype is not torch.int32 or overflow.numel() != states):
            raise ValueError(f"`overflow` must be int32 with {states} elements, got {described(overflow)}")
        operands = {
            "state.values": self.state.values, "state.counters": self.state.counters, "setpoint": self.setpoint,
            "labels": labels, "mass": mass, "overflow": overflow,
        }  # fmt: skip
        for name, operand in operands.items():
            if operand is not None:
                check_device(name, operand, "the significance", significance.device)

    def operands(self) -> list[Tensor]:
        """Return every tensor of the call."""
        optional = (self.labels, self.mass, self.overflow)
        required = [self.significance, *self.state, self.setpoint]
        return required + [tensor for tensor in optional if tensor is not None]

    @property
    def device(self) -> torch.device:
        return self.significance.device


def _optional(name: str, operand: Any) -> Tensor | None:
    return None if operand is None else vetted(name, operand)


def check_state(state: Any, shape: tuple[int, ...]) -> None:
    """Raise unless this is the state of controllers of this shape."""
    if not isinstance(state, ControlState):
        raise TypeError(f"`state` must be a ControlState, as initial_state() returns it, got {kind(state)}")
    for (name, dtype, size), tensor in zip(_STATE, state, strict=True):
        # Not vetted(): the state is written, and a negated view's values would be a copy.
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`state.{name}` must be a torch.Tensor, got {kind(tensor)}")
        if tensor.dtype is not dtype or tensor.shape != (*shape, size):
            raise ValueError(f"the state's {name} must be {dtype} of shape {(*shape, size)}, got {described(tensor)}")


def _checked_setpoint(setpoint: Any, shape: tuple[int, ...], states: int, device: torch.device) -> Tensor:
    """Return a set-point for each state; one number stands for all."""
    if not isinstance(setpoint, Tensor) and isinstance(setpoint, numbers.Real):  # the first takes a tenth of the time
        target = float(setpoint)
        if not 0.0 < target <= 1.0:
            raise ValueError(f"`setpoint` must be in (0, 1], got {target}")
        return torch.full(shape, target, dtype=torch.float32, device=device)
    tensor = vetted("setpoint", setpoint)
    if tensor.dtype is not torch.float32 or tensor.numel() != states:
        elements = "one float32 element" if states == 1 else f"float32 with {states} elements"
        raise ValueError(f"`setpoint` must be {elements}, got {described(tensor)}")
    return tensor


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
    if not (state.values.is_contiguous() and state.counters.is_contiguous()):
        return "a state that is not contiguous cannot be updated in place"
    if is_lazy_negative(state.values) or is_lazy_negative(state.counters):
        return "a state that is a negated view cannot be updated in place"
    return None


@dataclass(slots=True)
class SelectCall(GateCall):
    """A checked ``select`` call."""

    tree: Any  # rows in the order of the targets flattened; None for nothing
    capacity: int | None
    packing: Tree | None = field(init=False)

    def __post_init__(self) -> None:
        GateCall.__post_init__(self)
        _check_countable("targets", self.targets)
        self.capacity = _checked_capacity(self.capacity)
        self.packing = None if self.tree is None else Tree(self.tree, self.targets.numel(), self.targets.device)

    def operands(self) -> list[Tensor]:
        """Return every tensor of the call."""
        operands = GateCall.operands(self)
        return operands if self.packing is None else operands + self.packing.tensors


@dataclass(slots=True)
class GateStepCall(GateCall):
    """A checked ``gate_step`` call; ``threshold`` is ``state.values``, whose first element it is.

    So is ``step`` of ``state.counters``, whatever the settings say.
    """

    capacity: int | None
    state: ControlState
    setpoint: Tensor  # float32, one element
    by_mass: bool

    def __post_init__(self) -> None:
        GateCall.__post_init__(self)
        _check_countable("targets", self.targets)
        self.capacity = _checked_capacity(self.capacity)

    @property
    def step(self) -> Tensor:
        """The number of the draws: the first element."""
        return self.state.counters

    def operands(self) -> list[Tensor]:
        """Return every tensor of the call."""
        return [*GateCall.operands(self), self.state.counters, self.setpoint]

    def _check_threshold(self) -> None:
        check_state(self.state, ())
        logits, (values, counters) = self.logits, self.state
        setpoint = self.setpoint = _checked_setpoint(self.setpoint, (), 1, logits.device)
        if not (logits.is_cpu and values.is_cpu and counters.is_cpu and setpoint.is_cpu):
            for name, tensor in (("state.values", values), ("state.counters", counters), ("setpoint", setpoint)):
                check_device(name, tensor, "the logits", logits.device)
