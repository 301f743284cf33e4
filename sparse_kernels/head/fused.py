"""Loss and gradients of a head in one pass, where it is known beforehand which rows are kept.

A chunk of rows is scored; those that are kept are differentiated while their logits are in memory, so none is computed
twice: 1 + 2r products with a threshold, 3r with a mask. Kept logits are held until they weigh as much as the weight;
the gradient then overwrites them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_kernels.backends.cpp import large_pages
from sparse_kernels.head.call import FlatHead
from sparse_kernels.head.counter import count
from sparse_kernels.head.products import (
    ParameterGradients,
    differentiated_rows,
    input_gradient,
    logits_of,
    reserved_rows,
    scored_rows,
)
from sparse_kernels.head.scores import SAVED, HeadGradients, Scored, copy_rows, differentiate_logits, rows_of, score


class FusedLoss(NamedTuple):
    """Results of the pass."""

    loss: Tensor  # 0-d
    mask: Tensor  # bool [rows]: kept
    significance: Tensor  # float32 [rows]; 0 for rows that do not count
    gradients: HeadGradients  # of the loss


class _KeptRows:
    """Logits of kept rows, held until there are enough of them, and the gradients summed so far."""

    def __init__(self, head: FlatHead, rows: int, needed: Sequence[bool]) -> None:
        self._head = head
        self.size = differentiated_rows(head, rows)
        self._logits: Tensor | None = None
        self._rows: list[Tensor] = []
        self._saved: list[tuple[Tensor, ...]] = []
        self.held = 0
        self.whole = True  # no gradient was summed yet
        self._input = torch.zeros_like(head.input) if needed[0] else None
        self._parameters = ParameterGradients(head, weight=needed[1], bias=needed[2])

    def room(self, rows: int, *, expected: int) -> Tensor:
        """Return memory for the logits of the next rows, after ``hold`` to be filled.

        Args:
            rows: the next.
            expected: rows that are to be held in all, as far as is known.
        """
        before, end = self._logits, self.held + rows
        if before is None or end > before.shape[0]:
            size = reserved_rows(self._head, max(expected, end), self.size)
            self._logits = large_pages(self._head.input.new_empty(size, self._head.weight.shape[0]))
            if before is not None:
                self._logits[: self.held] = before[: self.held]
        assert self._logits is not None
        return self._logits[self.held : end]

    def hold(self, index: Tensor, saved: tuple[Tensor, ...]) -> None:
        """Note rows whose logits have been written to ``room``."""
        self._rows.append(index)
        self._saved.append(saved)
        self.held += index.shape[0]

    def differentiate(self, upstream: float, *, last: bool) -> None:
        """Take the gradient of the rows that are held, each with the same upstream gradient."""
        if self.held:
            assert self._logits is not None
            head, index, logits = self._head, torch.cat(self._rows), self._logits[: self.held]
            parts = zip(SAVED, zip(*self._saved, strict=True), strict=True)
            saved = {name: torch.cat(values) for name, values in parts}
            above = torch.full_like(saved["maximum"], upstream)
            differentiate_logits(head, logits, rows_of(head.target, index), saved, {"loss": above})
            if self._input is not None:
                self._input.index_copy_(0, index, input_gradient(logits, head))
            self._parameters.add(logits, rows_of(head.input, index), last=last)
            count(differentiated=self.held)
        self._rows, self._saved, self.held, self.whole = [], [], 0, False

    def results(self, scale: float) -> HeadGradients:
        """Return the gradients times a factor."""
        found = HeadGradients(self._input, *self._parameters.results())
        if scale != 1.0:
            for gradient in found:
                if gradient is not None:
                    gradient.mul_(scale)
        return found


def fused_loss(
    head: FlatHead, threshold: Tensor | None, weights: Mapping[str, float], divisor: float | None,
    needed: Sequence[bool],
) -> FusedLoss:  # fmt: skip
    """Return the loss of the kept rows, summed and divided, and its gradients.

    Args:
        head: the rows.
        threshold: one element; a row is kept if its significance is above it. None keeps all rows that count, but for
            those whose significance is NaN.
        weights: of each statistic in the significance; none for rows that are kept whatever they are.
        divisor: of the sum; None for the number of kept rows.
        needed: for each of ``HeadGradients``.
    """
    head.check_targets()
    rows = head.target.shape[0]
    losses = head.input.new_zeros(rows, dtype=head.accumulator)
    significance = head.input.new_zeros(rows, dtype=torch.float32)
    mask = torch.zeros_like(head.valid)
    index = head.valid.nonzero().squeeze(1)
    valid, kept = index.shape[0], 0
    size = scored_rows(head, valid)
    holding = _KeptRows(head, valid, needed) if any(needed) else None
    buffer = None  # of a tile, of which a part is kept; what is kept whole is computed in its place
    if threshold is not None or holding is None:
        buffer = large_pages(head.input.new_empty(size, head.weight.shape[0]))
    outputs = tuple(dict.fromkeys(("loss", *weights)))
    # Of each kept row. Before all are scored, their number is not known: then every valid one, or a sum.
    upstream = 1.0 / divisor if divisor is not None else 1.0 / max(valid, 1) if threshold is None else 1.0
    for start in range(0, valid, size):
        some = index[start : start + size]
        if holding is not None and holding.held + some.shape[0] > holding.size:
            holding.differentiate(upstream, last=False)
        room = buffer
        if room is None:
            assert holding is not None
            room = holding.room(some.shape[0], expected=valid)
        logits = logits_of(rows_of(head.input, some), head, room)
        scored = score(head, logits, rows_of(head.target, some), outputs)
        losses.index_copy_(0, some, scored.values["loss"])
        place = _places(scored, weights, threshold, some, significance) if weights else None
        chosen = some if place is None else some.index_select(0, place)
        mask.index_fill_(0, chosen, True)
        kept += chosen.shape[0]
        if holding is None:
            continue
        saved = tuple(scored.values[name] for name in SAVED)
        if chosen.shape[0] < some.shape[0] or buffer is not None:
            assert place is not None
            seen = start + some.shape[0]
            source = logits.clone() if buffer is None else logits
            copy_rows(source, place, holding.room(chosen.shape[0], expected=kept * valid // seen))
            saved = tuple(values.index_select(0, place) for values in saved)
        holding.hold(chosen, saved)
    count(scored=valid)
    factor = 1.0 / max(kept, 1) if divisor is None else upstream
    gradients = HeadGradients(None, None, None)
    if holding is not None:
        afterwards = not holding.whole  # some rows were differentiated before their number was known
        holding.differentiate(upstream if afterwards else factor, last=True)
        gradients = holding.results(factor / upstream if afterwards else 1.0)
    return FusedLoss(torch.where(mask, losses, 0.0).sum() * factor, mask, significance, gradients)


def _places(
    scored: Scored, weights: Mapping[str, float], threshold: Tensor | None, some: Tensor, significance: Tensor
) -> Tensor:
    """Return the places of the rows that are kept, and write their significance to its rows."""
    total = weighted_sum(scored.values, weights)
    significance.index_copy_(0, some, total)
    kept = ~total.isnan() if threshold is None else total > threshold.reshape(())
    return kept.nonzero().squeeze(1)


def weighted_sum(values: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Return the significance, float32: the sum of weighted statistics. A weight of 0 adds nothing, not 0 * inf.

    Args:
        values: statistics by name.
        weights: of each statistic.
    """
    terms = [weight * values[name] for name, weight in weights.items() if weight]
    return torch.stack(terms).sum(0).float()
