"""mmseg: its sampler of hard pixels (OHEM) without a softmax, a sort or a copy of the logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sparse_kernels import row_stats
from sparse_training.integrations.rebinding import Rebinding


@torch.no_grad()
def sample(self: Any, seg_logit: Tensor, seg_label: Tensor) -> Tensor:
    """Return 1 for hard pixels and 0 for others, as ``OHEMPixelSampler.sample`` does.

    With n for ``min_kept`` times the batch: where ``thresh`` is set, these are the pixels whose probability of their
    label is below a limit. It is ``thresh`` or, if larger, the probability of the pixel that follows the n hardest;
    pixels that tie with it are not kept. Without ``thresh`` they are the n pixels of largest loss.

    Args:
        seg_logit: [batch, classes, height, width], read in place.
        seg_label: integers [batch, 1, height, width]; the context's ``ignore_index`` does not count.

    Returns:
        Weights [batch, height, width], in the dtype of the logits.
    """
    if seg_label.dim() != 4 or seg_label.shape[1] != 1 or seg_logit.shape[2:] != seg_label.shape[2:]:
        raise AssertionError(  # the host's own kind
            f"`seg_label` must have shape [batch, 1, height, width] for logits of shape {tuple(seg_logit.shape)}, got "
            f"{tuple(seg_label.shape)}"
        )
    label = seg_label.squeeze(1).long()
    ignored = label == self.context.ignore_index
    by_threshold = self.thresh is not None
    losses = _own_loss(self, seg_logit, label) if by_threshold else _decoder_loss(self, seg_logit, label)
    losses = losses.masked_fill(ignored | losses.isnan() if by_threshold else ignored, -math.inf)
    count, kept = ignored.numel() - int(ignored.sum()), self.min_kept * label.shape[0]
    weight = torch.zeros_like(losses, dtype=seg_logit.dtype)
    if not count:
        return weight
    if by_threshold:
        return torch.where(losses > _limit(losses, min(kept, count - 1) + 1, self.thresh), 1.0, weight)
    hardest = losses.flatten().topk(min(kept, count), sorted=False).indices
    weight.view(-1)[hardest] = 1.0
    return weight


def _limit(losses: Tensor, rank: int, thresh: float) -> Tensor:
    """Return the loss that a hard pixel's must exceed: the smaller of the rank-th largest and that of ``thresh``.

    A probability is below another where its loss is above. The same logits at two places of an image may have losses
    that differ by a rounding, so what exceeds the limit by less than that ties with it.
    """
    largest = losses.flatten().kthvalue(losses.numel() - rank + 1).values
    limit = largest.clamp(max=-math.log(thresh)) if thresh > 0.0 else largest
    return limit + 4.0 * torch.finfo(losses.dtype).eps * limit.abs().clamp(min=1.0)


def _own_loss(self: Any, logits: Tensor, label: Tensor) -> Tensor:
    found = row_stats(logits, label, outputs=("loss",), dim=1, ignore_index=self.context.ignore_index).loss
    assert found is not None
    return found


def _decoder_loss(self: Any, logits: Tensor, label: Tensor) -> Tensor:
    """Return the sum of the decoder's losses; a plain cross-entropy takes one read, any other is the host's own."""
    modules = self.context.loss_decode
    total = torch.zeros((), device=logits.device)
    parts: list[Any] = [*modules] if isinstance(modules, nn.ModuleList) else [modules]
    for module in parts:
        if _is_plain(module):
            total = total + module.loss_weight * _own_loss(self, logits, label)
        else:
            total = total + module(
                logits, label, weight=None, ignore_index=self.context.ignore_index, reduction_override="none"
            )
    return total


def _is_plain(module: Any) -> bool:
    """Return True for mmseg's own cross-entropy of a softmax without class weights."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("mmseg.models.losses.cross_entropy_loss", "CrossEntropyLoss") and not (
        module.use_sigmoid or module.use_mask or module.class_weight is not None
    )


ohem = Rebinding(
    "mmsegmentation",
    ("1.2", "1.3"),
    {"mmseg.structures.sampler.ohem_pixel_sampler:OHEMPixelSampler.sample": sample},
    packages=("mmseg",),
)
"""Turns ours on and off, in samplers that there are already too.

Example:
    >>> ohem.on()
"""
