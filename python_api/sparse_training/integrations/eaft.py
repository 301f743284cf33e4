"""Entropy-aware fine-tuning in axolotl and LLaMA-Factory, by the exact entropy in place of the top 20 logits'."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_kernels import row_stats
from sparse_training.errors import UserError
from sparse_training.integrations.rebinding import Rebinding
from sparse_training.integrations.token_scores import IGNORED

ENTROPY_UNIT = 3.0  # nats; LLaMA-Factory divides by it, near the largest entropy of 20 tokens


def eaft_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None, alpha: float = 1.0, k: int = 20) -> Tensor:
    """Compute axolotl's loss: each token's cross-entropy weighted by its entropy to a power.

    Args:
        outputs: the model's; its ``logits`` are [..., tokens, classes].
        labels: [..., tokens], shifted here; -100 does not count.
        num_items_in_batch: divisor of the sum; None for the number of tokens that count. Default: None.
        alpha: power of the entropy. Default: 1.
        k: not used, since the entropy is of all classes; axolotl's configuration passes it.
    """
    return _weighted(outputs.logits[..., :-1, :], labels[..., 1:], num_items_in_batch, alpha, 1.0)


def eaft_loss_func(outputs: Any, labels: Tensor, num_items_in_batch: Any = None, alpha: float = 1.0) -> Tensor:
    """Compute LLaMA-Factory's loss: each token's cross-entropy weighted by a third of its entropy to a power.

    Args:
        outputs: the model's, a mapping; without ``logits`` its ``loss`` is returned, 0 if there is none.
        labels: [..., tokens], shifted here; -100 does not count.
        num_items_in_batch: divisor of the sum; None for the number of tokens that count. Default: None.
        alpha: power of the weight. Default: 1.
    """
    logits = outputs.get("logits")
    if logits is None:
        loss: Tensor = outputs.get("loss", torch.tensor(0.0))
        return loss
    shifted = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    return _weighted(logits, shifted, num_items_in_batch, alpha, ENTROPY_UNIT)


def _weighted(logits: Tensor, targets: Tensor, divisor: Any, alpha: float, unit: float) -> Tensor:
    """Return the weighted sum over a divisor; 0 with zero gradients where no token counts."""
    if targets.shape != logits.shape[:-1]:
        raise UserError(
            f"`labels` must have a label for each position of the logits {tuple(logits.shape)}, got labels for "
            f"{tuple(targets.shape)} positions after the shift"
        )
    targets = targets.to(logits.device)
    stats = row_stats(logits, targets, ignore_index=IGNORED)
    assert stats.loss is not None
    assert stats.entropy is not None
    valid = targets != IGNORED
    weight = (stats.entropy.detach().clamp(min=0.0) / unit).pow(alpha).masked_fill(~valid, 0.0)
    total = (stats.loss * weight).sum()
    if divisor is None:
        return total / valid.sum().clamp(min=1)
    return total / (divisor.to(total.device) if isinstance(divisor, Tensor) else divisor)


axolotl_loss = Rebinding("axolotl", ("0.19", "0.20"), {"axolotl.monkeypatch.loss.eaft:eaft_loss": eaft_loss})
"""Turns ours on and off; to be turned on before the trainer is built, which takes the function then.

Example:
    >>> axolotl_loss.on()
"""

llamafactory_loss = Rebinding(
    "llamafactory", ("0.9.5", "0.10"), {"llamafactory.train.trainer_utils:eaft_loss_func": eaft_loss_func}
)
"""Turns ours on and off; to be turned on before the trainer is made, which takes the function then.

Example:
    >>> llamafactory_loss.on()
"""
