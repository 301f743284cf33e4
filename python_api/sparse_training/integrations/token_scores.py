"""Log-probability and entropy of each token, from one read of logits, in the dtype that a host's own code returns."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_kernels import row_stats

IGNORED = -100


def log_probs(logits: Tensor, labels: Tensor, temperature: float = 1.0, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return the log-probability of each label, [...]; 0 for the label -100.

    Args:
        logits: [..., classes]; never written to.
        labels: int64 or int32 class indices [...].
        temperature: divides the logits; above 0. Default: 1.
        dtype: of the result. Default: that of ``result_dtype``.
    """
    stats = row_stats(logits, labels, outputs=("loss",), temperature=temperature, ignore_index=IGNORED)
    assert stats.loss is not None
    return (-stats.loss).to(dtype or result_dtype(logits))


def entropy(logits: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return the entropy of each distribution in nats, [...].

    Args:
        logits: [..., classes]; never written to.
        dtype: of the result. Default: that of ``result_dtype``.
    """
    any_label = logits.new_zeros(logits.shape[:-1], dtype=torch.int64)
    stats = row_stats(logits, any_label, outputs=("entropy",), ignore_index=None)
    assert stats.entropy is not None
    return stats.entropy.to(dtype or result_dtype(logits))


def result_dtype(logits: Tensor) -> torch.dtype:
    """Return the dtype of PyTorch's ``log_softmax`` of some logits; autocast may make it another than theirs.

    Args:
        logits: floating.
    """
    if logits.dtype in (torch.float32, torch.float64):
        return logits.dtype
    return torch.log_softmax(logits.new_empty(1), 0).dtype
