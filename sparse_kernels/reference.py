"""Backend ``torch``: the specification of every operation, in plain PyTorch, for any device.

No shape here depends on data except in ``compact`` without a capacity, so it runs on CPU, CUDA, MPS and XLA and under
``torch.compile``. Every other backend is tested against it in float64.

With z the logits after softcap and temperature, m = max z, y the target, d = z - m, e = exp(d),
rest = sum_{j != y} e_j, S = rest + e_y::

    loss      = log1p(rest / e_y) where e_y >= rest, else log(S) - d_y
    entropy   = log(S) - (sum e d) / S
    grad_norm = sqrt(rest^2 + sum_{j != y} e_j^2) / S

The target is kept out of the sums because 1 - p_y and 1 - 2 p_y + sum p^2 cancel on a confident row: a float32 loss
would read 0 below 6e-8, and grad_norm would be noise below 3e-4. This way both are exact to rounding, and entropy adds
two terms that are never negative.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_kernels import philox
from sparse_kernels._arguments import CompactCall, GateCall, StatsCall, TreeCall
from sparse_kernels._tracing import values_readable
from sparse_kernels.control_law import control as control  # the one operation that has a file of its own
from sparse_kernels.types import GatedRows, RowStats, Selection


def unavailable_reason() -> None:
    """Return why this backend cannot be used: None, it always can."""


def detail() -> str:
    """Return a description for ``backend_info``."""
    return "reference, any device"


def _no_reason(call: object) -> None:
    """Return why this backend cannot serve a call: None, it serves all."""


row_stats_unsupported_reason = gate_rows_unsupported_reason = control_unsupported_reason = _no_reason
compact_unsupported_reason = gather_rows_unsupported_reason = scatter_rows_unsupported_reason = _no_reason


def transform_logits(logits: Tensor, temperature: float, softcap: float) -> Tensor:
    """Return z = softcap * tanh(logits / softcap) / temperature, in the dtype of the sums.

    Args:
        logits: floating, any shape.
        temperature: above 0.
        softcap: 0 for none.
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return z if temperature == 1.0 else z / temperature


def bad_targets(targets: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Return a mask of the targets that are neither a class nor ``ignore_index``, bool of the targets' shape.

    Args:
        targets: int64 or int32.
        classes: the number of classes.
        ignore_index: the target of ignored rows.
    """
    return ((targets < 0) | (targets >= classes)) & (targets != ignore_index)


def row_stats(call: StatsCall) -> RowStats:
    """Serve ``sparse_kernels.row_stats``."""
    check_targets(call)
    return _stats(call, call.outputs)


def check_targets(call: StatsCall) -> None:
    """Raise ValueError for a target out of range, on CPU.

    On an accelerator this would wait for the device: there a bad target gives NaN and is counted.
    """
    if not values_readable(call.targets):
        return
    bad = bad_targets(call.targets, call.classes, call.settings.ignore_index)
    if bad.any():
        call.raise_bad_target(int(bad.flatten().to(torch.int8).argmax()))


class _Rows(NamedTuple):
    """Quantities of each row that the statistics share, [...] without the class dimension or [..., classes]."""

    m: Tensor  # max z, [...]
    d: Tensor  # z - m, [..., classes]
    e: Tensor  # exp(d), [..., classes]
    d_y: Tensor  # d of the target, [...]
    e_y: Tensor  # e of the target, [...]
    others: Tensor  # e with 0 for the target, [..., classes]
    rest: Tensor  # sum of others, [...]
    total: Tensor  # S, [...]
    log_total: Tensor  # log(S), [...]
    ignored: Tensor  # bool [...]
    invalid: Tensor  # bool [...]

    def finish(self, value: Tensor) -> Tensor:
        return value.masked_fill(self.invalid, torch.nan).masked_fill(self.ignored, 0.0)


def _rows(call: StatsCall) -> _Rows:
    logits, targets, settings = call.logits, call.targets, call.settings
    if call.dim != -1:
        logits = logits.movedim(call.dim, -1)
    ignored = targets == settings.ignore_index
    bad = bad_targets(targets, logits.shape[-1], settings.ignore_index)
    y = torch.where(ignored | bad, 0, targets).long().unsqueeze(-1)

    # An ignored row may hold anything; zeros keep 0 * NaN out of its gradient.
    logits = logits.masked_fill(ignored.unsqueeze(-1), 0.0)
    z = transform_logits(logits, settings.temperature, settings.softcap)
    m = z.detach().amax(-1, keepdim=True)
    d = z - m
    e = d.exp()
    d_y = d.gather(-1, y).squeeze(-1)
    e_y = e.gather(-1, y).squeeze(-1)
    others = e.scatter(-1, y, 0.0)
    rest = others.sum(-1)
    total = rest + e_y
    # e_y - 1 is 0 where it is used; it is there for its gradient.
    log_total = torch.where(e_y == 1.0, torch.log1p(rest + (e_y - 1.0)), total.log())
    return _Rows(m.squeeze(-1), d, e, d_y, e_y, others, rest, total, log_total, ignored, total.isnan() | bad)


def _loss(rows: _Rows, label_smoothing: float) -> Tensor:
    confident = rows.e_y >= rows.rest
    safe_e_y = torch.where(confident, rows.e_y, 1.0)  # keeps inf * 0 out of the unused branch's gradient
    safe_d_y = torch.where(confident, 0.0, rows.d_y)
    loss = torch.where(confident, torch.log1p(rows.rest / safe_e_y), rows.log_total - safe_d_y)
    if label_smoothing:
        uniform = rows.log_total - rows.d.mean(-1)
        loss = (1.0 - label_smoothing) * loss + label_smoothing * uniform
    return loss


def _entropy(rows: _Rows) -> Tensor:
    # exp(-inf) = 0 must add 0, not 0 * -inf; NaN stays NaN.
    finite_d = rows.d.masked_fill(rows.d == -torch.inf, 0.0)
    return rows.log_total - (rows.e * finite_d).sum(-1) / rows.total


def _stats(call: StatsCall, outputs: Collection[str]) -> RowStats:
    rows = _rows(call)
    classes = rows.d.shape[-1]
    stats: dict[str, Tensor] = {}
    if "loss" in outputs:
        stats["loss"] = rows.finish(_loss(rows, call.settings.label_smoothing))
    if "entropy" in outputs:
        stats["entropy"] = rows.finish(_entropy(rows))
    with torch.no_grad():
        if "grad_norm" in outputs:
            stats["grad_norm"] = rows.finish((rows.rest.square() + rows.others.square().sum(-1)).sqrt() / rows.total)
        if "sum_squares" in outputs:
            sum_squares = rows.others.square().sum(-1) + rows.e_y.square()
            stats["sum_squares"] = rows.finish(sum_squares / rows.total.square())
        if "max_prob" in outputs:
            stats["max_prob"] = rows.finish(1.0 / rows.total)
        if "margin" in outputs:
            second = rows.e.topk(2, dim=-1).values[..., 1] if classes > 1 else torch.zeros_like(rows.total)
            stats["margin"] = rows.finish((1.0 - second) / rows.total)
        if "argmax" in outputs:
            # The lowest index among equals, which torch.argmax does not promise on every device.
            column = torch.arange(classes, device=rows.d.device)
            lowest = torch.where(rows.d == 0.0, column, classes).amin(-1)
            stats["argmax"] = lowest.masked_fill(rows.invalid, -1).masked_fill(rows.ignored, 0)
        if "logsumexp" in outputs:
            stats["logsumexp"] = rows.finish(rows.m + rows.log_total)
    return RowStats(**stats)


def row_stats_saving(call: StatsCall) -> tuple[RowStats, Tensor, Tensor]:
    """Serve ``row_stats``, and return what ``row_stats_backward`` needs of each row, as the kernels do.

    Args:
        call: the call; the classes are in its last dimension.

    Returns:
        The statistics, the maximum of the logits after the softcap, and the sum of exponentials.
    """
    with torch.no_grad():
        capped = transform_logits(call.logits, 1.0, call.settings.softcap)
        maximum = capped.amax(-1)
        total = ((capped - maximum.unsqueeze(-1)) / call.settings.temperature).exp().sum(-1)
        return row_stats(call), maximum, total


def row_stats_backward(
    call: StatsCall, maximum: Tensor, total: Tensor, entropy: Tensor | None, upstream: dict[str, Tensor], out: Tensor
) -> None:
    """Write the gradient of loss and entropy in the logits to ``out``, in closed form; autograd has no part in it.

    With d = (x - maximum) / temperature, p = exp(d) / total, H the entropy, g and h the upstream gradients, s the
    label smoothing and y the target: p (g - h (log p + H)) - g s / classes - [j = y] g (1 - s), over the temperature
    and times the slope of the softcap.

    Args:
        call: the forward's call; the classes are in its last dimension.
        maximum: saved by the forward, of the targets' shape.
        total: as ``maximum``.
        entropy: the forward's; None without an upstream gradient of it.
        upstream: the upstream gradient of ``loss``, ``entropy`` or both.
        out: the logits' shape and dtype; it may be the logits.
    """
    settings, targets = call.settings, call.targets
    with torch.no_grad():
        ignored = (targets == settings.ignore_index).unsqueeze(-1)
        capped = transform_logits(call.logits, 1.0, settings.softcap)
        d = (capped - maximum.unsqueeze(-1)) / settings.temperature
        p = d.exp() / total.unsqueeze(-1)
        gradient = torch.zeros_like(p)
        if "loss" in upstream:
            g = upstream["loss"].unsqueeze(-1)
            smoothing = settings.label_smoothing
            y = targets.long().masked_fill(targets == settings.ignore_index, 0).unsqueeze(-1)
            at_target = torch.zeros_like(p).scatter(-1, y, 1.0 - smoothing)
            gradient = g * (p - at_target - smoothing / p.shape[-1])
        if "entropy" in upstream and entropy is not None:
            log_p = (d - total.unsqueeze(-1).log()).masked_fill(d == -torch.inf, 0.0)
            gradient = gradient - upstream["entropy"].unsqueeze(-1) * p * (log_p + entropy.unsqueeze(-1))
        if settings.softcap:
            gradient = gradient * (1.0 - (capped / settings.softcap).square())
        unused = ignored
        if upstream:
            unused = unused | torch.stack([g == 0.0 for g in upstream.values()]).all(0).unsqueeze(-1)
        out.copy_((gradient / settings.temperature).masked_fill(unused, 0.0))


def differentiable_gradient(call: StatsCall, logits: Tensor, upstream: Mapping[str, Tensor]) -> Tensor:
    """Return the gradient of loss and entropy in the logits, itself differentiable.

    For backends whose own backward, from what their forward saved, has no second derivative.

    Args:
        call: the call; its logits and outputs are replaced.
        logits: requires grad.
        upstream: the upstream gradient of each differentiable output, by name.
    """
    stats = row_stats(replace(call, logits=logits, outputs=upstream, known=None))
    outputs = [getattr(stats, name) for name in upstream]
    (gradient,) = torch.autograd.grad(outputs, logits, list(upstream.values()), create_graph=True)
    return gradient


def gate_rows(call: GateCall) -> GatedRows:
    """Serve ``sparse_kernels.gate_rows``."""
    check_targets(call)
    with torch.no_grad():
        # 0 times an infinite loss would be NaN. max_prob is finite, or NaN where the row is invalid.
        weights = {name: float(weight) for name, weight in call.weights.items() if weight} or {"max_prob": 0.0}
        stats = _stats(call, {*call.outputs, *weights})
        terms = [weight * getattr(stats, name) for name, weight in weights.items()]
        significance = functools.reduce(torch.add, terms)
        ignored = call.targets == call.settings.ignore_index
        if call.offset is not None:
            significance = (significance + call.offset).masked_fill(ignored, 0.0)
        mask, weight = _decide(call, significance, ignored)
    requested = RowStats(**{name: getattr(stats, name) for name in call.outputs})
    return GatedRows(mask, significance, weight, requested, significance.isnan().sum(dtype=torch.int32))


def _decide(call: GateCall, significance: Tensor, ignored: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the mask, and the weights if the decision is drawn. NaN is never kept."""
    threshold, settings = call.threshold.reshape(()), call.settings
    if settings.gate_temperature == 0.0:
        return (significance > threshold) & ~ignored, None
    p = torch.sigmoid((significance - threshold) / settings.gate_temperature).clamp(settings.p_min, 1.0)
    limit = philox.draw_limit(p)
    word = philox.words(p.numel(), seed=settings.seed, step=settings.step, device=p.device)
    mask = (word.reshape(p.shape) < limit.to(torch.int64)) & ~ignored
    return mask, torch.where(mask, 2.0**32 / limit, 0.0)


def compact(call: CompactCall) -> Selection:
    """Serve ``sparse_kernels.compact``."""
    mask, weight, capacity = call.mask, call.weight, call.capacity
    rows = mask.shape[0]
    total = mask.sum(dtype=torch.int32)
    if capacity is None:
        index = mask.nonzero().squeeze(-1)
        count, overflow = total, torch.zeros_like(total)
    else:
        # Row i goes to slot (selected rows before i); what is not kept goes to one slot past the end.
        slot = mask.cumsum(0, dtype=torch.int64) - 1  # by name: on XLA flags would be summed as flags
        slot = torch.where(mask, slot, capacity).clamp(max=capacity)
        index = torch.zeros(capacity + 1, dtype=torch.int64, device=mask.device)
        index = index.scatter(0, slot, torch.arange(rows, device=mask.device))[:capacity]
        count = total.clamp(max=capacity)
        overflow = total - count
    valid = torch.arange(index.shape[0], device=mask.device) < count
    kept = torch.ones_like(index, dtype=torch.float32)
    if weight is not None and rows:
        kept = weight.detach().index_select(0, index)
    return Selection(index, torch.where(valid, kept, 0.0), count, overflow, rows)


def gather_rows(call: TreeCall) -> Any:
    """Serve ``sparse_kernels.gather_rows``."""
    call.check_index()
    return call.rebuild([gather_tensor(tensor, call.selection) for tensor in call.tensors])


def gather_tensor(tensor: Tensor, selection: Selection) -> Tensor:
    """Return the selected rows of one tensor.

    Args:
        tensor: [selection.size, ...].
        selection: the rows.
    """
    if selection.size == 0:  # nothing to read, not even for padding
        return tensor.new_zeros((selection.index.shape[0], *tensor.shape[1:]))
    integers = _integers(tensor)
    if integers is not None:
        return integers.index_select(0, selection.index).view(tensor.dtype)
    rows = tensor.index_select(0, selection.index)
    if not rows.requires_grad:
        return rows
    # Padding repeats row 0: it must not add to row 0's gradient.
    return torch.where(selection.valid().reshape(-1, *[1] * (rows.ndim - 1)), rows, rows.detach())


# The types that PyTorch moves rows of on every device; of the others (uint16, float8) it has only some kernels.
_MOVABLE = frozenset(
    (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64, torch.complex32,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
)  # fmt: skip
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def _integers(tensor: Tensor) -> Tensor | None:
    """Return the tensor's bytes as integers, of which rows can be moved; None where its own type will do."""
    if tensor.dtype in _MOVABLE or tensor.requires_grad:  # integers would have no gradient, and nobody would notice
        return None
    return tensor.view(_INTEGERS[tensor.element_size()])


def scatter_rows(call: TreeCall) -> Any:
    """Serve ``sparse_kernels.scatter_rows``."""
    call.check_index()
    return call.rebuild([scatter_tensor(rows, call.selection) for rows in call.tensors])


def scatter_tensor(rows: Tensor, selection: Selection) -> Tensor:
    """Return one packed tensor's rows in their places, zeros elsewhere.

    Args:
        rows: [slots, ...]. Padding goes to one row past the end, which is cut off.
        selection: the rows' places.
    """
    index = torch.where(selection.valid(), selection.index, selection.size)
    integers = _integers(rows)
    if integers is not None:
        out = integers.new_zeros((selection.size + 1, *rows.shape[1:]))
        return out.index_copy(0, index, integers)[: selection.size].view(rows.dtype)
    out = rows.new_zeros((selection.size + 1, *rows.shape[1:]))
    return out.index_copy(0, index, rows)[: selection.size]
