"""Backend ``triton``: Triton kernels on CUDA tensors, and on CPU tensors under Triton's interpreter, for tests.

Triton is imported by the first call that needs it.

Environment:
    TRITON_INTERPRET: Triton's own; set it to 1 before the first call, to interpret the kernels.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_kernels import reference
from sparse_kernels._arguments import GateCall, StatsCall
from sparse_kernels._tracing import tensor_unsupported_reason
from sparse_kernels.backends.triton.launch import BYTES
from sparse_kernels.backends.triton.plan import Computed, Plan, layout
from sparse_kernels.types import STATISTICS, WEIGHABLE, GatedRows, RowStats

MAX_CLASSES = 2**30  # a row's columns are counted in 32 bits, a block past its end included
_NO_WEIGHTS: dict[str, float] = {}
_new = tuple.__new__  # a named tuple's own constructor is one more call of Python


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("sparse_kernels.backends.triton.row_stats")


@functools.cache
def _backward_kernels() -> Any:
    return importlib.import_module("sparse_kernels.backends.triton.row_stats_backward")


_missing = "triton is not installed" if importlib.util.find_spec("triton") is None else None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def interpreted() -> bool:
    """Return True if kernels run on CPU tensors, in Python. A compiler takes the answer as it is."""
    return os.environ.get("TRITON_INTERPRET") == "1" and _missing is None and bool(_kernels().INTERPRETED)


def unavailable_reason() -> str | None:
    """Return why this backend cannot be used at all, or None."""
    reason = _missing
    if reason is None and not torch.cuda.is_available() and not interpreted():
        reason = "no CUDA device, and not interpreted (TRITON_INTERPRET=1)"
    return reason


def detail() -> str:
    """Return where the kernels run."""
    return "interpreted" if interpreted() else "CUDA"


def row_stats_unsupported_reason(call: StatsCall) -> str | None:
    """Return why this call is not served, or None."""
    logits = call.logits
    if _missing is not None:
        return _missing
    if not logits.is_cuda and not (logits.is_cpu and interpreted()):
        return f"tensors are on {logits.device}, where Triton only runs interpreted (TRITON_INTERPRET=1)"
    reason = tensor_unsupported_reason(logits)
    if reason is not None:
        return reason
    if not logits.is_contiguous() and layout(logits.shape, call.dim, [logits.stride()]) is None:
        return f"the rows of strides {logits.stride()} are not two nested loops"
    if call.classes > MAX_CLASSES:
        return f"{call.classes} classes; it serves {MAX_CLASSES} at most"
    return None


gate_rows_unsupported_reason = row_stats_unsupported_reason


def _signed(value: int) -> int:
    """Return the low 64 bits as a signed number, which Triton takes."""
    return (value + 2**63) % 2**64 - 2**63


@functools.cache
def processors(device: torch.device) -> int:
    """Return a GPU's number of processors; 1 for a CPU, which interprets programs one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


_stride, _address = Tensor.stride, Tensor.data_ptr
_cached_plan = functools.lru_cache(1024)(Plan)  # a batch is like the one before it


def _plan(
    call: StatsCall, shaped: Sequence[Tensor], others: Iterable[Tensor | None], computed: Computed | None
) -> Plan:
    """Return the plan of a call.

    Args:
        call: the call.
        shaped: its tensors of the logits' shape, the logits first.
        others: those whose dtype, or absence, is left open by the logits and by what is computed.
        computed: the statistics; None for a backward.
    """
    logits, settings = call.logits, call.settings
    device = logits.device
    return _cached_plan(
        logits.shape,
        call.dim,
        logits.dtype,
        processors(device),
        tuple(map(_stride, shaped)),
        tuple([address % BYTES for address in map(_address, shaped)]),
        device,
        tuple([None if tensor is None else tensor.dtype for tensor in others]),
        computed,
        settings.label_smoothing > 0,
        settings.softcap > 0,
    )


def _known_plan(call: StatsCall, targets: Tensor, decision: _Decision, computed: Computed) -> Plan:
    """Return the forward's plan, which a known call finds by the little that differs between calls like it."""
    known, settings = call.known, call.settings
    if known is None:
        return _plan(call, (call.logits,), (targets, *decision), computed)
    left = (
        call.logits.data_ptr() % BYTES, processors(call.logits.device), computed,
        settings.gate_temperature > 0, settings.label_smoothing > 0, settings.softcap > 0,
    )  # fmt: skip
    plan: Plan | None = known.plans.get(left)
    if plan is None:
        plan = known.plans[left] = _plan(call, (call.logits,), (targets, *decision), computed)
    return plan


def _settings(call: StatsCall) -> tuple[float, ...]:
    """Return the numbers of plan.SETTINGS."""
    settings = call.settings
    return settings.ignore_index, 1.0 / settings.temperature, settings.softcap, settings.label_smoothing


class _Decision(NamedTuple):
    """The gate's tensors among the forward kernel's arguments: plan.DECISION."""

    mask: Tensor | None = None
    significance: Tensor | None = None
    weight: Tensor | None = None
    offset: Tensor | None = None
    threshold: Tensor | None = None
    invalid: Tensor | None = None
    finished: Tensor | None = None
    step: Tensor | None = None


_NO_DECISION, _NO_DRAW, _NO_SAVED, _NO_RESULTS = _Decision(), (1.0, 0.0, 0, 0), (None, None), (None,) * len(STATISTICS)
_NO_STATS = RowStats()


def _forward(
    call: StatsCall,
    targets: Tensor,
    decision: _Decision = _NO_DECISION,
    draw: tuple[float, float, int, int] = _NO_DRAW,
    saved: tuple[Tensor | None, Tensor | None] = _NO_SAVED,
) -> RowStats:
    """Launch the forward kernel.

    Args:
        call: the call.
        targets: its own, contiguous.
        decision: the gate's tensors.
        draw: the gate's numbers: plan.DRAW.
        saved: what the backward needs of each row: the maximum and the sum of exponentials.
    """
    reference.check_targets(call)  # CPU only
    results: tuple[Tensor | None, ...] = _NO_RESULTS
    if call.outputs:
        accumulator = call.accumulator
        results = tuple([
            torch.empty_like(targets, dtype=torch.int64 if name == "argmax" else accumulator)
            if name in call.outputs else None
            for name in STATISTICS
        ])  # fmt: skip
    if targets.numel():
        weights = call.weights if isinstance(call, GateCall) else _NO_WEIGHTS
        tensors = (call.logits, targets, *results, *saved, *decision)
        computed = tuple(call.outputs), tuple(weights), saved is not _NO_SAVED
        plan = _known_plan(call, targets, decision, computed)
        factors = [float(weights.get(name, 0.0)) for name in WEIGHABLE]
        sums = lowest = None
        if plan.scratch:
            sums = torch.empty(7 * plan.scratch, dtype=call.accumulator, device=targets.device)
            lowest = torch.empty(plan.scratch, dtype=torch.int32, device=targets.device)
        plan.launch(_kernels().row_stats_kernel, (*tensors, *_settings(call), *draw, *factors, sums, lowest))
    return RowStats(*results) if results is not _NO_RESULTS else _NO_STATS


def _detach(call: StatsCall) -> None:
    """Take the call's logits without their gradient, which the interpreter would refuse to copy back."""
    if call.logits.requires_grad:
        call.logits = call.logits.detach()


def row_stats(call: StatsCall) -> RowStats:
    """Serve ``sparse_kernels.row_stats``; not differentiable, which ``torch_library`` adds."""
    _detach(call)
    return _forward(call, call.targets.contiguous())


def row_stats_saving(call: StatsCall) -> tuple[RowStats, Tensor, Tensor]:
    """Serve ``row_stats``, and return what its gradient needs of each row.

    Returns:
        The statistics, the maximum of the logits after the softcap, and the sum of exponentials.
    """
    _detach(call)
    targets = call.targets.contiguous()
    maximum = torch.empty_like(targets, dtype=call.accumulator)
    total = torch.empty_like(maximum)
    return _forward(call, targets, saved=(maximum, total)), maximum, total


def row_stats_backward(
    call: StatsCall, maximum: Tensor, total: Tensor, entropy: Tensor | None, upstream: dict[str, Tensor], out: Tensor
) -> None:
    """Write the gradient in the logits to ``out``.

    Args:
        call: the forward's call.
        maximum: saved by the forward, contiguous, of the targets' shape and the results' dtype.
        total: as ``maximum``.
        entropy: the forward's, contiguous; None without an upstream gradient of it.
        upstream: the contiguous upstream gradient of ``loss``, ``entropy`` or both, in the results' dtype.
        out: the logits' shape and dtype; it may be the logits.
    """
    _detach(call)
    logits, targets = call.logits, call.targets.contiguous()
    if not targets.numel():
        return
    if layout(logits.shape, call.dim, [logits.stride(), out.stride()]) is None:
        # Each is two nested loops, but both together are three.
        logits = logits.movedim(call.dim, -1).contiguous()
        gradient = torch.empty_like(logits)
        row_stats_backward(
            replace(call, logits=logits, dim=-1, known=None), maximum, total, entropy, upstream, gradient
        )
        out.movedim(call.dim, -1).copy_(gradient)
        return
    tensors = (logits, out, targets, maximum, total, entropy, upstream.get("loss"), upstream.get("entropy"))
    plan = _plan(call, (logits, out), tensors[2:], None)
    plan.launch(_backward_kernels().row_stats_backward_kernel, (*tensors, *_settings(call)))


def gate_rows(call: GateCall) -> GatedRows:
    """Serve ``sparse_kernels.gate_rows``."""
    return _gate_rows(call, torch.zeros((), dtype=torch.int32, device=call.logits.device))


def gate_rows_uncounted(call: GateCall, finished: Tensor) -> GatedRows:
    """Serve ``gate_rows`` and leave ``invalid`` to be written by a kernel that follows on the stream: a launch less.

    Args:
        call: the call.
        finished: int32, for the kernel that follows: if there are rows, its first element is 0 by then.
    """
    return _gate_rows(call, torch.empty((), dtype=torch.int32, device=call.logits.device), finished)


def _gate_rows(call: GateCall, invalid: Tensor, finished: Tensor | None = None) -> GatedRows:
    _detach(call)
    targets, settings, step = call.targets.contiguous(), call.settings, call.step
    mask = torch.empty_like(targets, dtype=torch.bool)
    significance = torch.empty_like(targets, dtype=call.accumulator)
    weight, on_device, draw = None, None, _NO_DRAW
    if settings.gate_temperature:
        weight = torch.empty_like(significance, dtype=torch.float32)
        if isinstance(step, Tensor) and step.device == invalid.device:
            on_device, step = step, 0
        draw = (settings.gate_temperature, settings.p_min, _signed(settings.seed), _signed(int(step)))
    offset = None if call.offset is None else call.offset.detach().contiguous()
    counted = invalid if finished is None else None
    threshold = call.threshold.detach() if call.threshold.requires_grad else call.threshold
    decision = _new(_Decision, (mask, significance, weight, offset, threshold, counted, finished, on_device))
    return _new(GatedRows, (mask, significance, weight, _forward(call, targets, decision, draw), invalid))
