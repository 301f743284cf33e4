"""OpenRLHF's log-probabilities and entropies from one read of the logits, which keep their values.

Host: OpenRLHF 0.11; a stand-in with its functions in plain PyTorch where it is not installed.
Hardware: 2 CPU cores.
Minutes: 0.2
Expected output:
    greatest difference: log_probs 1.9e-06, entropy 1.4e-06
    logits divided by the temperature: by theirs True, by ours False
"""

import torch
from stand_ins import divided_log_probs, entropy, host_or_stand_in

from sparse_training.integrations.openrlhf import head

host = host_or_stand_in(
    "openrlhf.models.utils", "openrlhf", "0.11.2",
    {"openrlhf.models.utils": {"log_probs_from_logits": divided_log_probs, "compute_entropy": entropy}},
)  # fmt: skip
torch.manual_seed(0)
logits, tokens = 3 * torch.randn(4, 32, 2000), torch.randint(0, 2000, (4, 32))


def scores():
    given = logits.clone()
    entropies = host.compute_entropy(given)
    return host.log_probs_from_logits(given, tokens, temperature=0.7), entropies, not torch.equal(given, logits)


theirs = scores()
with head:  # in an actor's process: head.on()
    ours = scores()
differences = [float((one - other).abs().max()) for one, other in zip(ours[:2], theirs[:2], strict=True)]
print("greatest difference: log_probs {:.1e}, entropy {:.1e}".format(*differences))
print(f"logits divided by the temperature: by theirs {theirs[2]}, by ours {ours[2]}")
assert max(differences) < 1e-4
