"""OpenRLHF: its actor's log-probabilities and entropies from one read of the logits."""

from __future__ import annotations

from sparse_training.integrations.rebinding import Rebinding
from sparse_training.integrations.token_scores import entropy, log_probs

head = Rebinding(
    "openrlhf",
    ("0.11", "0.12"),
    {
        "openrlhf.models.utils:log_probs_from_logits": log_probs,
        "openrlhf.models.utils:compute_entropy": entropy,
    },
)
"""Turns ours on and off in the process of an actor.

The logits that are given keep their values whatever the temperature; OpenRLHF's function divides them in place. A label
of -100 has the log-probability 0. A logit of -inf adds nothing to the entropy, where theirs is NaN.

Example:
    >>> head.on()
"""
