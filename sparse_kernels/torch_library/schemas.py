"""Schemas of the operators, with the kernels and the fake kernels behind them.

Fake kernels give each result the shape, dtype and strides that the backends give it. Kernels check their arguments as
the public functions do, since anyone may call an operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_kernels._arguments import (
    CompactCall,
    ControlCall,
    GateCall,
    Settings,
    StatsCall,
    TreeCall,
    checked_settings,
)
from sparse_kernels._dispatch import BACKENDS, choose
from sparse_kernels._operands import with_memory
from sparse_kernels._row_layout import empty_rows
from sparse_kernels._tracing import mark_changed
from sparse_kernels.backends.cpp import LARGE
from sparse_kernels.memory import untouched_zeros
from sparse_kernels.types import ControlState, Selection

library: Any = torch.library.Library("sparse_kernels", "DEF")  # type: ignore[no-untyped-call, unused-ignore]


def _define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.split("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        library.impl(name, kernel, device)
    torch.library.register_fake(f"sparse_kernels::{name}", fake, lib=library)


def _floating(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype is torch.float64 else torch.float32


def _serve(op: str, call: Any, backend: str) -> Any:
    return choose(op, call, backend)[1](call)


# Settings. A schema has no tuples of mixed types, so here, and only here, they are arguments one by one.

_TYPES = {"ignore_index": "int", "seed": "int", "step": "SymInt"}  # all others: float
SCORING = Settings._fields[:4]  # temperature to ignore_index


def _schema(*names: str) -> str:
    return ", ".join(f"{_TYPES.get(name, 'float')} {name}" for name in names)


def flat_settings(settings: Settings) -> tuple[Any, ...]:
    """Return the arguments of ``_GATING``.

    Args:
        settings: the settings; seed and step are taken modulo 2^64.
    """
    *others, seed, step = settings
    number, tensor = (0, step) if isinstance(step, Tensor) else (_signed(step), None)
    return *others, _signed(seed), number, tensor


def _signed(value: int) -> int:
    """Return the low 64 bits as a signed number, which an operator takes."""
    return (value + 2**63) % 2**64 - 2**63


_SCORING = f"int dim, {_schema(*SCORING)}"
_GATING = f"int dim, {_schema(*Settings._fields)}, Tensor? device_step"


# row_stats and its gradient


def row_stats(logits: Tensor, targets: Tensor, outputs: list[str], dim: int, *arguments: Any) -> list[Tensor]:
    """Serve the operator: the outputs, then what a gradient needs if it is to be saved.

    Args:
        logits: as in ``sparse_kernels.row_stats``.
        targets: as in ``sparse_kernels.row_stats``.
        outputs: names of statistics.
        dim: the dimension of the classes.
        *arguments: the settings named by ``SCORING``, save, inplace_backward, backend.
    """
    *settings, save, _inplace_backward, backend = arguments
    call = StatsCall(logits, targets, outputs, dim, checked_settings(*settings))
    _, serve = choose("row_stats", call, backend)
    saved: tuple[Tensor, ...] = ()
    if save:
        stats, *saved = BACKENDS[backend].row_stats_saving(call)
    else:
        stats = serve(call)
    return [*(getattr(stats, name) for name in outputs), *saved]


def _row_stats_fake(logits: Tensor, targets: Tensor, outputs: list[str], *arguments: Any) -> list[Tensor]:
    save = arguments[-3]
    return _statistics_like(logits, targets, [*outputs, *(("maximum", "total") if save else ())])


def _statistics_like(logits: Tensor, targets: Tensor, names: Sequence[str]) -> list[Tensor]:
    rows, floating = targets.contiguous(), _floating(logits)
    return [torch.empty_like(rows, dtype=torch.int64 if name == "argmax" else floating) for name in names]


_ROW_STATS_BACKWARD = (
    "Tensor targets, Tensor maximum, Tensor total, Tensor? entropy, "
    f"Tensor? loss_gradient, Tensor? entropy_gradient, {_SCORING}, str backend"
)


def row_stats_backward(logits: Tensor, *arguments: Any) -> Tensor:
    """Return the gradient in the logits, in new memory.

    Args:
        logits: of the forward.
        *arguments: those of ``_ROW_STATS_BACKWARD``.
    """
    zeros = _zeros_for_idle_rows(logits, *arguments)
    gradient = torch.empty_like(logits) if zeros is None else zeros
    _write_gradient(gradient, logits, *arguments, zeroed=zeros is not None)
    return gradient


def _zeros_for_idle_rows(
    logits: Tensor, targets: Tensor, maximum: Tensor, total: Tensor, entropy: Tensor | None,
    loss_gradient: Tensor | None, entropy_gradient: Tensor | None, dim: int, *arguments: Any,
) -> Tensor | None:  # fmt: skip
    """Return memory of zeros for a gradient, much of which is that of rows without an upstream gradient; or None.

    Only the C++ backend leaves such memory as it is, and only in rows of contiguous classes.
    """
    *settings, backend = arguments
    size = logits.numel() * logits.element_size()
    if backend != "cpp" or size < LARGE or dim not in (-1, logits.dim() - 1) or not logits.is_contiguous():
        return None
    upstream = [gradient for gradient in (loss_gradient, entropy_gradient) if gradient is not None]
    if not upstream or any(gradient.shape != targets.shape for gradient in upstream):
        return None  # the second is refused where all operands are looked at
    idle = torch.stack([gradient == 0 for gradient in upstream]).all(0)
    idle |= targets == checked_settings(*settings).ignore_index
    return untouched_zeros(logits) if int(idle.sum()) * (size // idle.numel()) >= LARGE else None


def _row_stats_backward_(logits: Tensor, *arguments: Any) -> None:
    _write_gradient(logits, logits, *arguments)
    mark_changed((logits,))


def _write_gradient(
    out: Tensor, logits: Tensor, targets: Tensor, maximum: Tensor, total: Tensor, entropy: Tensor | None,
    loss_gradient: Tensor | None, entropy_gradient: Tensor | None, dim: int, *arguments: Any, zeroed: bool = False,
) -> None:  # fmt: skip
    *settings, backend = arguments
    floating = _floating(logits)
    upstream: dict[str, Tensor] = {}
    for name, gradient in (("loss", loss_gradient), ("entropy", entropy_gradient)):
        if gradient is not None:
            upstream[name] = with_memory(gradient).to(floating).contiguous()
    call = StatsCall(logits, targets, upstream, dim, checked_settings(*settings))
    if "entropy" in upstream and entropy is None:
        raise ValueError("`entropy` must be the forward's where there is an `entropy_gradient`, got None")
    saved = {"maximum": maximum, "total": total, "entropy": entropy}
    for name, tensor in {**saved, **{f"{key}_gradient": value for key, value in upstream.items()}}.items():
        if tensor is None:
            continue
        if tensor.shape != targets.shape or tensor.dtype is not floating or tensor.device != logits.device:
            raise ValueError(
                f"`{name}` must be {floating} of shape {tuple(targets.shape)} on {logits.device}, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
            )
    maximum, total = with_memory(maximum).contiguous(), with_memory(total).contiguous()
    entropy = None if entropy is None else with_memory(entropy).contiguous()
    choose("row_stats", call, backend)
    options = {"zeroed": True} if zeroed else {}
    BACKENDS[backend].row_stats_backward(call, maximum, total, entropy, upstream, out, **options)


_define(
    f"row_stats(Tensor logits, Tensor targets, str[] outputs, {_SCORING}, "
    "bool save, bool inplace_backward, str backend) -> Tensor[]",
    row_stats,
    _row_stats_fake,
)
_define(
    f"row_stats_backward(Tensor logits, {_ROW_STATS_BACKWARD}) -> Tensor",
    row_stats_backward,
    lambda logits, *_: torch.empty_like(logits),
)
_define(f"row_stats_backward_(Tensor(a!) logits, {_ROW_STATS_BACKWARD}) -> ()", _row_stats_backward_, lambda *_: None)


# gate_rows


def _gate_rows(
    logits: Tensor, targets: Tensor, threshold: Tensor, names: list[str], weights: list[float], offset: Tensor | None,
    outputs: list[str], dim: int, *arguments: Any,
) -> list[Tensor]:  # fmt: skip
    *values, device_step, backend = arguments
    if device_step is not None:
        values[-1] = device_step
    weighed = dict(zip(names, weights, strict=True))
    call = GateCall(logits, targets, outputs, dim, checked_settings(*values), threshold, weighed, offset)
    mask, significance, weight, stats, invalid = _serve("gate_rows", call, backend)
    requested = [getattr(stats, name) for name in outputs]
    return [mask, significance, invalid, *([] if weight is None else [weight]), *requested]


def _gate_rows_fake(
    logits: Tensor, targets: Tensor, threshold: Tensor, names: list[str], weights: list[float], offset: Tensor | None,
    outputs: list[str], dim: int, *arguments: Any,
) -> list[Tensor]:  # fmt: skip
    *values, _device_step, _backend = arguments
    rows = targets.contiguous()
    weight = [torch.empty_like(rows, dtype=torch.float32)] if Settings(*values).gate_temperature else []
    return [
        torch.empty_like(rows, dtype=torch.bool),
        torch.empty_like(rows, dtype=_floating(logits)),
        torch.empty((), dtype=torch.int32, device=logits.device),
        *weight,
        *_statistics_like(logits, targets, outputs),
    ]


_define(
    "gate_rows(Tensor logits, Tensor targets, Tensor threshold, str[] names, float[] weights, Tensor? offset, "
    f"str[] outputs, {_GATING}, str backend) -> Tensor[]",
    _gate_rows,
    _gate_rows_fake,
)


# compact


def _compact(mask: Tensor, weight: Tensor | None, capacity: int | None, backend: str) -> tuple[Tensor, ...]:
    selection = _serve("compact", CompactCall(mask, weight, capacity), backend)
    return selection.index, selection.weight, selection.count, selection.overflow


def _compact_fake(mask: Tensor, weight: Tensor | None, capacity: int | None, backend: str) -> tuple[Tensor, ...]:
    slots = torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity
    count = torch.empty((), dtype=torch.int32, device=mask.device)
    return (
        torch.empty(slots, dtype=torch.int64, device=mask.device),
        torch.empty(slots, dtype=torch.float32, device=mask.device),
        count,
        torch.empty_like(count),
    )


_define(
    "compact(Tensor mask, Tensor? weight, SymInt? capacity, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _compact,
    _compact_fake,
)


# control


def _control(
    values: Tensor, counters: Tensor, significance: Tensor, setpoint: Tensor, labels: Tensor | None, ignore_index: int,
    mass: Tensor | None, overflow: Tensor | None, gate_temperature: float, p_min: float, backend: str,
) -> None:  # fmt: skip
    settings = checked_settings(ignore_index=ignore_index, gate_temperature=gate_temperature, p_min=p_min)
    state = ControlState(values, counters)
    _serve("control", ControlCall(state, significance, setpoint, labels, mass, overflow, settings), backend)


_define(
    "control(Tensor(a!) values, Tensor(b!) counters, Tensor significance, Tensor setpoint, Tensor? labels, "
    f"{_schema('ignore_index')}, Tensor? mass, Tensor? overflow, {_schema('gate_temperature', 'p_min')}, "
    "str backend) -> ()",
    _control,
    lambda *_: None,
)


# gather_rows and scatter_rows


def selection_of(index: Tensor, count: Tensor, size: int) -> Selection:
    """Return a selection to move rows by; its weight and overflow take no part in that.

    Args:
        index: as in ``Selection``.
        count: as in ``Selection``.
        size: as in ``Selection``.
    """
    return Selection(index, index, count, count, size)


def gather_rows(tensors: list[Tensor], index: Tensor, count: Tensor, size: int, backend: str) -> list[Tensor]:
    """Return the selected rows of each tensor.

    Args:
        tensors: [size, ...] each.
        index: as in ``Selection``.
        count: as in ``Selection``.
        size: as in ``Selection``.
        backend: one that serves the call.
    """
    call = TreeCall(tensors, selection_of(index, count, size), size)
    packed: list[Tensor] = _serve("gather_rows", call, backend)
    return packed


def scatter_rows(tensors: list[Tensor], index: Tensor, count: Tensor, size: int, backend: str) -> list[Tensor]:
    """Return each tensor's rows in their places, zeros elsewhere.

    Args:
        tensors: [slots, ...] each.
        index: as in ``Selection``.
        count: as in ``Selection``.
        size: as in ``Selection``.
        backend: one that serves the call.
    """
    call = TreeCall(tensors, selection_of(index, count, size), index.shape[0], scatter=True)
    placed: list[Tensor] = _serve("scatter_rows", call, backend)
    return placed


def _gather_rows_fake(tensors: list[Tensor], index: Tensor, count: Tensor, size: int, backend: str) -> list[Tensor]:
    return [empty_rows(tensor, index.shape[0]) for tensor in tensors]


def _scatter_rows_fake(tensors: list[Tensor], index: Tensor, count: Tensor, size: int, backend: str) -> list[Tensor]:
    return [empty_rows(tensor, size) for tensor in tensors]


_MOVE = "(Tensor[] tensors, Tensor index, Tensor count, SymInt size, str backend) -> Tensor[]"
_define(f"gather_rows{_MOVE}", gather_rows, _gather_rows_fake)
_define(f"scatter_rows{_MOVE}", scatter_rows, _scatter_rows_fake)
