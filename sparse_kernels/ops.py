"""Public operations: signature, documentation, and one checked call."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from sparse_kernels import _routing, control_law, types
from sparse_kernels._arguments import (
    CompactCall,
    ControlCall,
    GateCall,
    GateStepCall,
    SelectCall,
    check_state,
    checked_settings,
)
from sparse_kernels._known import known_of
from sparse_kernels._operands import described, refuse_unserved, scalar, vetted, vetted_selection
from sparse_kernels._routing import may_be_direct
from sparse_kernels.backends import cpp_direct
from sparse_kernels.types import ControlState, GatedRows, RowStats, Selected, Selection


def row_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    outputs: str | Collection[str] = ("loss", "entropy"),
    dim: int = -1,
    temperature: float = 1.0,
    softcap: float | None = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int | None = -100,
    inplace_backward: bool = False,
    backend: str | None = None,
    **unserved: Any,
) -> RowStats:
    """Compute per-row statistics of softmax(z), z = softcap * tanh(logits / softcap) / temperature.

    A row is a sample, a token or a pixel. The logits are read once.

    Args:
        logits: float32, bfloat16, float16 or float64, any shape with the classes in ``dim``.
        targets: int64 or int32 class indices, the logits' shape without ``dim``; also a list or NumPy array of them.
        outputs: any of ``STATISTICS``, or the name of one; ``RowStats`` says what each is. Default: loss and entropy.
        dim: dimension of the classes. Default: the last.
        temperature: divides the logits; above 0. Default: 1.
        softcap: bound of the logits, by tanh, infinities among them; 0 (the default) or None for none.
        label_smoothing: of the loss alone, as in ``torch.nn.functional.cross_entropy``; in [0, 1]. Default: 0.
        ignore_index: a row with this target gives 0 in every output, and no gradient; None for no such
            target. Default: -100.
        inplace_backward: let the gradient take the memory of the logits, whose values are then gone. A kernel does
            so in eager mode; a compiler and the reference may use new memory. If another operation needs the logits
            for a gradient, PyTorch raises its error for a modified tensor. Default: False.
        backend: ``cpp``, ``triton``, ``cuda``, ``gpu`` (either) or ``torch``. Default: the first that serves the call.

    Returns:
        RowStats. ``loss`` and ``entropy`` are differentiable in the logits. Without a softcap, a logit of -inf has
        probability 0, and a row with +inf or nothing but -inf gives NaN, as one with NaN does (``argmax`` -1).

    Raises:
        TypeError: a dtype that is not served.
        ValueError: a wrong shape, device or setting; on CPU, a target out of range (on an accelerator, where looking
            would wait for the device, its row gives NaN); ``inplace_backward`` for logits that are a leaf or overlap
            themselves in memory.
        RuntimeError: from the backward, ``inplace_backward`` with create_graph=True.
        BackendUnavailable: the named backend cannot serve the call.

    Example:
        >>> stats = row_stats(logits, targets, outputs=("loss", "grad_norm"))
        >>> stats.loss.mean().backward()
    """
    if unserved:
        refuse_unserved(row_stats, unserved)
    settings = checked_settings(temperature, softcap, label_smoothing, ignore_index)
    return _routing.row_stats(logits, targets, outputs, dim, settings, backend, inplace_backward)


def gate_rows(
    logits: Tensor,
    targets: Tensor,
    threshold: float | Tensor,
    *,
    weights: Mapping[str, float],
    offset: Tensor | None = None,
    outputs: str | Collection[str] = (),
    dim: int = -1,
    temperature: float = 1.0,
    softcap: float | None = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int | None = -100,
    gate_temperature: float = 0.0,
    p_min: float = 0.0,
    seed: int = 0,
    step: int | Tensor = 0,
    backend: str | None = None,
    **unserved: Any,
) -> GatedRows:
    """Compute ``row_stats`` and compare their weighted sum with a threshold, in one pass.

    significance = sum_k weights[k] * stat_k + offset; a row is kept if its significance > threshold. With
    ``gate_temperature`` T > 0 it is kept with probability p = clip(sigmoid((significance - threshold) / T), p_min, 1)
    and weighs 1/p.

    Args:
        logits: as in :func:`row_stats`.
        targets: as in :func:`row_stats`.
        threshold: a number, or one floating element on the logits' device; read there, never by the host. NaN keeps
            nothing.
        weights: weight of each statistic in the significance, such as ``{"loss": 0.7, "entropy": 0.3}``; all but
            ``argmax``. Not the rows' weights, which are in the result.
        offset: floating tensor of the targets' shape, added to the significance; NaN makes a row invalid.
            Default: none.
        outputs: statistics to return besides. Default: none.
        dim: dimension of the classes. Default: the last.
        temperature: divides the logits; above 0. Default: 1.
        softcap: bound of the logits, by tanh, infinities among them; 0 (the default) or None for none.
        label_smoothing: of the loss, in [0, 1]. Default: 0.
        ignore_index: target of the rows that are never kept; None for no such target. Default: -100.
        gate_temperature: 0 (the default) compares; above 0 rows are drawn.
        p_min: least probability of a draw, in [0, 1]. Default: 0.
        seed: of the draws (Philox4x32-10). Default: 0.
        step: number of the draw, an int or a one-element int64 tensor. A draw depends on seed, step and the row's
            number alone. Default: 0.
        backend: as in :func:`row_stats`. Default: the first that serves the call.

    Returns:
        GatedRows, none of it differentiable. Ignored and invalid rows are never kept; invalid ones are counted.

    Raises:
        TypeError: as :func:`row_stats`.
        ValueError: as :func:`row_stats`, and a wrong threshold, weight or offset.
        BackendUnavailable: the named backend cannot serve the call.

    Example:
        >>> gated = gate_rows(logits, targets, torch.tensor(1.5), weights={"loss": 1.0})
        >>> kept = compact(gated.mask).take((inputs, targets))
    """
    if unserved:
        refuse_unserved(gate_rows, unserved)
    settings = checked_settings(
        temperature, softcap, label_smoothing, ignore_index, gate_temperature, p_min, seed, step
    )
    if not outputs and offset is None and may_be_direct(backend, logits, dim):
        gated = cpp_direct.gate_rows(logits, targets, threshold, weights, settings)
        if gated is not None:
            return gated
    tensors = (logits, targets, threshold) if type(step) is int else (logits, targets, threshold, settings.step)
    known = known_of(GateCall, tensors, outputs, dim, offset)
    call = GateCall(logits, targets, outputs, dim, settings, cast(Tensor, threshold), weights, offset, known=known)
    return _routing.gate_rows(call, backend)


def compact(
    mask: Tensor, *, weight: Tensor | None = None, capacity: int | None = None, backend: str | None = None
) -> Selection:
    """Pack the indices of the rows that a mask keeps, in ascending order.

    Args:
        mask: bool [rows], fewer than 2^31 rows.
        weight: of each row, float32 [rows], packed beside the indices. Default: 1 for each row.
        capacity: number of slots of the result, whatever the mask holds. The rest is padded with index 0 and weight
            0, and nothing waits for the device; rows that do not fit are counted in ``overflow``. Default: exactly
            ``count`` slots, which costs one synchronisation on an accelerator.
        backend: ``cpp``, ``cuda``, ``gpu`` or ``torch``. Default: the first that serves the call.

    Returns:
        Selection.

    Raises:
        ValueError: a mask that is not bool, not 1-D or too long, a weight of another shape or dtype, a bad capacity.
        BackendUnavailable: the named backend cannot serve the call.

    Example:
        >>> compact(torch.tensor([True, False, True]), capacity=4).index
        tensor([0, 2, 0, 0])
    """
    if may_be_direct(backend, mask):
        selection = cpp_direct.compact(mask, weight, capacity)
        if selection is not None:
            return selection
    return _routing.compact(CompactCall(mask, weight, capacity), backend)


def select(
    logits: Tensor,
    targets: Tensor,
    threshold: float | Tensor,
    *,
    weights: Mapping[str, float],
    tree: Any = None,
    capacity: int | None = None,
    offset: Tensor | None = None,
    outputs: str | Collection[str] = (),
    dim: int = -1,
    temperature: float = 1.0,
    softcap: float | None = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int | None = -100,
    gate_temperature: float = 0.0,
    p_min: float = 0.0,
    seed: int = 0,
    step: int | Tensor = 0,
    backend: str | None = None,
    **unserved: Any,
) -> Selected:
    """Select rows by their logits and pack them: ``gate_rows``, ``compact`` and ``gather_rows`` as one call.

    Args:
        logits: as in :func:`row_stats`.
        targets: as in :func:`row_stats`.
        threshold: as in :func:`gate_rows`.
        weights: as in :func:`gate_rows`.
        tree: as in :func:`gather_rows`, with a row in dim 0 for every target, in the order of the targets flattened.
            Default: nothing is packed.
        capacity: as in :func:`compact`: with one nothing waits for the device. Default: none.
        offset: as in :func:`gate_rows`. Default: none.
        outputs: statistics to return besides. Default: none.
        dim: dimension of the classes. Default: the last.
        temperature: divides the logits; above 0. Default: 1.
        softcap: bound of the logits, by tanh, infinities among them; 0 (the default) or None for none.
        label_smoothing: of the loss, in [0, 1]. Default: 0.
        ignore_index: target of the rows that are never kept; None for no such target. Default: -100.
        gate_temperature: as in :func:`gate_rows`; its 1/p are the selection's weights. Default: 0.
        p_min: least probability of a draw, in [0, 1]. Default: 0.
        seed: of the draws. Default: 0.
        step: number of the draw, an int or a one-element int64 tensor. Default: 0.
        backend: ``cpp``, ``cuda``, ``gpu`` or ``torch``. Default: the first that serves the call.

    Returns:
        Selected. ``packed`` is differentiable in the tree.

    Raises:
        TypeError: as :func:`row_stats`.
        ValueError: as :func:`gate_rows`, :func:`compact` and :func:`gather_rows`.
        BackendUnavailable: the named backend cannot serve the call.

    Example:
        >>> kept = select(logits, targets, threshold, weights={"loss": 1.0}, tree=(inputs, targets), capacity=64)
        >>> inputs, targets = kept.packed
    """
    if unserved:
        refuse_unserved(select, unserved)
    settings = checked_settings(
        temperature, softcap, label_smoothing, ignore_index, gate_temperature, p_min, seed, step
    )
    if not outputs and offset is None and may_be_direct(backend, logits, dim):
        selected = cpp_direct.select(logits, targets, threshold, weights, settings, tree, capacity)
        if selected is not None:
            if tree is None or selected.packed is not None:
                return selected
            return selected._replace(packed=gather_rows(tree, selected.selection, backend=backend))
    call = SelectCall(logits, targets, outputs, dim, settings, cast(Tensor, threshold), weights, offset, tree, capacity)
    return _routing.select(call, backend)


def gate_step(
    logits: Tensor,
    targets: Tensor,
    state: ControlState,
    setpoint: float | Tensor,
    *,
    weights: Mapping[str, float],
    capacity: int | None = None,
    offset: Tensor | None = None,
    by_mass: bool = False,
    dim: int = -1,
    label_smoothing: float = 0.0,
    ignore_index: int | None = -100,
    gate_temperature: float = 0.0,
    p_min: float = 0.0,
    seed: int = 0,
    backend: str | None = None,
    **unserved: Any,
) -> Selected:
    """Select rows at a controller's threshold, then update the controller: ``select`` and ``control`` as one call.

    Args:
        logits: as in :func:`row_stats`.
        targets: as in :func:`row_stats`.
        state: of one controller, updated in place; its step is that of the draws.
        setpoint: a number, or one float32 element, in (0, 1]: the target rate, or with ``by_mass`` the target
            share of the sum of ``grad_norm``.
        weights: as in :func:`gate_rows`.
        capacity: as in :func:`compact`. Default: none.
        offset: as in :func:`gate_rows`. Default: none.
        by_mass: count rows by their ``grad_norm``. Default: False.
        dim: dimension of the classes. Default: the last.
        label_smoothing: of the loss, in [0, 1]. Default: 0.
        ignore_index: target of the rows that are never kept; None for no such target. Default: -100.
        gate_temperature: as in :func:`gate_rows`. Default: 0.
        p_min: least probability of a draw, in [0, 1]. Default: 0.
        seed: of the draws. Default: 0.
        backend: ``cpp``, ``cuda``, ``gpu`` or ``torch``. Default: the first that serves the call.

    Returns:
        Selected, with nothing packed; with ``by_mass`` its statistics hold ``grad_norm``.

    Raises:
        TypeError: as :func:`row_stats`.
        ValueError: as :func:`select` and :func:`control`; the state has not changed then.
        BackendUnavailable: the named backend cannot serve the call.
    """
    if unserved:
        refuse_unserved(gate_step, unserved)
    settings = checked_settings(1.0, 0.0, label_smoothing, ignore_index, gate_temperature, p_min, seed)
    if type(state) is not ControlState:
        check_state(state, ())
    if offset is None and may_be_direct(backend, logits, dim):
        stepped = cpp_direct.gate_step(logits, targets, state, setpoint, weights, settings, capacity, by_mass)
        if stepped is not None:
            return stepped
    outputs = ("grad_norm",) if by_mass else ()
    known = known_of(GateStepCall, (logits, targets, *state, setpoint), outputs, dim, offset)
    return _routing.gate_step(
        GateStepCall(
            logits, targets, outputs, dim, settings, state.values, weights, offset, capacity, state,
            cast(Tensor, setpoint), by_mass, known=known,
        ),
        backend,
    )  # fmt: skip


def initial_state(threshold: float | Tensor = -math.inf) -> ControlState:
    """Return the state of a threshold's controller before its first batch, for ``control`` and ``gate_step``.

    Args:
        threshold: a number, or float32 [...] for as many states, whose device is the state's. Default: -inf, which
            starts automatically, inside the first batch.

    Raises:
        TypeError: a threshold that is neither.
    """
    given: Any = threshold
    if isinstance(given, numbers.Real):
        given = scalar("threshold", given, torch.float32)
    given = vetted("threshold", given)
    if given.dtype is not torch.float32:
        raise TypeError(f"`threshold` must be a number or float32, got {described(given)}")
    return control_law.initial_state(given)


def control(
    state: ControlState,
    significance: Tensor,
    setpoint: float | Tensor,
    *,
    labels: Tensor | None = None,
    ignore_index: int | None = -100,
    mass: Tensor | None = None,
    overflow: Tensor | None = None,
    gate_temperature: float = 0.0,
    p_min: float = 0.0,
    backend: str | None = None,
) -> None:
    """Update a gate's threshold by one batch, in place, so that the fraction of rows above it meets a set-point.

    ``gate_rows`` takes ``state.value("threshold")``. Nothing waits for a device, and nothing locks a state: one thread
    at a time may update it. ``sparse_kernels/control_law.py`` derives the law.

    Args:
        state: from :func:`initial_state`. Rows of NaN are counted in it.
        significance: floating [rows], or [..., rows] for states of shape [...]. Rows of NaN do not count for the
            rate. A batch without a valid row changes nothing but the counters.
        setpoint: float32, one element a state, or a number for all of them, in (0, 1]: the target rate. 1 fixes the
            threshold at -inf. 0 or less counts as 1e-12. A batch at NaN changes nothing but the counters.
        labels: int64, int32 or bool of significance's shape; rows equal to ``ignore_index`` do not count.
            Default: all rows count.
        ignore_index: label of the rows that do not count; 0 for a bool of valid rows, None for no such label.
            Default: -100.
        mass: floating of significance's shape, 0 or above: the set-point is then a share of its sum. Default: each
            row counts 1.
        overflow: int32, one element a state, from a selection: added to the counter, except for the batch that an
            automatic start keeps whole. Default: nothing is added.
        gate_temperature: of the gate that uses the threshold, as in :func:`gate_rows`. Default: 0.
        p_min: of the gate that uses the threshold, as in :func:`gate_rows`. Default: 0.
        backend: ``cpp``, ``cuda``, ``gpu`` or ``torch``. Default: the first that serves the call.

    Raises:
        ValueError: a wrong dtype, shape, device or setting.
        BackendUnavailable: the named backend cannot serve the call.

    Example:
        >>> state = initial_state()
        >>> control(state, gated.significance, 0.1)
    """
    settings = checked_settings(ignore_index=ignore_index, gate_temperature=gate_temperature, p_min=p_min)
    _routing.control(
        ControlCall(state, significance, cast(Tensor, setpoint), labels, mass, overflow, settings), backend
    )


def gather_rows(tree: Any, selection: Selection, *, backend: str | None = None) -> Any:
    """Pack the selected rows (dim 0) of every tensor and NumPy array of a nested structure.

    Padding slots read row 0. Differentiable: the backward is ``scatter_rows``, to which padding adds nothing.

    Args:
        tree: nested structure of tensors and NumPy arrays with ``selection.size`` rows in dim 0. Mappings, sequences,
            dataclasses and what ``torch.utils._pytree`` knows are opened and made anew. None, numbers, texts and other
            objects without length, shape or items stay. An array is indexed by the host, which waits for a device.
        selection: the rows, from :func:`compact` or :func:`select`.
        backend: ``cpp``, ``cuda``, ``gpu`` or ``torch``. Default: the first that serves the call.

    Returns:
        The same structure with ``len(selection.index)`` rows.

    Raises:
        TypeError: a selection of other tensors than ``compact`` makes; a part of the tree that might hold rows and is
            not known, such as a list with a number or a text for each row, or a data frame.
        ValueError: a tensor of another number of rows, or on another device; an index out of range (on an accelerator,
            where looking would wait, a row of zeros).
        BackendUnavailable: the named backend cannot serve the call.

    Example:
        >>> inputs, targets = gather_rows((inputs, targets), compact(mask))
    """
    if type(selection) is not Selection:
        vetted_selection(selection)
    return _routing.gather_rows(tree, selection, backend)


def scatter_rows(tree: Any, selection: Selection, *, backend: str | None = None) -> Any:
    """Put packed rows back in their places, zeros elsewhere: the transpose of ``gather_rows``.

    Args:
        tree: as in :func:`gather_rows`, with ``len(selection.index)`` rows in dim 0.
        selection: the rows' places.
        backend: ``cpp``, ``cuda``, ``gpu`` or ``torch``. Default: the first that serves the call.

    Returns:
        The same structure with ``selection.size`` rows; padding slots are dropped.

    Raises:
        TypeError: a selection of other tensors than ``compact`` makes; a part of the tree that might hold rows and is
            not known, such as a list with a number or a text for each row, or a data frame.
        ValueError: a tensor of another number of rows, or on another device; an index out of range (on an accelerator,
            where looking would wait, a row of zeros).
        BackendUnavailable: the named backend cannot serve the call.
    """
    return _routing.scatter_rows(tree, selection, backend)


types.register_gather_rows(gather_rows)
