"""The public operations: documented signatures that build a checked call and dispatch it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from sparse_kernels.backends import dispatch
from sparse_kernels.calls import CompactCall, ControlCall, GateCall, StatsCall, TreeCall
from sparse_kernels.types import ControlState, GatedRows, RowStats, Selection


def row_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    outputs: Collection[str] = ("loss", "entropy"),
    dim: int = -1,
    temperature: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    backend: str | None = None,
) -> RowStats:
    """Per-row statistics of softmax(z), z = softcap * tanh(logits / softcap) / temperature.

    Args:
        logits: float32, bfloat16, float16 or float64, any shape with the classes in ``dim``.
        targets: int64 or int32 class indices, the logits' shape without ``dim``.
        outputs: any of ``STATISTICS``; the fields of ``RowStats`` say what each is.
        temperature: above 0. softcap: 0 for none.
        label_smoothing: of ``loss`` alone, as in ``torch.nn.functional.cross_entropy``.
        ignore_index: a row with this target gives 0 in every output, and no gradient.
        backend: ``cpp`` or ``torch``; None takes the first that serves the call.

    Returns:
        RowStats. ``loss`` and ``entropy`` are differentiable in the logits. A logit of -inf has
        probability 0. A row with NaN, +inf or nothing but -inf gives NaN (``argmax`` -1).

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or setting; on CPU, a target out of
            range (on an accelerator, where looking would wait for the device, its row gives NaN).
        BackendUnavailable: the backend named cannot serve this call.
    """
    call = StatsCall(logits, targets, outputs, dim, temperature, softcap, label_smoothing, ignore_index)
    result: RowStats = dispatch("row_stats", call, backend)
    return result


def gate_rows(
    logits: Tensor,
    targets: Tensor,
    threshold: Tensor,
    *,
    weights: Mapping[str, float],
    offset: Tensor | None = None,
    outputs: Collection[str] = (),
    dim: int = -1,
    temperature: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    gate_temperature: float = 0.0,
    p_min: float = 0.0,
    seed: int = 0,
    step: int | Tensor = 0,
    backend: str | None = None,
) -> GatedRows:
    """``row_stats``, their weighted sum and the comparison with a threshold, in one pass.

    significance = sum_k weights[k] * stat_k + offset, kept where significance > threshold. With
    ``gate_temperature`` T > 0 a row is kept with probability
    p = clip(sigmoid((significance - threshold) / T), p_min, 1), and weighs 1/p.

    Args:
        threshold: one floating element on the logits' device; read there, never by the host.
        weights: statistic name -> weight, such as ``{"loss": 0.7, "entropy": 0.3}``.
        offset: optional floating tensor of the targets' shape.
        outputs: statistics to return besides.
        seed, step: with the row's number, the key of its random draw (Philox4x32-10); ``step``
            may be a one-element int64 tensor.
        Others as in ``row_stats``.

    Returns:
        GatedRows. Ignored and invalid rows are never kept; invalid ones are counted. Nothing
        here is differentiable: a selection is not.

    Raises:
        As ``row_stats``.
    """
    call = GateCall(
        logits, targets, outputs, dim, temperature, softcap, label_smoothing, ignore_index,
        threshold, weights, offset, gate_temperature, p_min, seed, step,
    )  # fmt: skip
    result: GatedRows = dispatch("gate_rows", call, backend)
    return result


def compact(
    mask: Tensor, *, weight: Tensor | None = None, capacity: int | None = None, backend: str | None = None
) -> Selection:
    """The indices of the rows that a mask keeps, ascending and packed.

    Args:
        mask: bool [rows].
        weight: optional float32 [rows], packed beside the indices; 1 for each row without it.
        capacity: with one the result has exactly that many slots whatever the mask holds, the
            rest padded with index 0 and weight 0, and nothing waits for the device; rows that
            do not fit are counted in ``overflow``. Without one it has exactly ``count`` slots,
            which costs one synchronisation on an accelerator.

    Raises:
        ValueError: mask not bool or not 1-D, weight of another shape or dtype, bad capacity.
    """
    selection: Selection = dispatch("compact", CompactCall(mask, weight, capacity), backend)
    return selection


def control(
    state: ControlState,
    significance: Tensor,
    setpoint: Tensor,
    *,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    mass: Tensor | None = None,
    overflow: Tensor | None = None,
    gate_temperature: float = 0.0,
    p_min: float = 0.0,
    backend: str | None = None,
) -> None:
    """Moves a gate's threshold by one batch, in place, so that the fraction of rows above it meets a set-point.

    The threshold that ``gate_rows`` takes is ``state.value("threshold")``. Nothing waits for a device. What
    the law is, and why: ``sparse_kernels/control_law.py``.

    Args:
        state: from ``control_law.initial_state``. NaN rows are counted in it.
        significance: floating [rows], or [..., rows] for states of shape [...]. NaN rows do not count for
            the rate. A batch without a valid row moves nothing but the counters.
        setpoint: float32, one element a state, in (0, 1]: the rate wanted. 1 fixes the threshold at -inf.
        labels: optional int64, int32 or bool of significance's shape: rows equal to ``ignore_index`` (for a
            bool of valid rows: 0) do not count.
        mass: optional floating of that shape, 0 or above: the set-point is then a share of its sum.
        overflow: optional int32, one element a state, a selection's: added to the counter, but for
            the batch that an automatic start keeps whole.
        gate_temperature, p_min: of the gate that uses the threshold, as in ``gate_rows``.

    Raises:
        ValueError: a wrong dtype, shape or device.
        BackendUnavailable: the backend named cannot serve this call.
    """
    call = ControlCall(
        state, significance, setpoint, labels, ignore_index, mass, overflow, gate_temperature, p_min
    )  # fmt: skip
    dispatch("control", call, backend)


def gather_rows(tree: Any, selection: Selection, *, backend: str | None = None) -> Any:
    """The selected rows (dim 0) of every tensor of a nested structure, packed.

    Padding slots read row 0. Differentiable; the backward is ``scatter_rows``: padding adds nothing.

    Raises:
        ValueError: a tensor whose dim 0 is not ``selection.size``, or on another device.
    """
    return dispatch("gather_rows", TreeCall(tree, selection, selection.size), backend)


def scatter_rows(tree: Any, selection: Selection, *, backend: str | None = None) -> Any:
    """The transpose of ``gather_rows``: packed rows back in their places, zeros elsewhere.

    Args:
        tree: nested structure of tensors with ``len(selection.index)`` rows in dim 0.

    Returns:
        The same structure with ``selection.size`` rows; padding slots are dropped.
    """
    return dispatch("scatter_rows", TreeCall(tree, selection, selection.index.shape[0]), backend)
