"""A language model's head: the statistics of its logits, which are never held, and the losses that stand on them."""

from sparse_kernels.head.counter import MultipliedRows, count_multiplied_rows
from sparse_kernels.head.linear import linear_row_stats
from sparse_kernels.head.selective import SelectiveLoss, TopFraction, selective_linear_cross_entropy

__all__ = [
    "MultipliedRows",
    "SelectiveLoss",
    "TopFraction",
    "count_multiplied_rows",
    "linear_row_stats",
    "selective_linear_cross_entropy",
]
