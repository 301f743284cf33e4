"""The public operations: documented signatures that build a checked call and route it to a backend.

The reference is called as it is: plain PyTorch, which everything sees through. A kernel is called directly where
nobody but the caller looks, since the dispatcher would cost a small call more than the kernel; and through ``library``
where a gradient is wanted, or a compiler, a tracer or a dispatch mode must see it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_kernels import direct, library
from sparse_kernels.backends import choose, fused
from sparse_kernels.calls import CompactCall, ControlCall, GateCall, GateStepCall, SelectCall, StatsCall, Tree, TreeCall
from sparse_kernels.tracing import observed
from sparse_kernels.types import DIFFERENTIABLE, ControlState, GatedRows, RowStats, Selected, Selection


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
    inplace_backward: bool = False,
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
        inplace_backward: the gradient may take the memory of the logits, whose values are then gone. A kernel
            does so in eager mode; a compiler, and the reference, may use new memory. Whoever else needs the
            logits for a gradient, a second backward included, gets PyTorch's error for a modified tensor.
        backend: ``cpp``, ``triton`` or ``torch``; None takes the first that serves the call.

    Returns:
        RowStats. ``loss`` and ``entropy`` are differentiable in the logits. A logit of -inf has
        probability 0. A row with NaN, +inf or nothing but -inf gives NaN (``argmax`` -1).

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or setting; on CPU, a target out of
            range (on an accelerator, where looking would wait for the device, its row gives NaN);
            ``inplace_backward`` for logits that are a leaf or overlap themselves in memory.
        RuntimeError: from the backward, ``inplace_backward`` with create_graph=True.
        BackendUnavailable: the backend named cannot serve this call.
    """
    call = StatsCall(logits, targets, outputs, dim, temperature, softcap, label_smoothing, ignore_index)
    gradient = logits.requires_grad and torch.is_grad_enabled() and _differentiable(outputs)
    if inplace_backward and gradient:
        _refuse_inplace_backward(logits)
    name, serve = choose("row_stats", call, backend)
    if name == "torch" or not (gradient or observed(logits)):
        result: RowStats = serve(call)
        return result
    return library.row_stats(call, name, gradient=gradient, inplace_backward=inplace_backward)


def _differentiable(outputs: Collection[str]) -> bool:
    # Not of a set: PyTorch before 2.9 fails to compile set.isdisjoint.
    for name in DIFFERENTIABLE:  # noqa: SIM110  a generator costs as much as the rest
        if name in outputs:
            return True
    return False


def _refuse_inplace_backward(logits: Tensor) -> None:
    if logits.is_leaf:
        raise ValueError("inplace_backward: the logits are a leaf that requires grad; their values would be lost")
    extent = 1  # elements that the dimensions of smaller stride reach over
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1:
            if stride < extent:
                raise ValueError(
                    f"inplace_backward: logits of shape {tuple(logits.shape)} and strides {logits.stride()} "
                    "overlap themselves in memory"
                )
            extent = stride * (size - 1) + extent


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
    if not outputs and offset is None and dim == -1 and direct.serves(backend):
        gated = direct.gate_rows(
            logits, targets, threshold, weights, temperature, softcap, label_smoothing, ignore_index,
            gate_temperature, p_min, seed, step,
        )  # fmt: skip
        if gated is not None:
            return gated
    call = GateCall(
        logits, targets, outputs, dim, temperature, softcap, label_smoothing, ignore_index,
        threshold, weights, offset, gate_temperature, p_min, seed, step,
    )  # fmt: skip
    return _gate_rows(call, backend)


def _gate_rows(call: GateCall, backend: str | None) -> GatedRows:
    name, serve = choose("gate_rows", call, backend)
    if name == "torch" or not observed(call.logits):
        result: GatedRows = serve(call)
        return result
    return library.gate_rows(call, name)


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
            which costs one synchronisation on an accelerator; older releases of PyTorch compile this
            only with ``torch._dynamo.config.capture_dynamic_output_shape_ops = True``.

    Raises:
        ValueError: mask not bool or not 1-D, weight of another shape or dtype, bad capacity.
    """
    if direct.serves(backend):
        selection = direct.compact(mask, weight, capacity)
        if selection is not None:
            return selection
    return _compact(CompactCall(mask, weight, capacity), backend)


def _compact(call: CompactCall, backend: str | None) -> Selection:
    name, serve = choose("compact", call, backend)
    if name == "torch" or not observed(call.mask):
        selection: Selection = serve(call)
        return selection
    return library.compact(call, name)


def select(
    logits: Tensor,
    targets: Tensor,
    threshold: Tensor,
    *,
    weights: Mapping[str, float],
    tree: Any = None,
    capacity: int | None = None,
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
) -> Selected:
    """From logits to packed rows: ``gate_rows``, ``compact`` of its mask, and ``gather_rows`` of a tree, as one call.

        kept = select(logits, targets, threshold, weights={"loss": 1.0}, tree=(inputs, targets), capacity=64)
        inputs, targets = kept.packed

    Args:
        tree: nested structure of tensors with a row in dim 0 for each target, in the order of the targets
            flattened; None packs nothing.
        capacity: as in ``compact``: with one nothing waits for the device.
        Others as in ``gate_rows``; its 1/p are the selection's weights.

    Returns:
        Selected: ``gated``, ``selection`` and ``packed``, which is differentiable in the tree.

    Raises:
        As ``gate_rows``, ``compact`` and ``gather_rows``; nothing that was given has changed then.
    """
    if not outputs and offset is None and dim == -1 and direct.serves(backend):
        found = direct.select(
            logits, targets, threshold, weights, tree, temperature, softcap, label_smoothing, ignore_index,
            gate_temperature, p_min, seed, step, capacity,
        )  # fmt: skip
        if found is not None:
            if tree is None or found.packed is not None:
                return found
            return found._replace(packed=gather_rows(tree, found.selection, backend=backend))
    call = SelectCall(
        logits, targets, outputs, dim, temperature, softcap, label_smoothing, ignore_index,
        threshold, weights, offset, gate_temperature, p_min, seed, step, tree, capacity,
    )  # fmt: skip
    if not (observed(logits) or (call.packing is not None and _move_is_seen(call.packing))):
        served: Selected | None = fused("select", call, backend)
        if served is not None:
            return served
    gated = _gate_rows(call, backend)
    weight = None if gated.weight is None else gated.weight.flatten()
    selection = _compact(CompactCall(gated.mask.flatten(), weight, capacity), backend)
    packed = None if tree is None else gather_rows(tree, selection, backend=backend)
    return Selected(gated, selection, packed)


def gate_step(
    logits: Tensor,
    targets: Tensor,
    state: ControlState,
    setpoint: Tensor,
    *,
    weights: Mapping[str, float],
    capacity: int | None = None,
    offset: Tensor | None = None,
    by_mass: bool = False,
    dim: int = -1,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    gate_temperature: float = 0.0,
    p_min: float = 0.0,
    seed: int = 0,
) -> Selected:
    """``select`` at a controller's threshold, then ``control`` of it by what was found, as one call.

    Args:
        state: of one controller; its step is that of the draws.
        setpoint: float32, one element: the rate wanted, or, ``by_mass``, the share of the sum of grad_norm.
        Others as in ``select``.

    Returns:
        Selected, with nothing packed; ``by_mass``, its statistics hold ``grad_norm``.

    Raises:
        As ``select`` and ``control``; the state has not moved then.
    """
    if offset is None and dim == -1 and direct.serves(None):
        stepped = direct.gate_step(
            logits, targets, state, weights, 1.0, 0.0, label_smoothing, ignore_index, gate_temperature, p_min, seed,
            state.counters, capacity, setpoint, by_mass,
        )  # fmt: skip
        if stepped is not None:
            return stepped
    outputs = ("grad_norm",) if by_mass else ()
    step = state.counters[0] if gate_temperature else 0
    call = GateStepCall(
        logits, targets, outputs, dim, 1.0, 0.0, label_smoothing, ignore_index,
        state.values, weights, offset, gate_temperature, p_min, seed, step, capacity, state, setpoint, by_mass,
    )  # fmt: skip
    if not observed(logits):
        served: Selected | None = fused("gate_step", call, None)
        if served is not None:
            return served
    selected = select(
        logits, targets, state.values[0],
        weights=weights, capacity=capacity, offset=offset, outputs=outputs, dim=dim, label_smoothing=label_smoothing,
        ignore_index=ignore_index, gate_temperature=gate_temperature, p_min=p_min, seed=seed, step=step,
    )  # fmt: skip
    gated, selection, _ = selected
    control(
        state, gated.significance.flatten(), setpoint,
        labels=targets.flatten(), ignore_index=ignore_index, overflow=selection.overflow,
        mass=gated.stats.grad_norm.flatten() if gated.stats.grad_norm is not None else None,
        gate_temperature=gate_temperature, p_min=p_min,
    )  # fmt: skip
    return selected


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
    name, serve = choose("control", call, backend)
    if name == "torch" or not observed(significance):
        serve(call)
    else:
        library.control(call, name)


def gather_rows(tree: Any, selection: Selection, *, backend: str | None = None) -> Any:
    """The selected rows (dim 0) of every tensor of a nested structure, packed.

    Padding slots read row 0. Differentiable; the backward is ``scatter_rows``: padding adds nothing.

    Raises:
        ValueError: a tensor whose dim 0 is not ``selection.size``, or on another device.
    """
    if direct.serves(backend):
        packed = direct.gather_rows(tree, selection)
        if packed is not None:
            return packed
    call = TreeCall(tree, selection, selection.size)
    name, serve = choose("gather_rows", call, backend)
    if name == "torch" or not _move_is_seen(call, selection.index):
        return serve(call)
    return library.gather_rows(call, name)


def scatter_rows(tree: Any, selection: Selection, *, backend: str | None = None) -> Any:
    """The transpose of ``gather_rows``: packed rows back in their places, zeros elsewhere.

    Args:
        tree: nested structure of tensors with ``len(selection.index)`` rows in dim 0.

    Returns:
        The same structure with ``selection.size`` rows; padding slots are dropped.
    """
    call = TreeCall(tree, selection, selection.index.shape[0])
    name, serve = choose("scatter_rows", call, backend)
    if name == "torch" or not _move_is_seen(call, selection.index):
        return serve(call)
    return library.scatter_rows(call, name)


def _move_is_seen(tree: Tree, *others: Tensor) -> bool:
    if torch.is_grad_enabled():
        for tensor in tree.tensors:
            if tensor.requires_grad:
                return True
    return observed(*others, *tree.tensors)
