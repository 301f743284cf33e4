"""Matrix products of a head: logits of some rows, and the sums that make the gradients of weight and bias.

Bytes of the weight's gradient: written once if all rows fit one tile. Otherwise tiles are summed: in place where the
dtype is that of the arithmetic, else in float32, since sums rounded to bfloat16 tile by tile drift.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_kernels.head.call import FlatHead

_SCORE_BYTES = {"cpu": 32 << 20}  # of logits that are scored and dropped: about the last-level cache
_ACCELERATOR_SCORE_BYTES = 256 << 20
_PART = 4096  # classes whose products are summed while they are in the cache
_LEAST_ROWS = 16


def scored_rows(head: FlatHead) -> int:
    """Return how many rows are scored at a time: those whose logits fit a cache, or a share of an accelerator.

    Args:
        head: the rows.
    """
    if head.chunk is not None:
        return head.chunk
    budget = _SCORE_BYTES.get(head.input.device.type, _ACCELERATOR_SCORE_BYTES)
    return max(_LEAST_ROWS, budget // (head.weight.shape[0] * head.input.element_size()))


def differentiated_rows(head: FlatHead) -> int:
    """Return how many rows are differentiated at a time: so many that their logits weigh as much as the weight in
    float32, which is what a sum over several tiles would take besides.

    Args:
        head: the rows.
    """
    if head.chunk is not None:
        return head.chunk
    return max(scored_rows(head), 4 * head.weight.shape[1] // head.input.element_size())


def logits_of(input: Tensor, head: FlatHead, out: Tensor) -> Tensor:
    """Compute the logits of some rows into the first rows of ``out``.

    Args:
        input: [some rows, hidden].
        head: weight and bias.
        out: at least as many rows.
    """
    logits = out[: input.shape[0]]
    if head.bias is None:
        return torch.mm(input, head.weight.t(), out=logits)
    return torch.addmm(head.bias, input, head.weight.t(), out=logits)


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
        if self._weight is None and (exact or last):
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


def _add_products(total: Tensor, gradient: Tensor, input: Tensor) -> None:
    """Add gradient^T input to a float32 total."""
    if total.is_cuda and hasattr(torch.ops.aten.addmm, "dtype"):  # PyTorch 2.8
        torch.addmm(total, gradient.t(), input, out_dtype=torch.float32, out=total)
        return
    for start in range(0, total.shape[0], _PART):
        total[start : start + _PART] += gradient[:, start : start + _PART].t() @ input
