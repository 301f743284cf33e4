"""Rows above the gate's threshold, or drawn around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sparse_kernels import Selection, row_stats
from sparse_training import padding
from sparse_training.criterion import Criterion, class_indices, targets_are_classes
from sparse_training.errors import UserError
from sparse_training.gate.gate import Gate
from sparse_training.gate.terms.context import Context
from sparse_training.selection.policies.base import Policy
from sparse_training.selection.scorers.embedding import EmbeddingReader
from sparse_training.selection.types import Batch, Scores, SelectedBatch, WeightedIndices

SETTLED = 50  # batches within which a controller meets its target


class GatePolicy(Policy):
    """Keeps the rows whose significance is above the gate's threshold.

    With a gate temperature rows are drawn and weighted 1/p, and the gradient estimates the whole batch's without bias.
    Without one the loss is the mean over the kept rows. That is biased towards them, on purpose, and changes the
    gradient's scale with the rate.

    Args:
        rate: fraction of the rows to keep, in (0, 1]. Default 0.1. Not used with ``gate``.
        seed: seed of the gate's draws. Default 0. Not used with ``gate``.
        gate: the gate; None (the default) makes one from the rate, the seed and the options.
        options: further arguments of ``Gate``, for a gate that is made here.

    Attributes:
        gate: the gate.
        retargeted: True once the rate was set to another one than the policy was made with.
    """

    name = "gate"
    uses_scores = True
    retargeted = False

    def __init__(self, rate: float = 0.1, seed: int = 0, gate: Gate | None = None, **options: Any) -> None:
        super().__init__(gate.rate if gate is not None else rate, seed)
        self.gate = gate if gate is not None else Gate(rate, seed=seed, **options)
        # Rate and grad-norm fraction of the batch last watched.
        self._seen: tuple[Tensor, Tensor] | None = None

    @property
    def target(self) -> float:
        """Fraction of rows to keep."""
        return self.rate

    def prepare(
        self,
        rows: int | None,
        targets: Tensor | None = None,
        duplicate_counts: Callable[[], Tensor | None] | None = None,
    ) -> None:
        """Allocate what the scorer and the gate's terms keep of each row."""
        super().prepare(rows, targets, duplicate_counts)
        for term in self.gate.significance.terms:
            term.prepare(rows)

    def score(self, batch: Batch) -> Scores | None:
        """Score a loaded batch and, where a term asks for them, read the rows' embeddings in the same pass."""
        if "embedding" not in self.gate.terms.needs:
            return super().score(batch)
        with EmbeddingReader(self.scorer.model, self.gate.terms.embedding) as reader:
            scores = super().score(batch)
        embedding = reader.of_samples()
        if scores is None or embedding is None:
            raise UserError(
                f"the scorer {self.scorer.name} shows no embedding of the model's, which a term needs; use the scorer "
                "self, without compile"
            )
        scores.embedding = embedding
        return scores

    def read_elements(self) -> AbstractContextManager[EmbeddingReader | None]:
        """Context of a forward pass of samples whose tokens or pixels are the rows, for terms that read the model."""
        if "embedding" not in self.gate.terms.needs:
            return nullcontext()
        return EmbeddingReader(self.scorer.model, self.gate.terms.embedding, elements=True)

    def describe_elements(self, scores: Scores, samples: Batch, reader: EmbeddingReader | None, shift: bool) -> None:
        """Add to the scores of tokens or pixels what the gate's terms read, and check it; no state changes.

        Args:
            scores: logits and targets, a row for each token or pixel.
            samples: the batch that they are of.
            reader: what ``read_elements`` gave.
            shift: True if each token's output predicts the next token's target.

        Raises:
            UserError: a term lacks what it needs.
        """
        scores.inputs = samples.inputs
        if reader is None:
            return
        scores.embedding = reader.of_elements(samples.targets, shift=shift)
        if scores.embedding is None:
            raise UserError(
                "the model's forward pass shows no embedding, which a term needs; name a submodule that it calls by "
                "`embedding`, and compile nothing around it"
            )

    def check(self, scores: Scores) -> None:
        """Check that the gate's terms can serve such tokens or pixels; no state changes.

        Args:
            scores: their logits and targets, described by ``describe_elements``.

        Raises:
            UserError: a term lacks what it needs.
        """
        terms, targets = self.gate.terms, scores.targets
        if terms.asks and targets is not None and targets_are_classes(scores.logits, targets):
            terms.check(terms.context(
                scores.logits, targets, self.gate.process_group, None, scores.inputs, scores.embedding, None
            ))  # fmt: skip

    def observe_validation(self, loss: float) -> None:
        """Pass an evaluation's loss to the schedules that follow it."""
        self.gate.observe_validation(loss)

    def decide(self, scores: Scores) -> WeightedIndices:
        """Select rows by their scores; with a capacity this waits for an accelerator."""
        selection = self.gated(scores)
        if self.gate.capacity is None:
            return WeightedIndices(selection.index, selection.weight if self.gate.temperature > 0.0 else None)
        count = int(selection.count)  # waits for an accelerator; ``select`` does not
        return WeightedIndices(
            selection.index[:count], selection.weight[:count] if self.gate.temperature > 0.0 else None
        )

    def select(self, scores: Scores | None, batch: Batch) -> SelectedBatch:
        """Select the rows of a loaded batch; with a capacity nothing waits for the device."""
        if scores is None:
            return super().select(scores, batch)
        if self.gate.capacity is None and batch.targets.device.type == "xla":  # a program for each number of rows kept
            steady = self.gate.schedule is None and not self.gate.by_grad_norm
            self.gate.capacity = min(batch.rows, math.ceil(2 * self.rate * batch.rows)) if steady else batch.rows
        selection = self.gated(scores, batch)
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

    def gated(self, scores: Scores, batch: Batch | None = None) -> Selection:
        """Run the gate on the class logits or, where there are none, on the losses.

        Where a sample has several targets, as tokens or pixels, its significance is the mean over them. An offset of
        the loss counts in the significance with the loss's weight.

        Args:
            scores: the scorer's output for the rows.
            batch: the loaded batch, for terms that ask for its inputs or row numbers. None (the default) for none.

        Returns:
            The gate's selection.

        Raises:
            UserError: the scorer has an offset of the loss, and the significance has no term of the loss; or a term
                lacks what it needs.
        """
        logits, targets, offset = scores.logits, scores.targets, scores.offset
        known: dict[str, Any] = {}
        if self.gate.terms.asks and batch is not None:
            inputs = batch.inputs if scores.inputs is None else scores.inputs
            known = {"index": batch.ids, "inputs": inputs, "embedding": scores.embedding}
        self._seen = None
        classes = not isinstance(scores.criterion, Criterion) or scores.criterion.classes
        if classes and isinstance(logits, Tensor) and targets is not None and targets_are_classes(logits, targets):
            if offset is not None:
                if not self.gate.terms.current.get("loss"):
                    raise UserError(
                        f"the scorer {self.scorer.name} changes the loss; use a significance with a term of the loss, "
                        "such as Significance(loss=1.0)"
                    )
                offset = offset * self.gate.terms.current["loss"]
            targets = class_indices(targets)
            if targets.ndim == 1:
                selection: Selection = self.gate(logits, targets, offset=offset, **known)
                if self.watched:
                    self._watch(logits, targets, selection)
                return selection
            if isinstance(scores.criterion, Criterion) and not self.gate.by_grad_norm:
                significance = scores.criterion.significance(logits, targets, self.gate.terms.current)
                significance = significance if offset is None else significance + offset
                return self.gate.by(significance, self._context(scores, known, scores.criterion))
        losses = scores.losses
        factor = self.gate.terms.current.get("loss", 0.0) if self.gate.significance.terms else 1.0
        return self.gate.by(factor * losses, self._context(scores, known))

    def _context(self, scores: Scores, known: dict[str, Any], criterion: Criterion | None = None) -> Context | None:
        """Describe rows to the gate's terms where rows are samples of several targets, or have losses alone."""
        terms, losses = self.gate.terms, scores.losses
        if not terms.asks:
            return None
        found = {"loss": losses}
        if criterion is not None and scores.targets is not None:
            for name in terms.statistics:
                found[name] = criterion.significance(scores.logits, scores.targets, {name: 1.0})
        targets = losses if scores.targets is None else scores.targets
        return terms.described(
            targets, torch.ones_like(losses, dtype=torch.bool), found, self.gate.process_group, **known
        )

    @torch.no_grad()
    def _watch(self, logits: Tensor, targets: Tensor, kept: Selection) -> None:
        """Compute the rate and the grad-norm fraction of a batch, on the device."""
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
        """Follow the gate's schedule; ``progress`` is the fraction of the run that is done, 0 to 1."""
        self.gate.set_progress(progress)
        self.rate = self.gate.rate

    def set_target_rate(self, rate: float) -> None:
        """Set the gate's rate from the next step on.

        Args:
            rate: fraction of the rows to keep, in (0, 1].

        Raises:
            UserError: the rate is out of range, or the gate has a grad-norm fraction in place of a rate.
        """
        if self.gate.by_grad_norm:
            raise UserError(f"a rate of {rate:g} cannot be set with `grad_norm_fraction`; use a gate with a rate")
        self.gate.set_target_rate(rate)
        self.rate, self.retargeted = rate, True

    def likely_rows(self, rows: int) -> range:
        """Numbers of rows that are likely to be kept of a loaded batch of ``rows``."""
        if self.before_loading:  # all of them were chosen
            return range(min(rows, max(1, rows // 2)), rows + 1)
        if self.gate.capacity is not None:
            slots = min(self.gate.capacity, rows)
            return range(slots, slots + 1)
        count = max(1, round(self.rate * rows))
        return range(max(1, count // 2), min(rows, 2 * count) + 1)

    def trace(self) -> tuple[Tensor, ...]:
        """Rate, threshold and, if the last batch was watched, its grad-norm fraction.

        The rate is the controller's smoothed one; with ``grad_norm_fraction`` it is the last batch's, NaN if that was
        not watched.
        """
        observed, threshold = self.gate.rate_observed.detach().clone(), self.gate.threshold.detach().clone()
        rows, *fraction = self._seen or (torch.full_like(observed, torch.nan),)
        return rows if self.gate.by_grad_norm else observed, threshold, *fraction

    def warnings(self, rate: float | None) -> list[str]:
        """Warn of a target that was not met, and of rows left out for another reason than their significance."""
        found = []
        steps, saturated = int(self.gate.step), int(self.gate.saturated)
        if saturated > 0.1 * steps:
            found.append(
                f"the gate's controller was saturated in {saturated} of {steps} steps: the target was out of reach"
            )
        fixed = self.gate.schedule is None and not self.gate.by_grad_norm and not self.retargeted
        if fixed and rate is not None and abs(rate - self.rate) > max(0.02, 0.2 * self.rate):
            found.append(
                f"the gate kept {rate:.1%} of the rows it was offered; the target was {self.rate:.1%}"
                + (f"; its threshold settles in {SETTLED} batches, and there were {steps}" if steps < SETTLED else "")
            )
        if invalid := int(self.gate.invalid):
            found.append(f"{invalid} rows were not finite and left out")
        if overflow := int(self.gate.overflow):
            found.append(f"{overflow} selected rows were over the gate's capacity and left out")
        return found
