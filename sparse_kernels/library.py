"""Every operation as a PyTorch operator, ``torch.ops.sparse_kernels.*``: what autograd, torch.compile, torch.export
and dispatch modes see of a kernel, and the one place where gradients are defined, whichever backend computes them.

An operator's last argument names the backend that serves it, ``cpp`` or ``triton``. The reference is not one of
them: it is plain PyTorch, which all of these see through by themselves. Fake kernels give each result the shape,
dtype and strides that the backends do. Operators are checked as the public functions are, since anyone may call them.

Where only autograd must see a kernel, an ``autograd.Function`` of the same gradient calls it: through the dispatcher
and PyTorch's wrappers a small call takes four times as long.

Gradients: of ``row_stats``, ``row_stats_backward``, whose own is the reference's second derivative; of
``gather_rows``, ``scatter_rows``, and the reverse. A decision (``gate_rows``, ``compact``) has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparse_kernels import reference
from sparse_kernels.backends import BACKENDS, choose
from sparse_kernels.calls import CompactCall, ControlCall, GateCall, StatsCall, TreeCall
from sparse_kernels.rows import empty_rows
from sparse_kernels.tracing import is_noted_zeros, observed
from sparse_kernels.types import DIFFERENTIABLE, STATISTICS, ControlState, GatedRows, RowStats, Selection

_library: Any = torch.library.Library("sparse_kernels", "DEF")  # type: ignore[no-untyped-call, unused-ignore]
_ops = torch.ops.sparse_kernels
_SETTINGS = "int dim, float temperature, float softcap, float label_smoothing, int ignore_index"


def _define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> str:
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _library.impl(name, kernel, device)
    torch.library.register_fake(f"sparse_kernels::{name}", fake, lib=_library)
    return f"sparse_kernels::{name}"


def _serve(op: str, call: Any, backend: str) -> Any:
    return choose(op, call, backend)[1](call)


def _settings(call: StatsCall) -> tuple[int, float, float, float, int]:
    return call.dim, call.temperature, call.softcap, call.label_smoothing, call.ignore_index


def _in_order(outputs: Any) -> list[str]:
    """As STATISTICS has them: the same graph for every order, and for a set in every process."""
    return [name for name in STATISTICS if name in outputs]


def _floating(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype is torch.float64 else torch.float32


def _signed(value: int) -> int:
    """The low 64 bits, as an operator takes them."""
    return (value + 2**63) % 2**64 - 2**63


for _result in (RowStats, GatedRows, Selection):  # or a program that takes or returns one could not be saved
    pytree._register_namedtuple(_result, serialized_type_name=f"sparse_kernels.{_result.__name__}")


# row_stats


def row_stats(call: StatsCall, backend: str, *, gradient: bool, inplace_backward: bool) -> RowStats:
    """``call`` where it is seen; with ``gradient``, differentiable."""
    outputs = _in_order(call.outputs)
    operator = _ops.row_stats if observed(call.logits) else _differentiable_row_stats
    found = operator(
        call.logits, call.targets, outputs, *_settings(call), gradient, inplace_backward and gradient, backend
    )
    # Behind the outputs: what was saved. Cut off, as PyTorch 2.6's compiler zips equal lengths alone.
    return RowStats(**dict(zip(outputs, found[: len(outputs)], strict=True)))


def _row_stats(
    logits: Tensor, targets: Tensor, outputs: list[str], dim: int, temperature: float, softcap: float,
    label_smoothing: float, ignore_index: int, save: bool, inplace_backward: bool, backend: str,
) -> list[Tensor]:  # fmt: skip
    call = StatsCall(logits, targets, outputs, dim, temperature, softcap, label_smoothing, ignore_index)
    _, serve = choose("row_stats", call, backend)
    saved: tuple[Tensor, ...] = ()
    if save:
        stats, *saved = BACKENDS[backend].row_stats_saving(call)
    else:
        stats = serve(call)
    return [*(getattr(stats, name) for name in outputs), *saved]


def _row_stats_fake(
    logits: Tensor, targets: Tensor, outputs: list[str], dim: int, temperature: float, softcap: float,
    label_smoothing: float, ignore_index: int, save: bool, inplace_backward: bool, backend: str,
) -> list[Tensor]:  # fmt: skip
    return _statistics_like(logits, targets, [*outputs, *(("maximum", "total") if save else ())])


def _statistics_like(logits: Tensor, targets: Tensor, names: Sequence[str]) -> list[Tensor]:
    rows, floating = targets.contiguous(), _floating(logits)
    return [torch.empty_like(rows, dtype=torch.int64 if name == "argmax" else floating) for name in names]


def _save_row_stats(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    logits, targets, outputs, *settings, save, inplace_backward, backend = inputs
    ctx.outputs, ctx.settings, ctx.inplace_backward, ctx.backend = outputs, settings, inplace_backward, backend
    ctx.set_materialize_grads(False)
    if not save:
        ctx.mark_non_differentiable(*output)
        return
    found = dict(zip(outputs, output, strict=False))
    maximum, total = output[-2:]
    plain = (tensor for name, tensor in found.items() if name not in DIFFERENTIABLE)
    ctx.mark_non_differentiable(*plain, maximum, total)
    ctx.save_for_backward(logits, targets, maximum, total, found.get("entropy"))


def _row_stats_gradient(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    logits, targets, maximum, total, entropy = ctx.saved_tensors
    given = dict(zip(ctx.outputs, gradients, strict=False))
    upstream = given.get("loss"), given.get("entropy")
    gradient = None
    if any(g is not None for g in upstream):
        arguments = (targets, maximum, total, entropy, *upstream, *ctx.settings, ctx.backend)
        if not ctx.inplace_backward:
            direct = not (torch.is_grad_enabled() or observed(logits))
            gradient = (_row_stats_backward if direct else _ops.row_stats_backward)(logits, *arguments)
        elif torch.is_grad_enabled():
            raise RuntimeError("inplace_backward: the logits are gone after it, so create_graph=True has no meaning")
        else:
            gradient = logits.detach()
            _ops.row_stats_backward_(gradient, *arguments)
    return (gradient, *[None] * 10)


class _RowStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _row_stats(*inputs)
        _save_row_stats(ctx, inputs, output)
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return _row_stats_gradient(ctx, list(gradients))


_differentiable_row_stats: Callable[..., tuple[Tensor, ...]] = _RowStats.apply


_ROW_STATS_BACKWARD = (
    "Tensor targets, Tensor maximum, Tensor total, Tensor? entropy, "
    f"Tensor? loss_gradient, Tensor? entropy_gradient, {_SETTINGS}, str backend"
)


def _row_stats_backward(logits: Tensor, *arguments: Any) -> Tensor:
    gradient = torch.empty_like(logits)
    _write_gradient(gradient, logits, *arguments)
    return gradient


def _row_stats_backward_(logits: Tensor, *arguments: Any) -> None:
    _write_gradient(logits, logits, *arguments)
    torch.autograd.graph.increment_version(logits)  # whoever saved the logits must hear of it


def _write_gradient(
    out: Tensor, logits: Tensor, targets: Tensor, maximum: Tensor, total: Tensor, entropy: Tensor | None,
    loss_gradient: Tensor | None, entropy_gradient: Tensor | None, dim: int, temperature: float, softcap: float,
    label_smoothing: float, ignore_index: int, backend: str,
) -> None:  # fmt: skip
    floating = _floating(logits)
    given: dict[str, Tensor] = {}
    for name, of_row in (("loss", loss_gradient), ("entropy", entropy_gradient)):
        if of_row is not None:
            given[name] = of_row.to(floating).contiguous()
    call = StatsCall(logits, targets, given, dim, temperature, softcap, label_smoothing, ignore_index)
    if "entropy" in given and entropy is None:
        raise ValueError("the gradient of the entropy wants the entropy")
    saved = {"maximum": maximum, "total": total, "entropy": entropy}
    for name, of_row in {**saved, **{f"{key}_gradient": value for key, value in given.items()}}.items():
        if of_row is None:
            continue
        if of_row.shape != targets.shape or of_row.dtype is not floating or of_row.device != logits.device:
            raise ValueError(
                f"{name} is {of_row.dtype} of shape {tuple(of_row.shape)} on {of_row.device}; "
                f"wanted {floating} of shape {tuple(targets.shape)} on {logits.device}"
            )
    maximum, total = maximum.contiguous(), total.contiguous()
    entropy = None if entropy is None else entropy.contiguous()
    choose("row_stats", call, backend)
    BACKENDS[backend].row_stats_backward(call, maximum, total, entropy, given, out)


def _save_row_stats_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, targets, _maximum, _total, _entropy, loss_gradient, entropy_gradient, *settings, _backend = inputs
    ctx.settings = settings
    ctx.save_for_backward(logits, targets, loss_gradient, entropy_gradient)


def _row_stats_second_derivative(ctx: Any, direction: Tensor) -> tuple[Any, ...]:
    """By the reference, from the logits: what was saved of them is a function of them, so it has no gradient here."""
    logits, targets, *upstream = ctx.saved_tensors
    further = torch.is_grad_enabled()  # a third derivative is wanted

    def leaf(tensor: Tensor) -> Tensor:
        # A view in the graph, not the tensor: the upstream gradient may itself depend on the logits,
        # and that path is autograd's to follow, not ours.
        tensor = tensor.view_as(tensor) if further else tensor.detach()
        return tensor if tensor.requires_grad else tensor.requires_grad_()

    with torch.enable_grad():
        logits = leaf(logits)
        given = {name: leaf(g) for name, g in zip(DIFFERENTIABLE, upstream, strict=True) if g is not None}
        gradient = reference.differentiable_gradient(StatsCall(logits, targets, given, *ctx.settings), logits, given)
        of_logits, *of_given = torch.autograd.grad(gradient, (logits, *given.values()), direction, create_graph=further)
    found = dict(zip(given, of_given, strict=True))
    return (of_logits, *[None] * 4, *(found.get(name) for name in DIFFERENTIABLE), *[None] * 6)


torch.library.register_autograd(
    _define(
        f"row_stats(Tensor logits, Tensor targets, str[] outputs, {_SETTINGS}, "
        "bool save, bool inplace_backward, str backend) -> Tensor[]",
        _row_stats,
        _row_stats_fake,
    ),
    _row_stats_gradient,
    setup_context=_save_row_stats,
    lib=_library,
)
torch.library.register_autograd(
    _define(
        f"row_stats_backward(Tensor logits, {_ROW_STATS_BACKWARD}) -> Tensor",
        _row_stats_backward,
        lambda logits, *_: torch.empty_like(logits),
    ),
    _row_stats_second_derivative,
    setup_context=_save_row_stats_backward,
    lib=_library,
)
_define(f"row_stats_backward_(Tensor(a!) logits, {_ROW_STATS_BACKWARD}) -> ()", _row_stats_backward_, lambda *_: None)


# gate_rows


def gate_rows(call: GateCall, backend: str) -> GatedRows:
    """``call`` through the operator."""
    outputs = _in_order(call.outputs)
    step, device_step = (0, call.step) if isinstance(call.step, Tensor) else (_signed(call.step), None)
    mask, significance, invalid, *rest = _ops.gate_rows(
        call.logits, call.targets, call.threshold, list(call.weights), [float(w) for w in call.weights.values()],
        call.offset, outputs, *_settings(call), call.gate_temperature, call.p_min, _signed(call.seed),
        step, device_step, backend,
    )  # fmt: skip
    weight = None
    if call.gate_temperature:
        weight, *rest = rest
    return GatedRows(mask, significance, weight, RowStats(**dict(zip(outputs, rest, strict=True))), invalid)


def _gate_rows(
    logits: Tensor, targets: Tensor, threshold: Tensor, names: list[str], weights: list[float], offset: Tensor | None,
    outputs: list[str], dim: int, temperature: float, softcap: float, label_smoothing: float, ignore_index: int,
    gate_temperature: float, p_min: float, seed: int, step: int, device_step: Tensor | None, backend: str,
) -> list[Tensor]:  # fmt: skip
    call = GateCall(
        logits, targets, outputs, dim, temperature, softcap, label_smoothing, ignore_index, threshold,
        dict(zip(names, weights, strict=True)), offset, gate_temperature, p_min, seed,
        step if device_step is None else device_step,
    )  # fmt: skip
    mask, significance, weight, stats, invalid = _serve("gate_rows", call, backend)
    found = [getattr(stats, name) for name in outputs]
    return [mask, significance, invalid, *([] if weight is None else [weight]), *found]


def _gate_rows_fake(
    logits: Tensor, targets: Tensor, threshold: Tensor, names: list[str], weights: list[float], offset: Tensor | None,
    outputs: list[str], dim: int, temperature: float, softcap: float, label_smoothing: float, ignore_index: int,
    gate_temperature: float, p_min: float, seed: int, step: int, device_step: Tensor | None, backend: str,
) -> list[Tensor]:  # fmt: skip
    rows = targets.contiguous()
    weight = [torch.empty_like(rows, dtype=torch.float32)] if gate_temperature else []
    return [
        torch.empty_like(rows, dtype=torch.bool),
        torch.empty_like(rows, dtype=_floating(logits)),
        torch.empty((), dtype=torch.int32, device=logits.device),
        *weight,
        *_statistics_like(logits, targets, outputs),
    ]


_define(
    "gate_rows(Tensor logits, Tensor targets, Tensor threshold, str[] names, float[] weights, Tensor? offset, "
    f"str[] outputs, {_SETTINGS}, float gate_temperature, float p_min, int seed, SymInt step, Tensor? device_step, "
    "str backend) -> Tensor[]",
    _gate_rows,
    _gate_rows_fake,
)
_library.impl("gate_rows", torch.library.fallthrough_kernel, "Autograd")


# compact


def compact(call: CompactCall, backend: str) -> Selection:
    """``call`` through the operator."""
    index, weight, count, overflow = _ops.compact(call.mask, call.weight, call.capacity, backend)
    return Selection(index, weight, count, overflow, call.mask.shape[0])


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
_library.impl("compact", torch.library.fallthrough_kernel, "Autograd")


# control


def control(call: ControlCall, backend: str) -> None:
    """``call`` through the operator."""
    _ops.control(
        *call.state, call.significance, call.setpoint, call.labels, call.ignore_index, call.mass, call.overflow,
        call.gate_temperature, call.p_min, backend,
    )  # fmt: skip


def _control(values: Tensor, counters: Tensor, *arguments: Any) -> None:
    *others, backend = arguments
    _serve("control", ControlCall(ControlState(values, counters), *others), backend)


_define(
    "control(Tensor(a!) values, Tensor(b!) counters, Tensor significance, Tensor setpoint, Tensor? labels, "
    "int ignore_index, Tensor? mass, Tensor? overflow, float gate_temperature, float p_min, str backend) -> ()",
    _control,
    lambda *_: None,
)


# gather_rows and scatter_rows


def gather_rows(call: TreeCall, backend: str) -> Any:
    """``call`` where it is seen, differentiable."""
    return _move_tree("gather_rows", call, backend)


def scatter_rows(call: TreeCall, backend: str) -> Any:
    """``call`` where it is seen, differentiable."""
    return _move_tree("scatter_rows", call, backend)


def _move_tree(name: str, call: TreeCall, backend: str) -> Any:
    index, _, count, _, size = call.selection
    tensors = call.tensors
    if observed(index, *tensors):
        return call.rebuild(getattr(_ops, name)(tensors, index, count, size, backend) if tensors else [])
    return call.rebuild(list(_differentiable_move(name, index, count, size, backend, *tensors)))


def _selection(index: Tensor, count: Tensor, size: int) -> Selection:
    return Selection(index, index, count, count, size)  # weight and overflow take no part in moving rows


def _gather_rows(tensors: list[Tensor], index: Tensor, count: Tensor, size: int, backend: str) -> list[Tensor]:
    found: list[Tensor] = _serve("gather_rows", TreeCall(tensors, _selection(index, count, size), size), backend)
    return found


def _scatter_rows(tensors: list[Tensor], index: Tensor, count: Tensor, size: int, backend: str) -> list[Tensor]:
    call = TreeCall(tensors, _selection(index, count, size), index.shape[0])
    found: list[Tensor] = _serve("scatter_rows", call, backend)
    return found


def _gather_rows_fake(tensors: list[Tensor], index: Tensor, count: Tensor, size: int, backend: str) -> list[Tensor]:
    return [empty_rows(tensor, index.shape[0]) for tensor in tensors]


def _scatter_rows_fake(tensors: list[Tensor], index: Tensor, count: Tensor, size: int, backend: str) -> list[Tensor]:
    return [empty_rows(tensor, size) for tensor in tensors]


def _save_selection(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _tensors, index, count, ctx.size, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(index, count)


def _transposed(ctx: Any, name: str, gradients: list[Tensor | None]) -> list[Tensor | None]:
    index, count = ctx.saved_tensors
    present = [_with_memory(g) for g in gradients if g is not None]
    direct = not (torch.is_grad_enabled() or observed(*present))
    move = _MOVES[name][0] if direct else getattr(_ops, name)
    moved = iter(move(present, index, count, ctx.size, ctx.backend) if present else ())
    return [None if g is None else next(moved) for g in gradients]


def _with_memory(gradient: Tensor) -> Tensor:
    """Some of PyTorch's derivatives are zeros that are only noted; no kernel can read them."""
    if not is_noted_zeros(gradient):
        return gradient
    return torch.zeros(gradient.shape, dtype=gradient.dtype, device=gradient.device)


def _gather_rows_gradient(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    return _transposed(ctx, "scatter_rows", gradients), None, None, None, None


def _scatter_rows_gradient(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    index, count = ctx.saved_tensors
    valid = _selection(index, count, ctx.size).valid()
    # Padding read row 0, and its slot had no part in the forward.
    moved = (g if g is None else _zero_where_not(valid, g) for g in _transposed(ctx, "gather_rows", gradients))
    return list(moved), None, None, None, None


def _zero_where_not(valid: Tensor, rows: Tensor) -> Tensor:
    return torch.where(valid.reshape(-1, *[1] * (rows.dim() - 1)), rows, 0.0)


# What computes an operator, its fake, and its gradient.
_MOVES = {
    "gather_rows": (_gather_rows, _gather_rows_fake, _gather_rows_gradient),
    "scatter_rows": (_scatter_rows, _scatter_rows_fake, _scatter_rows_gradient),
}


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str, index: Tensor, count: Tensor, size: int, backend: str, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.name = name
        inputs = (list(tensors), index, count, size, backend)
        output = _MOVES[name][0](*inputs)
        _save_selection(ctx, inputs, output)
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        moved, *_ = _MOVES[ctx.name][2](ctx, list(gradients))
        return (*[None] * 5, *moved)


_differentiable_move: Callable[..., tuple[Tensor, ...]] = _Move.apply

for _name, (_kernel, _fake, _gradient) in _MOVES.items():
    _schema = f"{_name}(Tensor[] tensors, Tensor index, Tensor count, SymInt size, str backend) -> Tensor[]"
    torch.library.register_autograd(
        _define(_schema, _kernel, _fake), _gradient, setup_context=_save_selection, lib=_library
    )
