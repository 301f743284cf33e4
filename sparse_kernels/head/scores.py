"""Statistics of a head's rows, chunk by chunk, and their gradients from the rows that have one.

Forward: one product a row that counts. Backward: three a row whose upstream gradient is not zero, the first of them
the logits once more, which the gradient then overwrites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_kernels._arguments import StatsCall
from sparse_kernels._dispatch import BACKENDS, choose
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
from sparse_kernels.reference import transform_logits

_WORD = torch.int64
SAVED = ("maximum", "total")  # of each row, for the gradient


class Scored(NamedTuple):
    """Statistics of some rows, and the call that computed them."""

    call: StatsCall
    backend: str
    values: dict[str, Tensor]  # by name of statistic, and SAVED; [some rows] each


def score(head: FlatHead, logits: Tensor, target: Tensor, outputs: Sequence[str]) -> Scored:
    """Score rows whose logits are in memory.

    Args:
        head: the settings.
        logits: [some rows, classes].
        target: [some rows].
        outputs: names among ``HEAD_STATISTICS``.
    """
    own = tuple(name for name in outputs if name != "mean_logits")
    call = StatsCall(logits, target, own, -1, head.settings)
    backend, _ = choose("row_stats", call, None)
    stats, maximum, total = BACKENDS[backend].row_stats_saving(call)
    values = {name: getattr(stats, name) for name in own}
    if "mean_logits" in outputs:
        z = transform_logits(logits, head.settings.temperature, head.settings.softcap)
        values["mean_logits"] = z.mean(-1)
    return Scored(call, backend, {**values, "maximum": maximum, "total": total})


def statistics(head: FlatHead, outputs: Sequence[str]) -> dict[str, Tensor]:
    """Return the statistics and ``SAVED`` of every row, [rows] each; 0 for rows that do not count.

    Args:
        head: the rows.
        outputs: names among ``HEAD_STATISTICS``.
    """
    head.check_targets()
    rows = head.target.shape[0]
    results = {
        name: head.input.new_zeros(rows, dtype=torch.int64 if name == "argmax" else head.accumulator)
        for name in (*outputs, *SAVED)
    }
    index = head.valid.nonzero().squeeze(1)
    size = scored_rows(head, index.shape[0])
    buffer = large_pages(head.input.new_empty(size, head.weight.shape[0]))
    for start in range(0, index.shape[0], size):
        some = index[start : start + size]
        logits = logits_of(rows_of(head.input, some), head, buffer)
        scored = score(head, logits, rows_of(head.target, some), outputs)
        for name, values in results.items():
            values.index_copy_(0, some, scored.values[name])
    count(scored=index.shape[0])
    return results


def rows_of(tensor: Tensor, index: Tensor) -> Tensor:
    """Return rows of dim 0 by an ascending index without repeats.

    Args:
        tensor: [rows, ...].
        index: int64 [some rows].
    """
    return tensor if index.shape[0] == tensor.shape[0] else tensor.index_select(0, index)


def copy_rows(logits: Tensor, index: Tensor, out: Tensor) -> None:
    """Copy rows of logits, by words of 8 bytes where a row is made of such.

    PyTorch copies row by row, and starts threads for each that has many elements, which takes longer than the row.

    Args:
        logits: [rows, classes], contiguous.
        index: int64 [some rows].
        out: [some rows, classes], contiguous.
    """
    if logits.shape[1] * logits.element_size() % _WORD.itemsize == 0:
        logits, out = logits.view(_WORD), out.view(_WORD)
    torch.index_select(logits, 0, index, out=out)


def differentiate_logits(
    head: FlatHead, logits: Tensor, target: Tensor, saved: Mapping[str, Tensor], upstream: Mapping[str, Tensor]
) -> None:
    """Write the gradient of some rows' logits over the logits.

    Args:
        head: the settings.
        logits: [some rows, classes].
        target: [some rows].
        saved: ``SAVED``, and the entropy where it has an upstream gradient, [some rows] each.
        upstream: of ``loss``, ``entropy`` or both, [some rows] each.
    """
    call = StatsCall(logits, target, tuple(upstream), -1, head.settings)
    backend, _ = choose("row_stats", call, None)
    BACKENDS[backend].row_stats_backward(
        call, saved["maximum"], saved["total"], saved.get("entropy"), dict(upstream), logits
    )  # fmt: skip


class HeadGradients(NamedTuple):
    """Gradients of a head; None for one that is not needed."""

    input: Tensor | None  # [rows, hidden]
    weight: Tensor | None  # [classes, hidden]
    bias: Tensor | None  # [classes]


def gradients(
    head: FlatHead, saved: dict[str, Tensor], upstream: dict[str, Tensor], needed: Sequence[bool]
) -> HeadGradients:
    """Return the gradients of loss and entropy, from the rows whose upstream gradients are not all zero.

    Args:
        head: the rows.
        saved: ``SAVED``, and the entropy where it has an upstream gradient, [rows] each.
        upstream: of ``loss``, ``entropy`` or both, [rows] each. NaN is not zero.
        needed: for each of ``HeadGradients``.
    """
    used = torch.stack([gradient != 0.0 for gradient in upstream.values()]).any(0) & head.valid
    index = used.nonzero().squeeze(1)
    input = torch.zeros_like(head.input) if needed[0] else None
    parameters = ParameterGradients(head, weight=needed[1], bias=needed[2])
    kept = index.shape[0]
    size = differentiated_rows(head, kept)
    buffer = large_pages(head.input.new_empty(size, head.weight.shape[0]))
    for start in range(0, kept, size):
        some = index[start : start + size]
        rows = head.input.index_select(0, some)
        gradient = logits_of(rows, head, buffer)
        row = {name: values.index_select(0, some) for name, values in saved.items()}
        above = {name: values.index_select(0, some) for name, values in upstream.items()}
        differentiate_logits(head, gradient, head.target.index_select(0, some), row, above)
        if input is not None:
            input.index_copy_(0, some, input_gradient(gradient, head))
        parameters.add(gradient, rows, last=start + size >= kept)
    count(recomputed=kept, differentiated=kept)
    return HeadGradients(input, *parameters.results())
