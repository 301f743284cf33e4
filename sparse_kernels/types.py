"""Results of the operations: plain named tuples, so every result is a pytree whose fields are tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

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

# The statistics that a gate can weigh: all numbers, so not the index.
WEIGHABLE = tuple(name for name in STATISTICS if name != "argmax")

DIFFERENTIABLE = ("loss", "entropy")

# The statistics of a head, which is given the logits' making as well.
HEAD_STATISTICS = (*STATISTICS, "mean_logits")


class RowStats(NamedTuple):
    """Per-row statistics of p = softmax(z), with z the scaled logits and y the target.

    A field is None unless it was requested. Each tensor has the logits' shape without the class dimension. It is
    float32, or float64 for float64 logits; ``argmax`` is int64.
    """

    loss: Tensor | None = None
    """Cross-entropy, -log p[y], in nats."""
    entropy: Tensor | None = None
    """-sum p log p, in nats."""
    grad_norm: Tensor | None = None
    """||p - onehot(y)||_2, the norm of the loss's gradient in the logits (EL2N)."""
    sum_squares: Tensor | None = None
    """sum p^2."""
    max_prob: Tensor | None = None
    """The largest probability."""
    margin: Tensor | None = None
    """The largest probability minus the second largest; 1 for a single class."""
    argmax: Tensor | None = None
    """The lowest index of the largest logit; -1 for an invalid row."""
    logsumexp: Tensor | None = None
    """log sum exp z."""
    mean_logits: Tensor | None = None
    """The mean of z over the classes; ``linear_row_stats`` alone has it."""


class GatedRows(NamedTuple):
    """Decisions of ``gate_rows``; each per-row field has the logits' shape without the class dimension."""

    mask: Tensor
    """bool: True for a row that is kept."""
    significance: Tensor
    """sum_k w_k * stat_k + offset; 0 for an ignored row, NaN for an invalid one."""
    weight: Tensor | None
    """float32: 1/p for a kept row, at most 2^32; 0 for the others; None if the decision is a plain threshold."""
    stats: RowStats
    """The statistics that were requested."""
    invalid: Tensor
    """int32, 0-d: the number of rows with NaN, +inf or nothing but -inf."""


# A controller's state, packed so that a kernel finds it at two addresses; control_law.h has the same order.
CONTROL_VALUES = (  # float32
    "threshold",
    "drift",  # the integral: units a batch
    "position_variance",  # of the threshold, logits of the rate squared
    "covariance",  # of position and drift
    "drift_variance",
    "unit",  # significance per logit of the rate; 0 before the first measurement
    "error",  # smoothed
    "error_variance",  # the variance that noise alone would give the smoothed error
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
    """State of a threshold's controller, which ``control`` updates in place.

    States of any shape [...] are updated side by side.
    """

    values: Tensor
    """float32 [..., len(CONTROL_VALUES)]."""
    counters: Tensor
    """int64 [..., len(CONTROL_COUNTERS)]."""

    def value(self, name: str) -> Tensor:
        """Return a view of one of ``CONTROL_VALUES``, float32 [...].

        Args:
            name: the name in ``CONTROL_VALUES``.
        """
        return self.values.select(-1, CONTROL_VALUES.index(name))

    def counter(self, name: str) -> Tensor:
        """Return a view of one of ``CONTROL_COUNTERS``, int64 [...].

        Args:
            name: the name in ``CONTROL_COUNTERS``.
        """
        return self.counters.select(-1, CONTROL_COUNTERS.index(name))


class Selection(NamedTuple):
    """Selected rows of a batch: ``index[:count]`` is ascending, the slots behind it are padding.

    A padding slot has index 0 and weight 0.
    """

    # index and count shadow tuple methods that nobody calls on a selection.
    index: Tensor  # type: ignore[assignment]
    """int64 [slots]: the rows' numbers. ``slots`` is the capacity, or the count where there is none."""
    weight: Tensor
    """float32 [slots]."""
    count: Tensor  # type: ignore[assignment]
    """int32, 0-d, on the device: the number of rows kept."""
    overflow: Tensor
    """int32, 0-d, on the device: the number of selected rows that did not fit the capacity."""
    size: int
    """The number of rows of the batch."""

    def take(self, tree: Any) -> Any:
        """Pack the selected rows of every tensor and array in ``tree``: ``gather_rows(tree, self)``.

        Args:
            tree: nested structure of tensors and NumPy arrays with ``size`` rows in dim 0.
        """
        return _gather_rows(tree, self)

    def valid(self) -> Tensor:
        """Return a mask of the slots, bool [slots]: False on padding."""
        return torch.arange(self.index.shape[0], device=self.index.device) < self.count


_gather_rows: Callable[[Any, Selection], Any]


def register_gather_rows(function: Callable[[Any, Selection], Any]) -> None:
    """Set the function behind ``Selection.take``.

    Called once, by ``sparse_kernels.ops``: it imports this module, so this module must not import it.

    Args:
        function: ``gather_rows``.
    """
    global _gather_rows
    _gather_rows = function


class Selected(NamedTuple):
    """Results of ``select``: the decisions, the selected rows and the packed tensors."""

    gated: GatedRows
    """The decisions."""
    selection: Selection
    """The rows of ``gated.mask``, flattened."""
    packed: Any
    """The given tree with only its selected rows; None without a tree."""
