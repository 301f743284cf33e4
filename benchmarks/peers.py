"""What users run today: the same decision in unfused PyTorch, eager and compiled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOSS, ENTROPY = 0.7, 0.3


def unfused(logits: Tensor, targets: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """cross_entropy, softmax, log(p + 1e-8), weighted sum, comparison: as most published code has it."""
    loss = F.cross_entropy(logits, targets, reduction="none")
    p = torch.softmax(logits, dim=-1)
    entropy = -(p * torch.log(p + 1e-8)).sum(dim=-1)
    significance = LOSS * loss + ENTROPY * entropy
    return significance > threshold, significance


def unfused_log_softmax(logits: Tensor, targets: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """The better unfused form: one log_softmax serves the loss and the entropy."""
    log_p = torch.log_softmax(logits, dim=-1)
    loss = -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    significance = LOSS * loss + ENTROPY * entropy
    return significance > threshold, significance
