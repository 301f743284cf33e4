"""Per-row statistics, gating and compaction for training on selected rows.

Example:
    >>> stats = row_stats(logits, targets, outputs=("loss", "entropy"))
    >>> gated = gate_rows(logits, targets, threshold, weights={"loss": 0.7, "entropy": 0.3})
    >>> kept = compact(gated.mask).take((inputs, targets))
    >>> kept = select(logits, targets, threshold, weights={"loss": 1.0}, tree=(inputs, targets)).packed
"""

from sparse_kernels._dispatch import BackendUnavailable
from sparse_kernels._info import backend_info
from sparse_kernels._version import __version__
from sparse_kernels._warm_up import warm_up
from sparse_kernels.head import (
    MultipliedRows,
    SelectiveLoss,
    TopFraction,
    count_multiplied_rows,
    linear_row_stats,
    selective_linear_cross_entropy,
)
from sparse_kernels.memory import keep_freed_memory
from sparse_kernels.ops import (
    compact,
    control,
    gate_rows,
    gate_step,
    gather_rows,
    initial_state,
    row_stats,
    scatter_rows,
    select,
)
from sparse_kernels.types import STATISTICS, ControlState, GatedRows, RowStats, Selected, Selection

__all__ = [
    "STATISTICS",
    "BackendUnavailable",
    "ControlState",
    "GatedRows",
    "MultipliedRows",
    "RowStats",
    "Selected",
    "Selection",
    "SelectiveLoss",
    "TopFraction",
    "__version__",
    "backend_info",
    "compact",
    "control",
    "count_multiplied_rows",
    "gate_rows",
    "gate_step",
    "gather_rows",
    "initial_state",
    "keep_freed_memory",
    "linear_row_stats",
    "row_stats",
    "scatter_rows",
    "select",
    "selective_linear_cross_entropy",
    "warm_up",
]
