"""Gradients of the operators, the one place where they are defined.

The gradient of ``row_stats`` is ``row_stats_backward``, whose own is the reference's second derivative; the gradient
of ``gather_rows`` is ``scatter_rows``, and the reverse. A decision (``gate_rows``, ``compact``) has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_kernels import reference
from sparse_kernels._arguments import Settings, StatsCall
from sparse_kernels._operands import with_memory
from sparse_kernels._tracing import observed, unwatched
from sparse_kernels.backends import cpp_direct
from sparse_kernels.torch_library import schemas
from sparse_kernels.types import DIFFERENTIABLE

_ops = torch.ops.sparse_kernels


# row_stats


def _save_row_stats(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    logits, targets, outputs, *settings, save, inplace_backward, backend = inputs
    ctx.outputs, ctx.settings, ctx.inplace_backward, ctx.backend = outputs, settings, inplace_backward, backend
    ctx.set_materialize_grads(False)
    if not save:
        ctx.mark_non_differentiable(*output)
        return
    stats = dict(zip(outputs, output, strict=False))
    maximum, total = output[-2:]
    plain = (tensor for name, tensor in stats.items() if name not in DIFFERENTIABLE)
    ctx.mark_non_differentiable(*plain, maximum, total)
    ctx.save_for_backward(logits, targets, maximum, total, stats.get("entropy"))


def _row_stats_gradient(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    logits, *saved = ctx.saved_tensors
    by_name = dict(zip(ctx.outputs, gradients, strict=False))
    upstream = by_name.get("loss"), by_name.get("entropy")
    gradient = None
    if any(g is not None for g in upstream):
        arguments = (*saved, *upstream, *ctx.settings, ctx.backend)
        if not ctx.inplace_backward:
            gradient = _gradient_in_new_memory(logits, arguments)
        elif torch.is_grad_enabled():
            raise RuntimeError("inplace_backward: the logits are gone after it, so create_graph=True has no meaning")
        else:
            gradient = logits.detach()
            _ops.row_stats_backward_(gradient, *arguments)
    return (gradient, *[None] * 10)


def _gradient_in_new_memory(logits: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    unseen = not (torch.is_grad_enabled() or observed(logits))
    gradient: Tensor = (schemas.row_stats_backward if unseen else _ops.row_stats_backward)(logits, *arguments)
    return gradient


class _RowStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = schemas.row_stats(*inputs)
        _save_row_stats(ctx, inputs, output)
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return _row_stats_gradient(ctx, list(gradients))


row_stats: Callable[..., tuple[Tensor, ...]] = _RowStats.apply  # the operator's arguments, without the dispatcher


class _PlainRowStats(torch.autograd.Function):
    """Statistics that ``cpp_direct`` has made, with a gradient that it makes too where nothing else must see it."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, settings: Settings, results: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        *fields, maximum, total = results
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        if others := [field for field in fields[2:] if field is not None]:
            ctx.mark_non_differentiable(*others)
        ctx.save_for_backward(logits, targets, maximum, total, fields[1])
        return tuple(fields)

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor | None, of_entropy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if of_loss is None and of_entropy is None:
            return None, None, None, None
        logits, targets, maximum, total, entropy = ctx.saved_tensors
        saved = maximum, total, entropy, of_loss, of_entropy
        gradient = None
        if unwatched() and not torch.is_grad_enabled():
            gradient = cpp_direct.row_stats_backward(logits, targets, ctx.settings, *saved)
        if gradient is None:
            scoring = tuple(ctx.settings)[: len(schemas.SCORING)]
            gradient = _gradient_in_new_memory(logits, (targets, *saved, -1, *scoring, "cpp"))
        return gradient, None, None, None


# Logits, targets, settings, and what cpp_direct.row_stats returned for a gradient -> a RowStats's fields.
plain_row_stats: Callable[..., tuple[Tensor | None, ...]] = _PlainRowStats.apply


def _save_row_stats_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, targets, _maximum, _total, _entropy, loss_gradient, entropy_gradient, *settings, _backend = inputs
    ctx.settings = settings
    ctx.save_for_backward(logits, targets, loss_gradient, entropy_gradient)


def _row_stats_second_derivative(ctx: Any, direction: Tensor) -> tuple[Any, ...]:
    """Differentiate the reference's gradient in the logits.

    What the forward saved is a function of the logits, so it has no gradient of its own here.
    """
    logits, targets, *upstream_gradients = ctx.saved_tensors
    dim, *settings = ctx.settings
    further = torch.is_grad_enabled()  # a third derivative may follow

    def leaf(tensor: Tensor) -> Tensor:
        # A view in the graph, not the tensor: the upstream gradient may itself depend on the logits,
        # and that path is autograd's to follow, not ours.
        tensor = tensor.view_as(tensor) if further else tensor.detach()
        return tensor if tensor.requires_grad else tensor.requires_grad_()

    with torch.enable_grad():
        logits = leaf(logits)
        upstream = {name: leaf(g) for name, g in zip(DIFFERENTIABLE, upstream_gradients, strict=True) if g is not None}
        call = StatsCall(logits, targets, upstream, dim, Settings(*settings))
        gradient = reference.differentiable_gradient(call, logits, upstream)
        in_logits, *in_upstream = torch.autograd.grad(
            gradient, (logits, *upstream.values()), direction, create_graph=further
        )
    by_name = dict(zip(upstream, in_upstream, strict=True))
    return (in_logits, *[None] * 4, *(by_name.get(name) for name in DIFFERENTIABLE), *[None] * 6)


# gather_rows and scatter_rows


def _save_selection(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _tensors, index, count, ctx.size, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(index, count)


def _transposed(ctx: Any, name: str, gradients: list[Tensor | None]) -> list[Tensor | None]:
    index, count = ctx.saved_tensors
    present = [with_memory(g) for g in gradients if g is not None]
    unseen = not (torch.is_grad_enabled() or observed(*present))
    move = getattr(schemas if unseen else _ops, name)
    moved = iter(move(present, index, count, ctx.size, ctx.backend) if present else ())
    return [None if g is None else next(moved) for g in gradients]


def _gather_rows_gradient(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    return _transposed(ctx, "scatter_rows", gradients), None, None, None, None


def _scatter_rows_gradient(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    index, count = ctx.saved_tensors
    valid = schemas.selection_of(index, count, ctx.size).valid()
    # Padding read row 0, and its slot had no part in the forward.
    moved = (g if g is None else _zero_where_not(valid, g) for g in _transposed(ctx, "gather_rows", gradients))
    return list(moved), None, None, None, None


def _zero_where_not(valid: Tensor, rows: Tensor) -> Tensor:
    return torch.where(valid.reshape(-1, *[1] * (rows.dim() - 1)), rows, 0.0)


_MOVES = {"gather_rows": _gather_rows_gradient, "scatter_rows": _scatter_rows_gradient}


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str, index: Tensor, count: Tensor, size: int, backend: str, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.name = name
        inputs = (list(tensors), index, count, size, backend)
        output: list[Tensor] = getattr(schemas, name)(*inputs)
        _save_selection(ctx, inputs, output)
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        moved, *_ = _MOVES[ctx.name](ctx, list(gradients))
        return (*[None] * 5, *moved)


# An operator's name, index, count, size, backend and tensors, without the dispatcher.
move_rows: Callable[..., tuple[Tensor, ...]] = _Move.apply


def _register(name: str, gradient: Callable[..., Any], save: Callable[..., None]) -> None:
    torch.library.register_autograd(f"sparse_kernels::{name}", gradient, setup_context=save, lib=schemas.library)


_register("row_stats", _row_stats_gradient, _save_row_stats)
_register("row_stats_backward", _row_stats_second_derivative, _save_row_stats_backward)
for _name, _gradient in _MOVES.items():
    _register(_name, _gradient, _save_selection)
for _name in ("gate_rows", "compact"):  # not differentiable
    schemas.library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
