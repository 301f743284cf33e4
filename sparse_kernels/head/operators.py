"""Operators of the head, ``torch.ops.sparse_kernels.linear_row_stats`` and its gradient.

Which rows count depends on data, so a compiler sees an operator: its fake has full shapes. The operators call the
backends of ``row_stats`` for every chunk, and PyTorch for the products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_kernels._operands import with_memory
from sparse_kernels._settings import checked_settings
from sparse_kernels._tracing import values_readable
from sparse_kernels.head import fused
from sparse_kernels.head.call import FlatHead, HeadCall, accumulator_of, flat_head
from sparse_kernels.head.scores import SAVED, gradients, statistics
from sparse_kernels.torch_library.schemas import SCORING, library
from sparse_kernels.types import DIFFERENTIABLE, HEAD_STATISTICS

_ops = torch.ops.sparse_kernels
HEAD = (
    "Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? row_mask, "
    "float temperature, float softcap, float label_smoothing, int ignore_index, SymInt? chunk"
)
ARGUMENTS = 10  # of HEAD


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an operator for every device.

    Args:
        schema: with the operator's name.
        kernel: runs it.
        fake: makes results of the same shapes, dtypes and strides.
    """
    name = schema.split("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparse_kernels::{name}", fake, lib=library)


def register_gradient(name: str, gradient: Callable[..., Any], save: Callable[..., None]) -> None:
    """Register an operator's gradient.

    Args:
        name: of the operator.
        gradient: its gradient.
        save: keeps what that needs.
    """
    torch.library.register_autograd(f"sparse_kernels::{name}", gradient, setup_context=save, lib=library)


def refuse_second_derivative() -> None:
    """Raise if a gradient is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_row_stats has no second derivative (create_graph=True); use row_stats(F.linear(input, weight), ...)"
        )


def arguments_of(call: HeadCall) -> tuple[Any, ...]:
    """Return the arguments of ``HEAD``.

    Args:
        call: the checked call.
    """
    scoring = tuple(call.settings)[: len(SCORING)]  # PyTorch 2.6 does not compile a NamedTuple's slice
    return call.input, call.weight, call.target, call.bias, call.row_mask, *scoring, call.chunk


def head_of(arguments: Sequence[Any]) -> FlatHead:
    """Return the rows that the arguments of ``HEAD`` name.

    Args:
        arguments: of an operator, the first ``ARGUMENTS``.
    """
    input, weight, target, bias, row_mask, *scoring, chunk = arguments
    return flat_head(
        with_memory(input), with_memory(weight), target, bias, row_mask, checked_settings(*scoring), chunk
    )  # fmt: skip


def row_results(names: Sequence[str], target: Tensor, floating: torch.dtype) -> list[Tensor]:
    """Return empty per-row results in the target's shape.

    Args:
        names: of statistics.
        target: [...].
        floating: dtype of all but ``argmax``.
    """
    return [target.new_empty(target.shape, dtype=torch.int64 if name == "argmax" else floating) for name in names]


def _linear_row_stats(*arguments: Any) -> list[Tensor]:
    *given, outputs, save = arguments
    target = given[2]
    with torch.no_grad(), torch.autocast(target.device.type, enabled=False):
        results = statistics(head_of(given), outputs)
    return [results[name].view(target.shape) for name in (*outputs, *(SAVED if save else ()))]


def _linear_row_stats_fake(*arguments: Any) -> list[Tensor]:
    input, _weight, target, *_, outputs, save = arguments
    return row_results([*outputs, *(SAVED if save else ())], target, accumulator_of(input))


def _linear_row_stats_backward(*arguments: Any) -> list[Tensor]:
    given, (*saved, loss, entropy, needed) = arguments[:ARGUMENTS], arguments[ARGUMENTS:]
    target = given[2]
    with torch.no_grad(), torch.autocast(target.device.type, enabled=False):
        head = head_of(given)
        by_name = dict(zip((*SAVED, "entropy"), saved, strict=True))
        upstream = {
            name: with_memory(gradient).reshape(-1).to(head.accumulator)
            for name, gradient in zip(DIFFERENTIABLE, (loss, entropy), strict=True)
            if gradient is not None
        }
        flat = {name: values.reshape(-1) for name, values in by_name.items() if values is not None}
        found = gradients(head, flat, upstream, needed)
    input = None if found.input is None else found.input.view(given[0].shape)
    return [gradient for gradient in (input, found.weight, found.bias) if gradient is not None]


def gradients_fake(given: Sequence[Any], needed: Sequence[bool]) -> list[Tensor]:
    """Return empty gradients of input, weight and bias, those that are needed.

    Args:
        given: the arguments of ``HEAD``.
        needed: for each of the three.
    """
    operands = (given[0], given[1], given[3])
    return [x.new_empty(x.shape) for x, wanted in zip(operands, needed, strict=True) if wanted]


define(f"linear_row_stats({HEAD}, str[] outputs, bool save) -> Tensor[]", _linear_row_stats, _linear_row_stats_fake)
define(
    f"linear_row_stats_backward({HEAD}, Tensor maximum, Tensor total, Tensor? entropy, Tensor? loss_gradient, "
    "Tensor? entropy_gradient, bool[] needed) -> Tensor[]",
    _linear_row_stats_backward,
    lambda *arguments: gradients_fake(arguments[:ARGUMENTS], arguments[-1]),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *given, outputs, save = inputs
    input, weight, target, bias, row_mask, *ctx.settings = given
    ctx.outputs = outputs
    ctx.set_materialize_grads(False)
    if not save:
        ctx.mark_non_differentiable(*output)
        return
    stats = dict(zip(outputs, output, strict=False))
    ctx.mark_non_differentiable(*(t for name, t in stats.items() if name not in DIFFERENTIABLE), *output[-2:])
    ctx.save_for_backward(input, weight, target, bias, row_mask, *output[-2:], stats.get("entropy"))


def _gradient(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    refuse_second_derivative()
    *operands, maximum, total, entropy = ctx.saved_tensors
    by_name = dict(zip(ctx.outputs, upstream, strict=False))
    above = [by_name.get(name) for name in DIFFERENTIABLE]
    needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    found: list[Tensor | None] = [None, None, None]
    if any(gradient is not None for gradient in above):
        given = iter(
            _ops.linear_row_stats_backward(*operands, *ctx.settings, maximum, total, entropy, *above, needed)
        )  # fmt: skip
        found = [next(given) if wanted else None for wanted in needed]
    input, weight, bias = found
    return input, weight, None, bias, *[None] * 8


register_gradient("linear_row_stats", _gradient, _save)


def linear_row_stats(call: HeadCall) -> dict[str, Tensor]:
    """Serve ``sparse_kernels.linear_row_stats`` by its operator; results by name of statistic.

    Args:
        call: the checked call.
    """
    outputs = [name for name in HEAD_STATISTICS if name in call.outputs]
    save = any(needed_gradients(call)) and any(name in outputs for name in DIFFERENTIABLE)
    results = _ops.linear_row_stats(*arguments_of(call), outputs, save)
    # Behind the outputs: what was saved. Cut off, as PyTorch 2.6's compiler zips equal lengths alone.
    return dict(zip(outputs, results[: len(outputs)], strict=True))


# The loss of selected rows, with its gradients


def _fused_loss(*arguments: Any) -> list[Tensor]:
    given, (threshold, names, weights, divisor, needed) = arguments[:ARGUMENTS], arguments[ARGUMENTS:]
    target = given[2]
    weighed = dict(zip(names, weights, strict=True))
    with torch.no_grad(), torch.autocast(target.device.type, enabled=False):
        over = None if divisor is None else float(divisor)
        loss, mask, significance, found = fused.fused_loss(head_of(given), threshold, weighed, over, needed)
    input = None if found.input is None else found.input.view(given[0].shape)
    gradients = (x for x in (input, found.weight, found.bias) if x is not None)
    return [loss, mask.view(target.shape), significance.view(target.shape), *gradients]


def _fused_loss_fake(*arguments: Any) -> list[Tensor]:
    input, _weight, target, *_ = arguments
    return [
        input.new_empty((), dtype=accumulator_of(input)),
        target.new_empty(target.shape, dtype=torch.bool),
        target.new_empty(target.shape, dtype=torch.float32),
        *gradients_fake(arguments[:ARGUMENTS], arguments[-1]),
    ]


define(
    f"selective_linear_cross_entropy({HEAD}, Tensor? threshold, str[] names, float[] weights, Tensor? divisor, "
    "bool[] needed) -> Tensor[]",
    _fused_loss,
    _fused_loss_fake,
)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.needed, ctx.weighed = inputs[-1], bool(inputs[ARGUMENTS + 1])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[3:])


def _scaled_gradients(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    refuse_second_derivative()
    above = upstream[0]
    given = iter(ctx.saved_tensors)
    found: list[Tensor | None] = [next(given) if wanted else None for wanted in ctx.needed]
    if above is None:
        found = [None, None, None]
    elif not (values_readable(above) and float(above) == 1.0):  # most often the loss is the last of the graph
        found = [None if gradient is None else gradient * above for gradient in found]
    input, weight, bias = found
    no_list: list[None] | None = None if ctx.weighed else []  # PyTorch wants an empty list's own gradient
    return input, weight, None, bias, *[None] * 7, no_list, no_list, None, None


register_gradient("selective_linear_cross_entropy", _scaled_gradients, _save_gradients)


def fused_loss(
    call: HeadCall, threshold: Tensor | None, weights: Mapping[str, float], divisor: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of the rows above a threshold, their mask and every row's significance, by the operator.

    Args:
        call: the checked call.
        threshold: one element; None keeps all rows that count.
        weights: of each statistic in the significance.
        divisor: of the sum of losses; None for the number of kept rows.
    """
    if divisor is not None and not isinstance(divisor, Tensor):
        divisor = torch.full((), divisor, dtype=torch.float64)
    loss, mask, significance, *_ = _ops.selective_linear_cross_entropy(
        *arguments_of(call), threshold, list(weights), [float(w) for w in weights.values()], divisor,
        needed_gradients(call),
    )  # fmt: skip
    return loss, mask, significance


def needed_gradients(call: HeadCall) -> list[bool]:
    """Return which of input, weight and bias autograd follows.

    Args:
        call: the checked call.
    """
    operands = (call.input, call.weight, call.bias)
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in operands]
