"""Per-row statistics of a linear layer's logits, which are never held."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_kernels import reference
from sparse_kernels._arguments import StatsCall
from sparse_kernels._operands import refuse_unserved
from sparse_kernels._tracing import transformed
from sparse_kernels.head import operators
from sparse_kernels.head.call import HeadCall, head_settings
from sparse_kernels.types import RowStats


def linear_row_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    outputs: str | Collection[str] = ("loss", "entropy"),
    temperature: float = 1.0,
    softcap: float | None = 0.0,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int | None = -100,
    row_mask: Tensor | None = None,
    chunk: int | None = None,
    **unserved: Any,
) -> RowStats:
    """Compute ``row_stats(F.linear(input, linear_weight, linear_bias), target)`` without holding the logits.

    Rows that are ignored or masked are not multiplied. The backward takes the rows whose upstream gradients are not
    all zero, whatever made them zero: a mask, a quantile, a clip, an advantage of 0. It computes the logits of those
    rows again, and of no other. With a share r of such rows, forward and backward cost 1 + 3r products in place of 3.

    Args:
        input: float32, bfloat16, float16 or float64 [..., hidden].
        linear_weight: [classes, hidden], of the input's dtype and device. Under autocast the dtypes may differ, as in
            ``F.linear``.
        target: int64 or int32 class indices [...].
        linear_bias: [classes]. Default: none.
        outputs: any of ``STATISTICS`` and ``mean_logits``, or the name of one; ``RowStats`` says what each is.
            Default: loss and entropy.
        temperature: divides the logits; above 0. Default: 1.
        softcap: bound of the scaled logits, by tanh; 0 (the default) or None for none.
        logit_scale: multiplies the logits before the softcap; above 0. Default: 1.
        label_smoothing: of the loss alone, as in ``torch.nn.functional.cross_entropy``; in [0, 1]. Default: 0.
        ignore_index: a row with this target gives 0 in every output, and no gradient; None for no such target.
            Default: -100.
        row_mask: bool [...]; a row where it is False is treated as an ignored one. Default: all rows count.
        chunk: number of rows, at least 1, whose logits are in memory at once. Default: scored are as many rows as fit
            30 MB (256 MB on an accelerator), or 256 if these are fewer, and differentiated so many that their logits
            weigh no more than the weight in float32.

    Returns:
        RowStats of shape [...], float32, or float64 for a float64 input. ``loss`` and ``entropy`` are differentiable
        in input, weight and bias, once.

    Raises:
        TypeError: a dtype that is not served or differs from the input's; a tensor without plain bytes, such as a
            sharded or quantised one.
        ValueError: a wrong shape, device, setting or chunk; on CPU, a target out of range in a row that counts (on an
            accelerator its row gives NaN).
        RuntimeError: from the backward, with create_graph=True.

    On an accelerator each pass waits once for the number of rows. Inside a transform (``torch.func``, forward-mode
    differentiation) the logits are held, since only plain PyTorch composes.

    Example:
        >>> stats = linear_row_stats(hidden, head.weight, target, row_mask=is_completion)
        >>> kept = stats.entropy >= stats.entropy.quantile(0.8)
        >>> (stats.loss * kept).sum().backward()
    """
    if unserved:
        refuse_unserved(linear_row_stats, unserved)
    settings = head_settings(temperature, softcap, logit_scale, label_smoothing, ignore_index)
    call = HeadCall(input, linear_weight, target, linear_bias, outputs, settings, row_mask, chunk)
    return statistics_of(call)


def statistics_of(call: HeadCall) -> RowStats:
    """Serve a checked call.

    Args:
        call: the call.
    """
    if transformed():
        return _held(call)
    call.refuse_subclasses()
    return RowStats(**operators.linear_row_stats(call))


def _held(call: HeadCall) -> RowStats:
    """Serve a call in plain PyTorch, by logits that are held."""
    logits = F.linear(call.input, call.weight, call.bias)
    settings, target = call.settings, call.target
    if call.row_mask is not None:
        target = torch.where(call.row_mask, target, settings.ignore_index)
    own = tuple(name for name in call.outputs if name != "mean_logits")
    stats = reference.row_stats(StatsCall(logits, target, own, -1, settings))
    if "mean_logits" not in call.outputs:
        return stats
    mean = reference.transform_logits(logits, settings.temperature, settings.softcap).mean(-1)
    return stats._replace(mean_logits=torch.where(target == settings.ignore_index, 0.0, mean).detach())
