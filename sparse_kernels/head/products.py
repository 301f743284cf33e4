"""Matrix products of a head: logits of some rows, their gradients, and the sums that make those of weight and bias.

Bytes of the weight's gradient: written once if all rows fit one tile. Otherwise tiles are summed: in place where the
dtype is that of the arithmetic, else in float32, since sums rounded to bfloat16 tile by tile drift.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sparse_kernels.head import onednn
from sparse_kernels.head.call import FlatHead

# Of logits that are scored and dropped. On a CPU about the last-level cache, and less than the 32 MB from which glibc's
# allocator returns memory to the system whenever it is freed: fresh pages cost as much as the scores.
_SCORE_BYTES = {"cpu": 30 << 20}
_ACCELERATOR_SCORE_BYTES = 256 << 20
_PART = 4096  # classes whose products are summed while they are in the cache
_LEAST_ROWS = 256  # that read a weight, whatever their logits weigh
_GAP = 16  # columns behind a block's, so that its rows are no multiple of 4 KB apart


def scored_rows(head: FlatHead, rows: int) -> int:
    """Return how many rows are scored at a time, at least 1: their logits fit a cache, or a share of an accelerator.

    Args:
        head: weight and chunk.
        rows: to be scored; dealt out evenly, since a tile of a few rows reads the whole weight too.
    """
    if head.chunk is not None:
        return max(min(head.chunk, rows), 1)
    budget = _SCORE_BYTES.get(head.input.device.type, _ACCELERATOR_SCORE_BYTES)
    size = max(_LEAST_ROWS, budget // (head.weight.shape[0] * head.input.element_size()))
    tiles = max(math.ceil(rows / size), 1)
    return max(math.ceil(rows / tiles), 1)


def differentiated_rows(head: FlatHead, rows: int) -> int:
    """Return how many rows are differentiated at a time, at least 1: so many that their logits weigh as much as the
    weight in float32, which is what a sum over several tiles would take besides.

    Args:
        head: weight and chunk.
        rows: to be differentiated.
    """
    scored = scored_rows(head, rows)
    if head.chunk is not None:
        return scored
    return max(scored, min(4 * head.weight.shape[1] // head.input.element_size(), rows))


def reserved_rows(head: FlatHead, expected: int, most: int) -> int:
    """Return for how many rows' logits memory is taken at once: all, or as many as stay with the process when freed.

    Args:
        head: the weight.
        expected: rows that are likely to be held.
        most: rows that are ever held.
    """
    lasting = _SCORE_BYTES.get(head.input.device.type, 0) // (head.weight.shape[0] * head.input.element_size())
    return min(lasting, most) if expected <= lasting else most


def logits_of(input: Tensor, head: FlatHead, out: Tensor) -> Tensor:
    """Compute the logits of some rows into the first rows of ``out``.

    Args:
        input: [some rows, hidden].
        head: weight and bias.
        out: at least as many rows.
    """
    logits = out[: input.shape[0]]
    if onednn.serves(input, head.weight):
        for part in _parts(out.shape[1]):
            bias = None if head.bias is None else head.bias[part]
            logits[:, part] = onednn.linear(input, head.weight[part], bias)
        return logits
    if head.bias is None:
        return torch.mm(input, head.weight.t(), out=logits)
    return torch.addmm(head.bias, input, head.weight.t(), out=logits)


def input_gradient(gradient: Tensor, head: FlatHead) -> Tensor:
    """Return the gradient of some rows of the input.

    Args:
        gradient: of their logits, [some rows, classes].
        head: the weight.
    """
    if onednn.serves(gradient, head.weight):
        return onednn.linear(gradient, head.weight.t())
    return gradient @ head.weight


class ParameterGradients:
    """Gradients of weight and bias, summed tile by tile.

    Args:
        head: weight and bias.
        weight: the weight's gradient is needed.
        bias: the bias's gradient is needed.
    """

    def __init__(self, head: FlatHead, *, weight: bool, bias: bool) -> None:
        self._head = head
        self._needs_weight, self._needs_bias = weight, bias
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None

    def add(self, gradient: Tensor, input: Tensor, *, last: bool) -> None:
        """Add a tile.

        Args:
            gradient: of the logits, [some rows, classes].
            input: [some rows, hidden].
            last: no tile follows.
        """
        if self._needs_bias:
            summed = gradient.sum(0, dtype=self._head.accumulator)
            self._bias = summed if self._bias is None else self._bias.add_(summed)
        if not self._needs_weight:
            return
        shape, exact = self._head.weight.shape, gradient.dtype is self._head.accumulator
        if onednn.serves(input, self._head.weight):
            first = self._weight is None
            self._weight = gradient.new_empty(shape) if self._weight is None else self._weight
            _sum_by_onednn(self._weight, gradient, input, add=not first)
        elif self._weight is None and (exact or last):
            self._weight = torch.mm(gradient.t(), input, out=gradient.new_empty(shape))
        elif exact:
            assert self._weight is not None
            self._weight.addmm_(gradient.t(), input)
        else:
            if self._weight is None:
                self._weight = gradient.new_zeros(shape, dtype=self._head.accumulator)
            _add_products(self._weight, gradient, input)

    def results(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of weight and bias in their own dtype, None for one that is not needed."""
        weight, bias, like = self._weight, self._bias, self._head.weight
        if self._needs_weight:
            weight = like.new_zeros(like.shape) if weight is None else weight.to(like.dtype)
        if self._needs_bias:
            bias = like.new_zeros(like.shape[:1]) if bias is None else bias.to(like.dtype)
        return weight, bias


def _parts(classes: int) -> Iterator[slice]:
    return (slice(start, start + _PART) for start in range(0, classes, _PART))


def _add_products(total: Tensor, gradient: Tensor, input: Tensor) -> None:
    """Add gradient^T input to a float32 total."""
    if total.is_cuda and hasattr(torch.ops.aten.addmm, "dtype"):  # PyTorch 2.8
        torch.addmm(total, gradient.t(), input, out_dtype=torch.float32, out=total)
        return
    for part in _parts(total.shape[0]):
        total[part] += gradient[:, part].t() @ input


def _sum_by_onednn(total: Tensor, gradient: Tensor, input: Tensor, *, add: bool) -> None:
    """Write gradient^T input to the total, or add it.

    oneDNN copies the transpose. Columns of a block are nearer to one another than those of the gradient, whose rows are
    often a multiple of 4 KB apart, so that a column falls on a few lines of a cache.
    """
    weight = input.contiguous().t()
    padded = gradient.new_empty(gradient.shape[0], min(_PART, total.shape[0]) + _GAP)
    for part in _parts(total.shape[0]):
        columns = gradient[:, part]
        block = padded[:, : columns.shape[1]].copy_(columns)
        product = onednn.linear(block.t(), weight)
        if add:
            total[part] += product
        else:
            total[part] = product
