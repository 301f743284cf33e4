"""torchtitan's log-probabilities and entropies without a float32 copy of the logits.

Host: torchtitan 0.3; a stand-in with its functions in plain PyTorch where it is not installed.
Hardware: 2 CPU cores.
Minutes: 0.2
Expected output:
    greatest difference: log_probs 9.5e-07, entropy 1.9e-06, gradient 0.0e+00
"""

import torch
from stand_ins import host_or_stand_in, log_probs_and_entropy

from sparse_training.integrations.torchtitan import head

host = host_or_stand_in(
    "torchtitan.components.loss", "torchtitan", "0.3.0",
    {
        "torchtitan.components.loss": {
            "compute_logprobs": log_probs_and_entropy,
            "get_spmd_backend": lambda: "default",
            "spmd_mesh_size": lambda axis: 1,
        }
    },
)  # fmt: skip
torch.manual_seed(0)
logits, tokens = (3 * torch.randn(2, 32, 2000)).bfloat16(), torch.randint(0, 2000, (2, 32))
tokens[0, :8] = -100  # a prompt


def scores():
    given = logits.clone().requires_grad_()
    log_probs, entropies = host.compute_logprobs(given, tokens, return_entropy=True)
    log_probs.mean().backward()
    return log_probs.detach(), entropies, given.grad.float()


theirs = scores()
with head:  # in the trainer's process: head.on()
    ours = scores()
differences = [float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True)]
print("greatest difference: log_probs {:.1e}, entropy {:.1e}, gradient {:.1e}".format(*differences))
assert max(differences) < 1e-3
