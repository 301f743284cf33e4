"""Hugging Face's Trainer on the samples that a gate keeps: one base class more.

Host: transformers 5 (Trainer), a BERT of some thousand parameters made from its configuration.
Hardware: 2 CPU cores.
Minutes: 0.3
Expected output:
    steps 200, loss 2.54 -> 1.18, accuracy 0.71
    the gate keeps 0.52 of the samples, aimed for 0.50
"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from sparse_training import Gate, load_data
from sparse_training.integrations.hugging_face import GatedTrainer


# [trainer]
class MyTrainer(GatedTrainer, Trainer):
    """Any Trainer class will do."""


# [/trainer]

torch.manual_seed(0)
data = load_data("digits")
images = data.train.images.flatten(1).long() // 16  # 64 tokens an image: how bright each pixel is
rows = [{"input_ids": image, "labels": label} for image, label in zip(images, data.train.labels, strict=True)]
model = BertForSequenceClassification(
    BertConfig(
        vocab_size=16, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.15,
    )
)  # fmt: skip
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=200, per_device_train_batch_size=32, learning_rate=2e-3, logging_steps=20, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = MyTrainer(model, arguments, train_dataset=rows, gate=Gate(rate=0.5))
    trainer.train()
with torch.no_grad():
    logits = model.eval()(data.test.images.flatten(1).long() // 16).logits
accuracy = (logits.argmax(1) == data.test.labels).float().mean().item()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
rate = float(trainer.gate.rate_observed)
first, last = float(losses[0]), float(losses[-1])
print(f"steps {trainer.state.global_step}, loss {first:.2f} -> {last:.2f}, accuracy {accuracy:.2f}")
print(f"the gate keeps {rate:.2f} of the samples, aimed for 0.50")
assert last < first
assert accuracy > 0.5
assert abs(rate - 0.5) < 0.15
