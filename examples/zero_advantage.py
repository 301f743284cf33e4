"""Sequences with zero advantage are left out before the backbone; loss and gradients are those of the whole batch.

Host: transformers 5, a GPT-2 of some thousand parameters made from its configuration.
Hardware: 2 CPU cores.
Minutes: 0.2
Expected output:
    3 of 8 sequences run, 36 of 96 tokens of the loss: 62.5% of forward and backward saved
    greatest difference of a gradient: 0.0e+00
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sparse_training.nn import drop_zero_sequences

torch.manual_seed(0)
config = GPT2Config(
    vocab_size=300, n_positions=16, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    bos_token_id=0, eos_token_id=0,
)  # fmt: skip
model = GPT2LMHeadModel(config)
tokens = torch.randint(0, 300, (8, 16))
completion = (torch.arange(15) >= 3).expand(8, 15)  # of the next tokens; the rest is the prompt
advantages = torch.tensor([0.0, 1.2, 0.0, 0.0, -0.7, 0.0, 0.4, 0.0])  # groups whose rewards agree have none


def losses(tokens, advantages):
    log_p = model(tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    ratio = (log_p - log_p.detach()).exp()
    return -ratio * advantages[:, None]


def gradients(loss):
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in found])


whole = gradients((losses(tokens, advantages) * completion).sum() / completion.sum())
kept = drop_zero_sequences({"tokens": tokens}, advantages, completion, other_terms={"kl": 0.0})
print(kept)
ours = gradients((losses(kept.batch["tokens"], kept.advantages) * kept.mask).sum() / kept.tokens)
difference = float((ours - whole).abs().max())
print(f"greatest difference of a gradient: {difference:.1e}")
assert difference < 1e-6 < float(whole.abs().max())
