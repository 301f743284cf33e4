"""Cross-entropy of a linear layer's logits over the rows that a gate, a quantile or a mask selects."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from sparse_kernels._operands import check_device, described, kind, number, refuse_unserved
from sparse_kernels._tracing import transformed, values_readable
from sparse_kernels.head import operators
from sparse_kernels.head.call import HeadCall, head_settings
from sparse_kernels.head.fused import weighted_sum
from sparse_kernels.head.linear import statistics_of
from sparse_kernels.types import WEIGHABLE, Selection

REDUCTIONS = ("mean_kept", "mean_valid", "sum")


@dataclass(frozen=True)
class TopFraction:
    """Selects the rows at or above a quantile of one statistic of the batch's rows.

    Rows that tie with the quantile are all kept, so more than the fraction may be; rows of NaN are not kept.

    Args:
        keep: fraction of the rows that count, in (0, 1]: the quantile is 1 - keep.
        of: the statistic, any of ``STATISTICS`` but ``argmax``. Default: entropy.

    Raises:
        TypeError: ``keep`` is no number.
        ValueError: one of them is out of range.

    Example:
        >>> selective_linear_cross_entropy(hidden, weight, target, select=TopFraction(0.2, of="loss"))
    """

    keep: float
    of: str = "entropy"

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool):
            raise TypeError(f"`keep` must be a fraction in (0, 1], got {self.keep}")
        if not 0.0 < number("keep", self.keep) <= 1.0:
            raise ValueError(f"`keep` must be in (0, 1], got {self.keep}")
        object.__setattr__(self, "keep", float(self.keep))  # a tensor, else, or NumPy's
        if self.of not in WEIGHABLE:
            raise ValueError(f"`of` must be one of {', '.join(WEIGHABLE)}, got {self.of!r}")

    def mask(self, values: Tensor, valid: Tensor) -> Tensor:
        """Return which rows are kept, bool of the values' shape.

        Args:
            values: the statistic of each row.
            valid: bool; False for rows that do not count.
        """
        if not values.numel():
            return valid
        counted = values.detach().masked_fill(~valid, torch.nan)
        return (counted >= _quantile(counted.flatten(), 1.0 - self.keep)) & valid


def _quantile(values: Tensor, q: float) -> Tensor:
    """Return ``values.nanquantile(q)``, which PyTorch 2.6 does not compile, nor 2.13 take of 2^24 values."""
    ordered = values.sort().values  # NaN last
    last = (~ordered.isnan()).sum().sub(1).clamp(min=0)
    place = torch.full_like(ordered[:1], q) * last  # in the values' dtype, as there: 0.7 of 10 is 7
    ends = torch.cat((place.floor(), place.ceil())).long().minimum(last)
    low, high = ordered.index_select(0, ends).unbind()
    return torch.lerp(low, high, place.frac())


@runtime_checkable
class RowGate(Protocol):
    """Selects rows by a weighted sum of their statistics; ``sparse_training.Gate`` is one."""

    label_smoothing: float
    significance: Any  # its ``weights``: of each statistic

    @property
    def known_threshold(self) -> Tensor | None:
        """Threshold that alone decides the next batch, one element; None if its rows must be seen first."""

    def by(self, significance: Tensor, *, valid: Tensor | None = None) -> Selection:
        """Select among the rows of a batch, and move the threshold.

        Args:
            significance: floating [rows].
            valid: bool [rows]; False for rows that do not count.
        """


class SelectiveLoss(NamedTuple):
    """Result of ``selective_linear_cross_entropy``."""

    loss: Tensor
    """The reduced loss, 0-d; differentiable in input, weight and bias."""
    mask: Tensor
    """bool [...]: the rows that are kept."""


def selective_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    select: Any,
    reduction: str | float | Tensor = "mean_kept",
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = 0.0,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int | None = -100,
    row_mask: Tensor | None = None,
    chunk: int | None = None,
    **unserved: Any,
) -> SelectiveLoss:
    """Compute the cross-entropy over selected rows of a linear layer's logits, which are never held whole.

    The loss and its gradients are those of the dense loss with every other row masked. In products of all rows with
    the weight, of which a dense head needs 3, a share r of kept rows costs

    - 1 + 2r with a gate whose threshold is known before the batch, or ``TopFraction(1.0)``: kept rows are
      differentiated at once;
    - 1 + 3r with any other ``TopFraction``, or a gate that ranks or draws: kept rows are computed again;
    - 3r with a mask or None: the other rows are not multiplied at all.

    Gradients that are taken at once are part of the forward pass, as in ``torch.nn.functional.linear_cross_entropy``.
    A float16 input always takes the second way, since the scale of a ``GradScaler`` is known in the backward alone.

    Args:
        input: as in :func:`linear_row_stats`.
        linear_weight: as in :func:`linear_row_stats`.
        target: as in :func:`linear_row_stats`.
        select: which rows to keep. A gate (``sparse_training.Gate``), which also moves its threshold; a
            ``TopFraction``; a bool mask [...]; or None for all rows.
        reduction: "mean_kept" divides by the number of kept rows, "mean_valid" by the number of rows that count, "sum"
            by nothing. A number above 0, or a tensor of one, divides the sum: the tokens of an accumulated batch, say.
            Draws of a gate weigh 1/p in the sum, and "mean_kept" divides by the sum of these weights. Without any row
            the loss is 0. Default: "mean_kept".
        linear_bias: [classes]. Default: none.
        temperature: divides the logits; above 0. Default: 1.
        softcap: bound of the scaled logits, by tanh; 0 (the default) or None for none.
        logit_scale: multiplies the logits before the softcap; above 0. Default: 1.
        label_smoothing: in [0, 1]; a gate must have the same. Default: 0.
        ignore_index: target of the rows that do not count; None for no such target. Default: -100.
        row_mask: bool [...]; False for further rows that do not count. Default: none.
        chunk: as in :func:`linear_row_stats`. Default: chosen.

    Returns:
        SelectiveLoss. The loss is float32, or float64 for a float64 input.

    Raises:
        TypeError: as :func:`linear_row_stats`, and a selection or a reduction of another kind.
        ValueError: as :func:`linear_row_stats`, an unknown reduction, a mask of another shape or device, or a gate of
            another label smoothing.
        RuntimeError: from the backward, with create_graph=True.

    Example:
        >>> gate = Gate(rate=0.2)
        >>> loss, kept = selective_linear_cross_entropy(hidden, head.weight, target, select=gate)
        >>> loss.backward()
    """
    if unserved:
        refuse_unserved(selective_linear_cross_entropy, unserved)
    _check_reduction(reduction)
    settings = head_settings(temperature, softcap, logit_scale, label_smoothing, ignore_index)
    call = HeadCall(input, linear_weight, target, linear_bias, ("loss",), settings, row_mask, chunk)
    gate = _checked_gate(select, call)
    valid = _valid(call)
    if isinstance(select, Tensor):
        call.row_mask = select if call.row_mask is None else select & call.row_mask
    threshold = None if gate is None else gate.known_threshold
    needs_all = threshold is None if gate is not None else isinstance(select, TopFraction) and select.keep < 1.0
    if needs_all or call.input.dtype is torch.float16 or transformed():
        return _scored_first(call, select, gate, valid, reduction)
    call.refuse_subclasses()
    weights = {select.of: 1.0} if isinstance(select, TopFraction) else {} if gate is None else gate.significance.weights
    loss, mask, significance = operators.fused_loss(call, threshold, weights, _divisor(reduction, valid))
    if gate is not None:
        gate.by(significance.flatten(), valid=valid.flatten())
    return SelectiveLoss(loss, mask)


def _checked_gate(select: Any, call: HeadCall) -> RowGate | None:
    """Return the gate among the kinds of selections, or None; raise for what is none of them."""
    if select is None or isinstance(select, TopFraction):
        return None
    if isinstance(select, Tensor):
        if select.dtype is not torch.bool or select.shape != call.target.shape:
            raise ValueError(f"`select` must be bool of shape {tuple(call.target.shape)}, got {described(select)}")
        check_device("select", select, "`input`", call.input.device)
        return None
    if not isinstance(select, RowGate):
        raise TypeError(f"`select` must be a Gate, a TopFraction, a bool mask or None, got {kind(select)}")
    if select.label_smoothing != call.settings.label_smoothing:
        raise ValueError(
            f"`label_smoothing` must be the gate's, {select.label_smoothing}, got {call.settings.label_smoothing}"
        )
    return select


def _check_reduction(reduction: Any) -> None:
    if isinstance(reduction, str):
        if reduction not in REDUCTIONS:
            raise ValueError(f"`reduction` must be one of {', '.join(REDUCTIONS)}, or a number, got {reduction!r}")
        return
    if isinstance(reduction, Tensor):
        unfit = reduction.dtype is torch.bool or reduction.dtype.is_complex or reduction.requires_grad
        if unfit or reduction.numel() != 1:
            what = described(reduction) + " that requires a gradient" * reduction.requires_grad
            raise TypeError(f"`reduction` must be a name, or one real number without a gradient, got {what}")
        if not values_readable(reduction):
            return
    if isinstance(reduction, bool) or not 0.0 < number("reduction", reduction) < math.inf:
        raise ValueError(f"`reduction` must be a name or a number above 0, got {reduction!r}")


def _divisor(reduction: str | float | Tensor, valid: Tensor) -> Tensor | float | None:
    """Return what the sum of losses is divided by; None for the number of kept rows."""
    if isinstance(reduction, Tensor):
        return reduction.reshape(()).to(valid.device)
    if not isinstance(reduction, str):
        return float(reduction)
    return {"mean_kept": None, "sum": 1.0}[reduction] if reduction != "mean_valid" else _number_of(valid)


def _valid(call: HeadCall) -> Tensor:
    valid = call.target != call.settings.ignore_index
    return valid if call.row_mask is None else valid & call.row_mask


def _number_of(weight: Tensor) -> Tensor:
    """Return the sum of weights or of a mask, 1 where it is 0."""
    total = weight.sum()
    return torch.where(total > 0, total, 1).float()


def _scored_first(
    call: HeadCall, select: Any, gate: RowGate | None, valid: Tensor, reduction: str | float | Tensor
) -> SelectiveLoss:
    """Serve a selection that needs the whole batch's statistics: rows that are kept are computed again."""
    weights: Mapping[str, float] = {} if gate is None else gate.significance.weights
    call.outputs = ("loss", *weights, *((select.of,) if isinstance(select, TopFraction) else ()))
    stats = statistics_of(call)
    weight: Tensor | None = None
    if isinstance(select, TopFraction):
        mask = select.mask(getattr(stats, select.of), valid)
    elif gate is not None:
        values = {name: getattr(stats, name).detach().flatten() for name in weights}
        selection = gate.by(weighted_sum(values, weights), valid=valid.flatten())
        row = torch.zeros(valid.numel(), device=valid.device).index_add(0, selection.index, selection.weight)
        weight = row.view(valid.shape)
        mask = weight > 0
    else:
        mask = _valid(call)
    assert stats.loss is not None
    loss = torch.where(mask, stats.loss if weight is None else stats.loss * weight, 0.0).sum()
    divisor = _divisor(reduction, valid)
    return SelectiveLoss(loss / (_number_of(mask if weight is None else weight) if divisor is None else divisor), mask)
