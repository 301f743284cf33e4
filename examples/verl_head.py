"""verl's fused head: rows without an advantage are not in its backward, and sum p^2 comes with it.

Host: verl 0.9; a stand-in with its functions in plain PyTorch where it is not installed.
Hardware: 2 CPU cores.
Minutes: 0.2
Expected output:
    greatest difference: log_probs 9.5e-07, entropy 1.9e-06, gradient of the weight 7.5e-09
    rows in the backward: 16 of 64
"""

import torch
from stand_ins import Engine, FusedFunction, FusedHead, entropy, host_or_stand_in, log_probs, sum_of_squares

from sparse_kernels import count_multiplied_rows
from sparse_training.integrations.verl import head

host = host_or_stand_in(
    "verl.utils.experimental.torch_functional", "verl", "0.9.1",
    {
        "verl.utils.torch_functional": {
            "logprobs_from_logits": log_probs,
            "entropy_from_logits": entropy,
            "entropy_from_logits_with_chunking": lambda logits, chunk_size=2048: entropy(logits),
            "calculate_sum_pi_squared_from_logits": sum_of_squares,
            "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE": False,
        },
        "verl.utils.experimental.torch_functional": {
            "FusedLinearForPPO": FusedHead, "FusedLinearForPPOFunction": FusedFunction,
        },
        "verl.workers.engine.fsdp.transformer_impl": {"FSDPEngineWithLMHead": Engine},
    },
)  # fmt: skip
torch.manual_seed(0)
hidden = torch.randn(4, 16, 64)  # four responses of 16 tokens; only one has an advantage
tokens = torch.randint(0, 1000, (4, 16))
advantages = torch.tensor([0.0, 1.5, 0.0, 0.0])[:, None]


def step():
    weight = (0.1 * torch.randn(1000, 64, generator=torch.Generator().manual_seed(1))).requires_grad_()
    log_probs, entropies = host.FusedLinearForPPO().forward(hidden, weight, tokens, temperature=0.8)
    (-advantages * log_probs).mean().backward()
    return log_probs.detach(), entropies.detach(), weight.grad


theirs = step()
with head, count_multiplied_rows() as rows:  # in a worker: head.on()
    ours = step()
differences = [float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True)]
print("greatest difference: log_probs {:.1e}, entropy {:.1e}, gradient of the weight {:.1e}".format(*differences))
print(f"rows in the backward: {rows.differentiated} of {tokens.numel()}")
assert max(differences) < 1e-4
assert rows.differentiated == 16
