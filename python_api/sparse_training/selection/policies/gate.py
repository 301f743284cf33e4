"""Rows above a threshold, or drawn around it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparse_kernels import Selection, row_stats
from sparse_training import padding
from sparse_training.criterion import Criterion, targets_are_classes
from sparse_training.errors import UserError
from sparse_training.gate.gate import Gate
from sparse_training.selection.policies.base import Policy
from sparse_training.selection.types import Batch, Scores, SelectedBatch, WeightedIndices


class GatePolicy(Policy):
    """The rows whose significance is above the gate's threshold.

    With a gate temperature rows are drawn and weighted 1/p, and the gradient estimates the whole
    batch's without bias. Without one the loss is the mean over the kept rows: that is biased towards
    them, on purpose, and changes the gradient's scale with the rate.
    """

    name = "gate"
    uses_scores = True
    aimed = False  # at other rates than the one it was made with

    @property
    def target(self) -> float:
        return self.rate

    def __init__(self, rate: float = 0.1, seed: int = 0, gate: Gate | None = None, **options: Any) -> None:
        super().__init__(gate.rate if gate is not None else rate, seed)
        self.gate = gate if gate is not None else Gate(rate, seed=seed, **options)
        self._seen: tuple[Tensor, Tensor] | None = None  # shares of rows and of mass kept of the batch last watched

    def decide(self, scores: Scores) -> WeightedIndices:
        selection = self.gated(scores)
        if self.gate.capacity is None:
            return WeightedIndices(selection.index, selection.weight if self.gate.temperature > 0.0 else None)
        count = int(selection.count)  # waits for an accelerator; ``select`` does not
        return WeightedIndices(
            selection.index[:count], selection.weight[:count] if self.gate.temperature > 0.0 else None
        )

    def select(self, scores: Scores | None, batch: Batch) -> SelectedBatch:
        if scores is None:
            return super().select(scores, batch)
        if self.gate.capacity is None and batch.targets.device.type == "xla":  # a program for each number of rows kept
            steady = self.gate.schedule is None and not self.gate.by_grad_norm
            self.gate.capacity = min(batch.rows, math.ceil(2 * self.rate * batch.rows)) if steady else batch.rows
        selection = self.gated(scores)
        padded = self.gate.capacity is not None
        if padded:
            (inputs, targets), selection = padding.take((batch.inputs, batch.targets), selection)
        else:
            inputs, targets = selection.take((batch.inputs, batch.targets))
        count = selection.count if padded else selection.index.shape[0]
        if self.gate.temperature > 0.0:
            return SelectedBatch(inputs, targets, count, selection.index, selection.weight, batch.divisor)
        if padded:
            divisor = selection.count.clamp(min=1)
            return SelectedBatch(inputs, targets, count, selection.index, selection.weight, divisor)
        return SelectedBatch(inputs, targets, count, selection.index)

    def gated(self, scores: Scores) -> Selection:
        """The gate's selection by logits of classes; where there are none, by the losses themselves.

        Of targets of several classes a sample, as of tokens or pixels, the mean significance is the sample's. An
        offset is one of the loss: it counts as much as the loss does in the significance.
        """
        logits, targets, offset = scores.logits, scores.targets, scores.offset
        self._seen = None
        if isinstance(logits, Tensor) and targets is not None and targets_are_classes(logits, targets):
            if offset is not None:
                if "loss" not in self.gate.significance.weights:
                    raise UserError(f"the scorer {self.scorer.name} changes the loss: wanted a significance with it")
                offset = offset * self.gate.significance.loss
            if targets.ndim == 1:
                selection: Selection = self.gate(logits, targets, offset=offset)
                if self.watched:
                    self._watch(logits, targets, selection)
                return selection
            if isinstance(scores.criterion, Criterion) and not self.gate.by_grad_norm:
                significance = scores.criterion.significance(logits, targets, self.gate.significance.weights)
                return self.gate.by(significance if offset is None else significance + offset)
        return self.gate.by(scores.losses)

    @torch.no_grad()
    def _watch(self, logits: Tensor, targets: Tensor, kept: Selection) -> None:
        """Finds out what share of a batch's rows and of their gradient norms was kept; waits for no device."""
        gate = self.gate
        norms = None if gate.last is None else gate.last.stats.grad_norm
        if norms is None:
            norms = row_stats(
                logits, targets, outputs=("grad_norm",), dim=gate.dim, ignore_index=gate.ignore_index
            ).grad_norm
        assert norms is not None
        norms = norms.nan_to_num(0.0, 0.0)  # of rows that are not finite, which are never kept
        taken = kept.weight > 0  # not padding
        rows = taken.sum() / (targets != gate.ignore_index).sum()
        self._seen = rows, (norms.index_select(0, kept.index) * taken).sum() / norms.sum()

    def set_progress(self, progress: float) -> None:
        self.gate.set_progress(progress)
        self.rate = self.gate.rate

    def set_target_rate(self, rate: float) -> None:
        if self.gate.by_grad_norm:
            raise UserError(f"a rate of {rate:g} for a gate with a mass: wanted a gate with a rate")
        self.gate.set_target_rate(rate)
        self.rate, self.aimed = rate, True

    def likely_rows(self, rows: int) -> range:
        if self.before_loading:  # these are the rows that it chose this time
            return range(min(rows, max(1, rows // 2)), rows + 1)
        if self.gate.capacity is not None:
            slots = min(self.gate.capacity, rows)
            return range(slots, slots + 1)
        aim = max(1, round(self.rate * rows))
        return range(max(1, aim // 2), min(rows, 2 * aim) + 1)

    def trace(self) -> tuple[Tensor, ...]:
        """The rate is the controller's, smoothed; of a gate with a mass the last batch's, NaN if it was not watched."""
        observed, threshold = self.gate.rate_observed.detach().clone(), self.gate.threshold.detach().clone()
        rows, *mass = self._seen or (torch.full_like(observed, torch.nan),)
        return rows if self.gate.by_grad_norm else observed, threshold, *mass

    def warnings(self, rate: float | None) -> list[str]:
        found = []
        steps, saturated = int(self.gate.step), int(self.gate.saturated)
        if saturated > 0.1 * steps:
            found.append(
                f"the gate's controller was saturated in {saturated} of {steps} steps: its rate is not the target's"
            )
        steered = (
            self.gate.schedule is None and not self.gate.by_grad_norm and not self.aimed
        )  # to one rate, all the time
        if steered and rate is not None and abs(rate - self.rate) > max(0.02, 0.2 * self.rate):
            found.append(f"the gate kept {rate:.1%} of the rows it was offered; the target was {self.rate:.1%}")
        if invalid := int(self.gate.invalid):
            found.append(f"{invalid} rows were not finite and left out")
        if overflow := int(self.gate.overflow):
            found.append(f"{overflow} selected rows were over the gate's capacity and left out")
        return found
