"""The specification of every operation, in plain PyTorch, for any device.

No shape here depends on data except in ``compact`` without a capacity, so it runs on CPU, CUDA,
MPS and XLA and under ``torch.compile``. Every other backend is tested against it in float64.

With z the logits after softcap and temperature, m = max z, y the target, d = z - m, e = exp(d),
rest = sum_{j != y} e_j, S = rest + e_y:

    loss      = log1p(rest / e_y) where e_y >= rest, else log(S) - d_y
    entropy   = log(S) - (sum e d) / S
    grad_norm = sqrt(rest^2 + sum_{j != y} e_j^2) / S

The target is kept out of the sums because 1 - p_y and 1 - 2 p_y + sum p^2 cancel on a confident
row: a float32 loss would read 0 below 6e-8, and grad_norm would be noise below 3e-4. Both
are exact to rounding this way, and entropy adds two terms that are never negative.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_kernels import philox
from sparse_kernels.calls import CompactCall, GateCall, StatsCall, TreeCall
from sparse_kernels.control_law import control as control  # the one operation that has a file of its own
from sparse_kernels.tracing import values_readable
from sparse_kernels.types import GatedRows, RowStats, Selection


def unavailable() -> str | None:
    """Why this backend cannot be used at all: never."""
    return None


def detail() -> str:
    """What ``backend_info`` says of it."""
    return "reference, any device"


def serves(call: object) -> None:
    """Why this backend cannot serve a call: it serves all."""


refuse_row_stats = refuse_gate_rows = refuse_compact = refuse_gather_rows = refuse_scatter_rows = serves
refuse_control = serves


def transform_logits(logits: Tensor, temperature: float, softcap: float) -> Tensor:
    """z in the accumulation dtype: softcap * tanh(logits / softcap) / temperature."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return z if temperature == 1.0 else z / temperature


def bad_target(targets: Tensor, classes: int, ignore_index: int) -> Tensor:
    """bool, shape of targets: neither a class nor ignore_index."""
    return ((targets < 0) | (targets >= classes)) & (targets != ignore_index)


def row_stats(call: StatsCall) -> RowStats:
    """See ``sparse_kernels.row_stats``."""
    check_targets(call)
    return _stats(call, call.outputs)


def check_targets(call: StatsCall) -> None:
    """Raises ValueError for a target out of range, on CPU."""
    # On an accelerator this would wait for the device: there a bad target gives NaN and is counted.
    if not values_readable(call.targets):
        return
    bad = bad_target(call.targets, call.classes, call.ignore_index)
    if bad.any():
        call.raise_bad_target(int(bad.flatten().to(torch.int8).argmax()))


def _stats(call: StatsCall, outputs: Collection[str]) -> RowStats:
    logits, targets, ignore_index = call.logits, call.targets, call.ignore_index
    label_smoothing = call.label_smoothing
    if call.dim != -1:
        logits = logits.movedim(call.dim, -1)
    classes = logits.shape[-1]
    ignored = targets == ignore_index
    bad = bad_target(targets, classes, ignore_index)
    y = torch.where(ignored | bad, 0, targets).long().unsqueeze(-1)

    # An ignored row may hold anything; zeros keep 0 * NaN out of its gradient.
    logits = logits.masked_fill(ignored.unsqueeze(-1), 0.0)
    z = transform_logits(logits, call.temperature, call.softcap)
    m = z.detach().amax(-1, keepdim=True)
    d = z - m
    e = d.exp()
    # exp(-inf) = 0 must add 0, not 0 * -inf; NaN stays NaN.
    finite_d = d.masked_fill(d == -torch.inf, 0.0)
    d_y = d.gather(-1, y).squeeze(-1)
    e_y = e.gather(-1, y).squeeze(-1)
    others = e.scatter(-1, y, 0.0)
    rest = others.sum(-1)
    total = rest + e_y
    # e_y - 1 is 0 where it is used; it is there for its gradient.
    log_total = torch.where(e_y == 1.0, torch.log1p(rest + (e_y - 1.0)), total.log())
    invalid = total.isnan() | bad

    def finish(value: Tensor) -> Tensor:
        return value.masked_fill(invalid, torch.nan).masked_fill(ignored, 0.0)

    found: dict[str, Tensor] = {}
    if "loss" in outputs:
        confident = e_y >= rest
        safe_e_y = torch.where(confident, e_y, 1.0)  # keeps inf * 0 out of the unused branch's gradient
        safe_d_y = torch.where(confident, 0.0, d_y)
        loss = torch.where(confident, torch.log1p(rest / safe_e_y), log_total - safe_d_y)
        if label_smoothing:
            uniform = log_total - d.mean(-1)
            loss = (1.0 - label_smoothing) * loss + label_smoothing * uniform
        found["loss"] = finish(loss)
    if "entropy" in outputs:
        found["entropy"] = finish(log_total - (e * finite_d).sum(-1) / total)
    with torch.no_grad():
        if "grad_norm" in outputs:
            found["grad_norm"] = finish((rest.square() + others.square().sum(-1)).sqrt() / total)
        if "sum_squares" in outputs:
            found["sum_squares"] = finish((others.square().sum(-1) + e_y.square()) / total.square())
        if "max_prob" in outputs:
            found["max_prob"] = finish(1.0 / total)
        if "margin" in outputs:
            second = e.topk(2, dim=-1).values[..., 1] if classes > 1 else torch.zeros_like(total)
            found["margin"] = finish((1.0 - second) / total)
        if "argmax" in outputs:
            # The lowest index among equals, which torch.argmax does not promise on every device.
            column = torch.arange(classes, device=z.device)
            lowest = torch.where(d == 0.0, column, classes).amin(-1)
            found["argmax"] = lowest.masked_fill(invalid, -1).masked_fill(ignored, 0)
        if "logsumexp" in outputs:
            found["logsumexp"] = finish(m.squeeze(-1) + log_total)
    return RowStats(**found)


def differentiable_gradient(call: StatsCall, logits: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    """The gradient in ``logits`` of the outputs that ``given`` has upstream gradients of, itself differentiable.

    For backends whose own backward, from what their forward saved, knows no second derivative.
    """
    stats = row_stats(replace(call, logits=logits, outputs=given))
    outputs = [getattr(stats, name) for name in given]
    (gradient,) = torch.autograd.grad(outputs, logits, list(given.values()), create_graph=True)
    return gradient


def gate_rows(call: GateCall) -> GatedRows:
    """See ``sparse_kernels.gate_rows``."""
    check_targets(call)
    with torch.no_grad():
        stats = _stats(call, {*call.outputs, *call.weights})
        terms = [float(weight) * getattr(stats, name) for name, weight in call.weights.items()]
        significance = functools.reduce(torch.add, terms)
        ignored = call.targets == call.ignore_index
        if call.offset is not None:
            significance = (significance + call.offset).masked_fill(ignored, 0.0)
        mask, weight = _decide(call, significance, ignored)
    asked = RowStats(**{name: getattr(stats, name) for name in call.outputs})
    return GatedRows(mask, significance, weight, asked, significance.isnan().sum(dtype=torch.int32))


def _decide(call: GateCall, significance: Tensor, ignored: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mask, and 1/p weights when the decision is drawn. NaN compares false, so it is never kept."""
    threshold = call.threshold.reshape(())
    if call.gate_temperature == 0.0:
        return (significance > threshold) & ~ignored, None
    p = torch.sigmoid((significance - threshold) / call.gate_temperature).clamp(call.p_min, 1.0)
    u = philox.uniform(p.numel(), seed=call.seed, step=call.step, device=p.device)
    mask = (u.reshape(p.shape) < p) & ~ignored
    return mask, torch.where(mask, 1.0 / p, 0.0).to(torch.float32)


def compact(call: CompactCall) -> Selection:
    """See ``sparse_kernels.compact``."""
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
    """See ``sparse_kernels.gather_rows``."""
    return call.rebuild([gather_tensor(tensor, call.selection) for tensor in call.tensors])


def gather_tensor(tensor: Tensor, selection: Selection) -> Tensor:
    """The selected rows of one tensor."""
    if selection.size == 0:  # nothing to read, not even for padding
        return tensor.new_zeros((selection.index.shape[0], *tensor.shape[1:]))
    rows = tensor.index_select(0, selection.index)
    if not rows.requires_grad:
        return rows
    # Padding repeats row 0: it must not add to row 0's gradient.
    return torch.where(selection.valid().reshape(-1, *[1] * (rows.ndim - 1)), rows, rows.detach())


def scatter_rows(call: TreeCall) -> Any:
    """See ``sparse_kernels.scatter_rows``."""
    return call.rebuild([scatter_tensor(rows, call.selection) for rows in call.tensors])


def scatter_tensor(rows: Tensor, selection: Selection) -> Tensor:
    """One packed tensor's rows in their places. Padding goes to one row past the end, which is cut off."""
    index = torch.where(selection.valid(), selection.index, selection.size)
    out = rows.new_zeros((selection.size + 1, *rows.shape[1:]))
    return out.index_copy(0, index, rows)[: selection.size]
