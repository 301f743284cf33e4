"""What the operations return: plain named tuples, so every field is a tensor and every result is a pytree."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import sparse_kernels  # for what it holds by the time of a call: the operations import these types

STATISTICS = (
    "loss",
    "entropy",
    "grad_norm",
    "sum_squares",
    "max_prob",
    "margin",
    "argmax",
    "logsumexp",
)


DIFFERENTIABLE = ("loss", "entropy")


class RowStats(NamedTuple):
    """Per-row statistics; a field is None where it was not asked for.

    Each field has the logits' shape without the class dimension; float32 (float64 for float64
    logits), ``argmax`` int64. With p = softmax(z) and y the target:
    """

    loss: Tensor | None = None  # -log p[y], nats
    entropy: Tensor | None = None  # -sum p log p, nats
    grad_norm: Tensor | None = None  # ||p - onehot(y)||_2 (EL2N)
    sum_squares: Tensor | None = None  # sum p^2
    max_prob: Tensor | None = None  # max p
    margin: Tensor | None = None  # largest p - second largest p; 1 where there is one class
    argmax: Tensor | None = None  # lowest index of the largest logit; -1 for an invalid row
    logsumexp: Tensor | None = None  # log sum exp z


class GatedRows(NamedTuple):
    """What ``gate_rows`` decided; every per-row field has the logits' shape without the class dimension."""

    mask: Tensor  # bool: this row is kept
    significance: Tensor  # sum_k w_k * stat_k + offset; 0 for an ignored row, NaN for an invalid one
    weight: Tensor | None  # 1/p for a kept row, else 0; None when the decision is a plain threshold
    stats: RowStats  # the statistics asked for
    invalid: Tensor  # int32, 0-d: rows with NaN, +inf or nothing but -inf


# A controller's memory, packed so that a kernel finds it at two addresses; csrc/control_law.h has the same order.
CONTROL_VALUES = (  # float32
    "threshold",
    "drift",  # the integral: units a batch
    "position_variance",  # of the threshold, logits of the rate squared
    "covariance",  # of position and drift
    "drift_variance",
    "unit",  # significance per logit of the rate; 0 before the first measurement
    "error",  # smoothed
    "error_variance",  # what noise alone would give it
    "surprise",  # nats of evidence that the feedback is dead
    "misses",  # smoothed share of batches off target
    "rate",  # smoothed rate (or share of mass) observed; NaN before the first batch
)
CONTROL_COUNTERS = (  # int64
    "steps",  # batches seen
    "saturated",  # batches in which the set-point was out of reach
    "invalid",  # rows of NaN
    "overflow",  # rows selected beyond the capacity
)


class ControlState(NamedTuple):
    """A threshold's controller: what ``control`` moves, in place. States of any shape [...] move side by side."""

    values: Tensor  # float32 [..., len(CONTROL_VALUES)]
    counters: Tensor  # int64 [..., len(CONTROL_COUNTERS)]

    def value(self, name: str) -> Tensor:
        """float32 [...]: a view of one of CONTROL_VALUES."""
        return self.values.select(-1, CONTROL_VALUES.index(name))

    def counter(self, name: str) -> Tensor:
        """int64 [...]: a view of one of CONTROL_COUNTERS."""
        return self.counters.select(-1, CONTROL_COUNTERS.index(name))


class Selection(NamedTuple):
    """Packed rows: ``index[:count]`` ascending; what lies behind ``count`` is padding (index 0, weight 0)."""

    # Both shadow tuple methods that nobody calls on a selection.
    index: Tensor  # type: ignore[assignment]  # int64 [capacity or count]
    weight: Tensor  # float32, same shape
    count: Tensor  # type: ignore[assignment]  # int32, 0-d, on the device: rows kept
    overflow: Tensor  # int32, 0-d: selected rows that did not fit the capacity
    size: int  # rows of the batch that the selection was made for

    def take(self, tree: Any) -> Any:
        """The selected rows of every tensor in ``tree``: see ``gather_rows``."""
        return sparse_kernels.gather_rows(tree, self)

    def valid(self) -> Tensor:
        """bool, shape of ``index``: False on padding."""
        return torch.arange(self.index.shape[0], device=self.index.device) < self.count


class Selected(NamedTuple):
    """What ``select`` decided, and what it packed."""

    gated: GatedRows
    selection: Selection  # of the rows of ``gated.mask``, flattened
    packed: Any  # the tree that was given, with its selected rows; None without one
