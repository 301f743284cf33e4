"""A Transformers language model whose loss is of the tokens with the greatest entropy; two lines more.

Host: transformers 5 (Trainer), a Llama of some thousand parameters made from its configuration.
Hardware: 2 CPU cores.
Minutes: 0.3
Expected output:
    steps 100, loss of all tokens 6.00 -> 3.66
    the head's backward multiplied 0.20 of the tokens
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sparse_kernels import TopFraction, count_multiplied_rows
from sparse_training.integrations.transformers_loss import TokenLoss

torch.manual_seed(0)
# A walk over 400 words: half of the time to the next word, which can be learned, else to any.
steps = torch.where(torch.rand(512, 65) < 0.5, 1, torch.randint(0, 400, (512, 65)))
rows = [{"input_ids": walk, "labels": walk} for walk in steps.cumsum(1) % 400]
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=65, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
)  # fmt: skip
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=100, per_device_train_batch_size=16, learning_rate=1e-2, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:64])
    first = trainer.evaluate()["eval_loss"]
    # [loss]
    loss = TokenLoss(model, TopFraction(0.2, of="entropy"), fused_head=True)
    with loss, count_multiplied_rows() as multiplied:
        trainer.train()
    # [/loss]
    last = trainer.evaluate()["eval_loss"]
share = multiplied.differentiated / multiplied.scored
print(f"steps {trainer.state.global_step}, loss of all tokens {first:.2f} -> {last:.2f}")
print(f"the head's backward multiplied {share:.2f} of the tokens")
assert last < first
assert 0.19 < share < 0.25
