"""ms-swift's log-probabilities and entropies from one read of the logits.

Host: ms-swift 4.6; a stand-in with its functions in plain PyTorch where it is not installed.
Hardware: 2 CPU cores.
Minutes: 0.2
Expected output:
    greatest difference: log_probs 1.9e-06, entropy 1.4e-06
"""

import torch
from stand_ins import entropy, host_or_stand_in, log_probs

from sparse_training.integrations.swift import head

functions = {"selective_log_softmax": log_probs, "entropy_from_logits": entropy}
host = host_or_stand_in(
    "swift.rlhf_trainers.grpo_trainer", "swift", "4.6.0", {"swift.rlhf_trainers.grpo_trainer": functions}
)
torch.manual_seed(0)
logits, tokens = 3 * torch.randn(4, 32, 2000), torch.randint(0, 2000, (4, 32))
theirs = host.selective_log_softmax(logits, tokens), host.entropy_from_logits(logits)
with head:  # before training: head.on()
    ours = host.selective_log_softmax(logits, tokens), host.entropy_from_logits(logits)
differences = [float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True)]
print("greatest difference: log_probs {:.1e}, entropy {:.1e}".format(*differences))
assert max(differences) < 1e-4
