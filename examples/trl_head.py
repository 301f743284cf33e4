"""TRL's log-probabilities and entropies from one read of the logits; for a GRPOTrainer, give it trainer.model.

Host: trl 1 (the head that its trainers call), a Llama of some thousand parameters made from its configuration.
Hardware: 2 CPU cores.
Minutes: 0.5
Expected output:
    greatest difference from TRL's own head: log_probs 9.5e-07, entropy 4.8e-07
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from sparse_training.integrations.trl import serve

OUTPUTS = ("log_probs", "entropy")
config = LlamaConfig(
    vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
tokens = torch.randint(3, 400, (4, 32), generator=torch.Generator().manual_seed(0))
found = []
for ours in (False, True):
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    add_fused_lm_head(model, temperature=0.7, outputs=OUTPUTS)  # as TRL's trainers do
    if ours:
        serve(model, temperature=0.7, outputs=OUTPUTS)
    with torch.no_grad():
        found.append(model(input_ids=tokens, labels=tokens, fused_lm_head=True))
theirs, ours = found
differences = {name: (getattr(ours, name) - getattr(theirs, name)).abs().max().item() for name in OUTPUTS}
print(
    f"greatest difference from TRL's own head: log_probs {differences['log_probs']:.1e}, "
    f"entropy {differences['entropy']:.1e}"
)
assert max(differences.values()) < 1e-4
