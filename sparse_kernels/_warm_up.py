"""Warm-up: what would otherwise happen inside the first calls."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from sparse_kernels import ops
from sparse_kernels._info import BackendInfo, backend_info, named_device
from sparse_kernels._operands import integer, kind
from sparse_kernels.self_check import proof
from sparse_kernels.self_check.cases import DTYPES


def warm_up(
    device: str | torch.device,
    shapes: Iterable[Sequence[int]],
    *,
    dtype: torch.dtype = torch.float32,
    dim: int = -1,
    outputs: str | Collection[str] = ("loss", "entropy"),
    weights: Mapping[str, float] | None = None,
    gate_temperature: float = 0.0,
    capacity: int | None = None,
) -> BackendInfo:
    """Check, compile and run the kernels for these logits, before a CUDA graph is captured or a model is compiled.

    Every operation is called once for each shape, on logits of zeros, with the gradient of ``row_stats``. A kernel
    that has not been proved on this device yet is checked first, without the time limit of a check at first use. A
    captured or compiled step then has its kernels, if its outputs, weights and settings are these.

    Args:
        device: a PyTorch device, such as ``cuda``.
        shapes: of the logits, such as ``[(4096, 1000)]``.
        dtype: of the logits: float32 (the default), bfloat16, float16 or float64.
        dim: dimension of the classes. Default: the last.
        outputs: statistics of ``row_stats``. Default: loss and entropy.
        weights: of the statistics in ``gate_rows``, ``select`` and ``gate_step``. Default: the loss alone.
        gate_temperature: of the gate, as in :func:`gate_rows`. Default: 0.
        capacity: slots of the selection, as in :func:`compact`. Default: the rows of each shape.

    Returns:
        The backends that serve the device from now on, as :func:`backend_info` returns them.

    Raises:
        TypeError: shapes that are not sequences of ints; a dtype that no operation takes; no device or its name.
        ValueError: a GPU where there is none, or a name of no device; sizes or a dimension that logits cannot have;
            otherwise as :func:`row_stats` and :func:`gate_rows`.
        RuntimeError: a CUDA graph is being captured.

    Example:
        >>> sparse_kernels.warm_up("cuda", [(4096, 1000)], dtype=torch.bfloat16)
    """
    where = named_device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"`device` must be one that PyTorch finds, got {where}, and there is no CUDA device")
    if where.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("`warm_up` must be called before a CUDA graph is captured, not during the capture")
    given: Any = shapes
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise TypeError(f"`shapes` must be shapes of logits, such as [(4096, 1000)], got {kind(given)}")
    if dtype not in DTYPES:
        raise TypeError(f"`dtype` must be float32, bfloat16, float16 or float64, got {dtype}")
    sizes = [_sizes(shape, dim) for shape in given]
    weighed = {"loss": 1.0} if weights is None else weights
    with proof.without_limit(), torch.inference_mode(False), torch.enable_grad():
        for size in sizes:
            logits = torch.zeros(size, dtype=dtype, device=where, requires_grad=True)
            targets = torch.zeros_like(logits.detach().select(dim, 0), dtype=torch.int64)
            _run(logits, targets, dim, outputs, weighed, gate_temperature, capacity)
    return backend_info(where)


def _sizes(shape: Any, dim: int) -> list[int]:
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Sequence):
        raise TypeError(f"`shapes` must be shapes of logits, such as [(4096, 1000)], got one of {kind(shape)}")
    sizes = [integer("shapes", size) for size in shape]
    if not -len(sizes) <= integer("dim", dim) < len(sizes):
        raise ValueError(f"`dim` must be a dimension of the logits, of shape {tuple(sizes)}, got {dim}")
    if min(sizes) < 0 or sizes[dim] == 0:
        raise ValueError(f"`shapes` must have no negative size and a class in dim {dim}, got {tuple(sizes)}")
    return sizes


def _run(
    logits: torch.Tensor, targets: torch.Tensor, dim: int, outputs: str | Collection[str],
    weights: Mapping[str, float], gate_temperature: float, capacity: int | None,
) -> None:  # fmt: skip
    """Call every operation, each of which may have a kernel of its own."""
    settings = {"dim": dim, "weights": weights, "gate_temperature": gate_temperature}
    slots = targets.numel() if capacity is None else capacity
    stats = ops.row_stats(logits, targets, outputs=outputs, dim=dim)
    differentiable = [s for s in (stats.loss, stats.entropy) if s is not None]
    if differentiable:
        torch.autograd.grad([s.sum() for s in differentiable], logits)
    scored = logits.detach()
    ops.row_stats(scored, targets, outputs=outputs, dim=dim)
    gated = ops.gate_rows(scored, targets, 1.0, **settings)  # type: ignore[arg-type]
    selection = ops.compact(gated.mask.flatten(), capacity=slots)
    rows = targets.flatten()
    ops.scatter_rows(ops.gather_rows(rows, selection), selection)
    state = ops.initial_state(torch.ones((), dtype=torch.float32, device=logits.device))
    ops.control(state, gated.significance.flatten().float(), 0.5, labels=rows)
    ops.select(scored, targets, 1.0, tree=rows, capacity=slots, **settings)  # type: ignore[arg-type]
    ops.gate_step(scored, targets, state, 0.5, capacity=slots, **settings)  # type: ignore[arg-type]
