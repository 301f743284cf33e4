"""The gate: scores a batch's rows, keeps those above a threshold, and moves the threshold to its target rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from sparse_kernels import GatedRows, Selection, compact, gate_rows
from sparse_training.controller import PIController
from sparse_training.errors import UserError
from sparse_training.significance import Significance


class Gate(nn.Module):
    """Selects the rows that are worth training on, about ``rate`` of them, from a model's logits.

        gate = Gate(rate=0.1, capacity=128)
        kept = gate(logits, targets)
        inputs, targets = kept.take((inputs, targets))

    With a capacity nothing waits for the device. All state is in buffers: it moves with the module and
    resumes exactly from ``state_dict()``.

    Args:
        rate: fraction of the valid rows to keep, in (0, 1]; 1 keeps all of them.
        significance: what ranks the rows; ``Significance(loss=0.7, entropy=0.3)`` by default.
        capacity: slots of a selection, whatever the batch holds; rows beyond it are dropped and counted
            in the selection's ``overflow`` and, but for the batch an automatic start keeps whole, in the
            gate's. None: as many slots as rows kept, which waits for an accelerator.
        temperature: 0 keeps what is above the threshold. Above 0, in units of significance, a row is
            drawn with probability p = sigmoid((significance - threshold) / temperature) and weighs 1/p:
            weighted sums over the kept rows are unbiased estimates of sums over all.
        p_min: least such p, so that no weight exceeds 1/p_min; below ``rate``.
        floor: least fraction of the valid rows kept: where the threshold passes fewer, the most
            significant make up the number. At most ``rate``. The controller never sees these rows.
        seed: of the draws, with the step and the row's number.
        threshold: where to start; None keeps the first batch whole and starts from what it holds.
        ignore_index, label_smoothing, dim: as in ``sparse_kernels.gate_rows``.

    Attributes:
        step: int64, calls made. invalid, overflow: int64, rows counted since the start: with NaN or +inf
            logits; selected beyond the capacity. Views of the controller's state.
        last: the ``GatedRows`` of the last call (its mask before the floor); not in the state.

    Raises:
        UserError: a setting out of its range.
    """

    _version = 2

    def __init__(
        self,
        rate: float = 0.1,
        *,
        significance: Significance | None = None,
        capacity: int | None = None,
        temperature: float = 0.0,
        p_min: float = 0.0,
        floor: float = 0.0,
        seed: int = 0,
        threshold: float | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        dim: int = -1,
    ) -> None:
        super().__init__()
        self.temperature = _number("temperature", temperature, "0 or above", lambda x: 0 <= x < math.inf)
        self.p_min = _number("p_min", p_min, "a probability, at least 0 and below 1", lambda x: 0 <= x < 1)
        self.floor = _number("floor", floor, "a fraction, at least 0 and at most 1", lambda x: 0 <= x <= 1)
        self.label_smoothing = _number("label_smoothing", label_smoothing, "in [0, 1]", lambda x: 0 <= x <= 1)
        self.controller = PIController(rate, threshold=threshold, temperature=self.temperature, p_min=self.p_min)
        self.rate = float(rate)
        self.seed = _integer("seed", seed)
        self.ignore_index = _integer("ignore_index", ignore_index)
        self.dim = _integer("dim", dim)
        self.capacity = None if capacity is None else _integer("capacity", capacity)
        if self.capacity is not None and self.capacity < 1:
            raise UserError(f"capacity={capacity}; wanted None or a number of rows, at least 1")
        if self.floor > self.rate:
            raise UserError(f"floor={floor} is above rate={rate}; wanted at most the rate, or it could never be met")
        if self.p_min and not self.temperature:
            raise UserError(f"p_min={p_min} without a temperature; wanted p_min=0, or a temperature above 0")
        if self.p_min >= self.rate:
            raise UserError(f"p_min={p_min} is not below rate={rate}; wanted less, or the rate could never be met")
        if self.floor and self.temperature:
            raise UserError(
                f"floor={floor} with temperature={temperature}; wanted one of them (rows put in by a floor have "
                "no probability to be weighted by; p_min is the floor of a drawn selection)"
            )
        if significance is None:
            significance = Significance(loss=0.7, entropy=0.3)
        elif not isinstance(significance, Significance):
            raise UserError(f"significance={significance!r}; wanted a Significance, such as Significance(loss=1.0)")
        self.significance = significance
        self._weights = significance.weights
        self.last: GatedRows | None = None

    @property
    def threshold(self) -> Tensor:
        """float32, one element: the threshold of the next call."""
        return self.controller.threshold

    @property
    def step(self) -> Tensor:
        """int64, one element: calls made."""
        return self.controller.steps

    @property
    def invalid(self) -> Tensor:
        """int64, one element: rows with NaN or +inf logits."""
        return self.controller.state().counter("invalid")

    @property
    def overflow(self) -> Tensor:
        """int64, one element: rows selected beyond the capacity."""
        return self.controller.state().counter("overflow")

    @property
    def rate_observed(self) -> Tensor:
        """float32, one element: smoothed fraction above the threshold, before floor and capacity; NaN before a call."""
        return self.controller.rate

    @property
    def saturated(self) -> Tensor:
        """int64, one element: calls at which the rate was out of reach; see ``PIController.saturation``."""
        return self.controller.saturated

    @torch.no_grad()
    def forward(
        self, logits: Tensor, targets: Tensor, *, index: Tensor | None = None, offset: Tensor | None = None
    ) -> Selection:
        """Selects among the rows of one batch and moves the threshold.

        Args:
            logits: floating [rows, classes], or any shape with the classes in ``dim``: the rows are then
                numbered in the order of the targets. Detached: a selection has no gradient.
            targets: int64 or int32, the logits' shape without ``dim``.
            index: [samples], their places in the data set; only checked, for this gate keeps no history.
            offset: floating, the targets' shape, added to the significance.

        Returns:
            Selection. Weights are 1, or 1/p with a temperature.

        Raises:
            TypeError, ValueError: tensors that do not fit together, as ``sparse_kernels.gate_rows``.
        """
        if index is not None and index.shape != targets.shape[:1]:
            raise UserError(f"index has shape {tuple(index.shape)}; wanted {tuple(targets.shape[:1])}, one a sample")
        controller = self.controller
        gated = gate_rows(
            logits.detach(), targets, controller.threshold,
            weights=self._weights, offset=offset, dim=self.dim,
            label_smoothing=self.label_smoothing, ignore_index=self.ignore_index,
            gate_temperature=self.temperature, p_min=self.p_min, seed=self.seed, step=controller.steps,
        )  # fmt: skip
        significance, labels, mask = gated.significance, targets, gated.mask
        if targets.dim() != 1:
            significance, labels, mask = significance.flatten(), labels.flatten(), mask.flatten()
        if self.floor:
            mask = self._at_least(mask, significance, (labels != self.ignore_index) & ~significance.isnan())
        weight = None if gated.weight is None else gated.weight.flatten()
        selection = compact(mask, weight=weight, capacity=self.capacity)
        # The controller counts significance above the threshold itself, so a floor cannot reach it.
        controller.update(significance, labels, ignore_index=self.ignore_index, overflow=selection.overflow)
        self.last = gated
        return selection

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Version 1 kept its own counters; the controller's were there before its packed ones.
        for old, new in (("step", "steps"), ("invalid", "invalid"), ("overflow", "overflow")):
            if f"{prefix}{old}" in state_dict:
                state_dict[f"{prefix}controller.{new}"] = state_dict.pop(f"{prefix}{old}")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _at_least(self, mask: Tensor, significance: Tensor, valid: Tensor) -> Tensor:
        """``mask``, or the floor's share of the valid rows where it keeps fewer."""
        # 1e-4 of a row: 0.1 of 30 rows is 3, not the 4 of a rounded-up product.
        wanted = torch.ceil(self.floor * valid.sum() - 1e-4)
        most = math.ceil(self.floor * mask.numel() - 1e-4)
        ranked = torch.topk(significance.masked_fill(~valid, -math.inf), most).indices
        taken = torch.arange(most, device=mask.device) < wanted
        top = torch.zeros_like(mask).scatter(0, ranked, taken) & valid
        return mask | top  # where enough is kept, the top rows are among them

    def extra_repr(self) -> str:
        weights = ", ".join(f"{name}={weight:g}" for name, weight in self.significance.weights.items())
        return f"rate={self.rate:g}, significance=({weights}), capacity={self.capacity}"


def _number(name: str, value: Any, wanted: str, fits: Callable[[float], bool]) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not fits(float(value)):  # NaN fits nothing
        raise UserError(f"{name}={value!r}; wanted {wanted}")
    return float(value)


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(f"{name}={value!r}; wanted an integer")
    return int(value)
