"""torchtitan: the log-probabilities and entropies of its reinforcement learning losses from one read of the logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from sparse_kernels import row_stats
from sparse_training.integrations.rebinding import Rebinding
from sparse_training.integrations.token_scores import IGNORED

_PLACE = "torchtitan.components.loss:compute_logprobs"


def compute_logprobs(logits: Tensor, labels: Tensor, *, return_entropy: bool = False) -> Any:
    """Compute the log-probability of each label, and the entropy where asked for, without a float32 copy of the logits.

    Logits whose vocabulary is sharded over ranks are handed to torchtitan's own function, which gathers them.

    Args:
        logits: [batch, tokens, classes].
        labels: int64 [batch, tokens]; -100 gives the log-probability 0.
        return_entropy: return the entropy too, without gradient, of rows labelled -100 as well. Default: False.
    """
    if isinstance(logits, DTensor) or _is_shard():
        return head.original(_PLACE)(logits, labels, return_entropy=return_entropy)
    if not return_entropy:
        stats = row_stats(logits, labels, outputs=("loss",), ignore_index=IGNORED)
        assert stats.loss is not None
        return (-stats.loss).float()
    # The entropy of an ignored row counts, and ``row_stats`` gives 0 for one: so none is ignored there.
    ignored = labels == IGNORED
    stats = row_stats(logits, labels.masked_fill(ignored, 0), ignore_index=None)
    assert stats.loss is not None
    assert stats.entropy is not None
    return (-stats.loss.masked_fill(ignored, 0.0)).float(), stats.entropy.detach().float()


def _is_shard() -> bool:
    """Return True where a plain tensor of logits is this rank's part of the vocabulary."""
    from torchtitan.components import loss

    return bool(loss.get_spmd_backend() == "spmd_types" and loss.spmd_mesh_size("tp") > 1)


head = Rebinding("torchtitan", ("0.3", "0.4"), {_PLACE: compute_logprobs})
"""Turns ours on and off in the trainer's process.

Example:
    >>> head.on()
"""
