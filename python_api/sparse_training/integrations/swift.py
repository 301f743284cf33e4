"""ms-swift: the log-probabilities and entropies of its trainers, which take TRL's older functions by name."""

from __future__ import annotations

from sparse_training.integrations.rebinding import Rebinding
from sparse_training.integrations.token_scores import entropy, log_probs

head = Rebinding(
    "ms-swift",
    ("4.6", "4.7"),
    {
        "swift.rlhf_trainers.grpo_trainer:selective_log_softmax": log_probs,
        "swift.rlhf_trainers.grpo_trainer:entropy_from_logits": entropy,
    },
    packages=("swift",),
)
"""Switch for every trainer of ms-swift that imports these names; TRL's own trainers keep theirs.

Example:
    >>> head.on()
"""
