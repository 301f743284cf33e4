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
    scored_rows,
)
from sparse_kernels.head.scores import SAVED, HeadGradients, Scored, differentiate_logits, rows_of, score


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
        self._logits = large_pages(head.input.new_empty(self.size, head.weight.shape[0]))
        self._rows: list[Tensor] = []
        self._saved: list[tuple[Tensor, ...]] = []
        self.held = 0
        self.whole = True  # no gradient was summed yet
        self._input = torch.zeros_like(head.input) if needed[0] else None
        self._parameters = ParameterGradients(head, weight=needed[1], bias=needed[2])

    def room(self, rows: int) -> Tensor:
        """Return memory for the logits of the next rows, after ``hold`` to be filled."""
        return self._logits[self.held : self.held + rows]

    def hold(self, index: Tensor, saved: tuple[Tensor, ...]) -> None:
        """Note rows whose logits have been written to ``room``."""
        self._rows.append(index)
        self._saved.append(saved)
        self.held += index.shape[0]

    def differentiate(self, upstream: float, *, last: bool) -> None:
        """Take the gradient of the rows that are held, each with the same upstream gradient."""
        if self.held:
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
        threshold: one element; a row is kept if its significance is above it. None keeps all rows that count.
        weights: of each statistic in the significance.
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
    buffer = None
    if threshold is not None or holding is None:
        buffer = large_pages(head.input.new_empty(size, head.weight.shape[0]))
    outputs = tuple(dict.fromkeys(("loss", *weights)))
    unknown = divisor is None and threshold is not None  # until all rows are scored
    upstream = 1.0 / (max(valid, 1) if divisor is None else divisor)
    for start in range(0, valid, size):
        some = index[start : start + size]
        if holding is not None and holding.held + some.shape[0] > holding.size:
            holding.differentiate(1.0 if unknown else upstream, last=False)
        room = holding.room(some.shape[0]) if holding is not None and buffer is None else buffer
        assert room is not None
        logits = logits_of(rows_of(head.input, some), head, room)
        scored = score(head, logits, rows_of(head.target, some), outputs)
        losses.index_copy_(0, some, scored.values["loss"])
        place = None if threshold is None else _above(scored, weights, threshold, some, significance)
        chosen = some if place is None else some.index_select(0, place)
        mask.index_fill_(0, chosen, True)
        kept += chosen.shape[0]
        if holding is None:
            continue
        saved = tuple(scored.values[name] for name in SAVED)
        if place is not None:
            torch.index_select(logits, 0, place, out=holding.room(chosen.shape[0]))
            saved = tuple(values.index_select(0, place) for values in saved)
        holding.hold(chosen, saved)
    count(scored=valid)
    factor = 1.0 / max(kept, 1) if unknown else upstream
    gradients = HeadGradients(None, None, None)
    if holding is not None:
        afterwards = unknown and not holding.whole  # some rows were differentiated before their number was known
        holding.differentiate(1.0 if afterwards else factor, last=True)
        gradients = holding.results(factor if afterwards else 1.0)
    return FusedLoss(torch.where(mask, losses, 0.0).sum() * factor, mask, significance, gradients)


def _above(
    scored: Scored, weights: Mapping[str, float], threshold: Tensor, some: Tensor, significance: Tensor
) -> Tensor:
    """Return the places of the rows above the threshold, and write their significance to its rows."""
    total = weighted_sum(scored.values, weights)
    significance.index_copy_(0, some, total)
    return (total > threshold.reshape(())).nonzero().squeeze(1)


def weighted_sum(values: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Return the significance, float32: the sum of weighted statistics. A weight of 0 adds nothing, not 0 * inf.

    Args:
        values: statistics by name.
        weights: of each statistic.
    """
    terms = [weight * values[name] for name, weight in weights.items() if weight]
    return torch.stack(terms).sum(0).float()
