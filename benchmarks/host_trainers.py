"""Whole steps of Hugging Face's and Lightning's own trainers, every sample beside the fifth that a gate ranks highest.

A step is all that the trainer does between the ends of two: load, score, forward, backward, update. The trainers take
turns of a few steps each, in one process.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timing import quantiles
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_training import Gate
from sparse_training.integrations.hugging_face import GatedTrainer
from sparse_training.integrations.lightning import GatedModule

Fit = Callable[[], list[float]]  # trains for some steps; the seconds of each but the first
RATE, STEPS = 0.2, 7


def cases(small: bool) -> Iterator[tuple[str, dict[str, Fit]]]:
    """Each host's trainer without a gate, and with one."""
    yield f"hugging-face-trainer-{'x'.join(map(str, bert_shape(small)))}-20%", hugging_face(small)
    yield f"lightning-trainer-{'x'.join(map(str, images_shape(small)))}-20%", lightning(small)


def seconds_in_turn(fits: dict[str, Fit], rounds: int) -> dict[str, dict[str, float]]:
    """Quantiles of each trainer's steps."""
    seconds: dict[str, list[float]] = {name: [] for name in fits}
    for _ in range(rounds):
        for name, fit in fits.items():
            seconds[name] += fit()
    return {name: quantiles(values) for name, values in seconds.items()}


def between(ends: list[float]) -> list[float]:
    return [end - begin for begin, end in itertools.pairwise(ends)]


def bert_shape(small: bool) -> tuple[int, int, int]:
    """Samples of a batch, tokens of each, hidden size."""
    return (10, 8, 16) if small else (64, 64, 256)


def hugging_face(small: bool) -> dict[str, Fit]:
    import transformers

    samples, length, hidden = bert_shape(small)
    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=hidden, num_hidden_layers=2, num_attention_heads=4, intermediate_size=4 * hidden,
        max_position_embeddings=length, num_labels=10,
    )  # fmt: skip
    tokens, labels = torch.randint(0, 1000, (STEPS * samples, length)), torch.randint(0, 10, (STEPS * samples,))
    rows = [{"input_ids": one, "labels": label} for one, label in zip(tokens, labels, strict=True)]

    class Gated(GatedTrainer, transformers.Trainer):
        pass

    class Ends(transformers.TrainerCallback):
        def __init__(self, ends: list[float]) -> None:
            self.ends = ends

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    def fit(kind: Any, **options: Any) -> Fit:
        model = transformers.BertForSequenceClassification(config)

        def train() -> list[float]:
            ends: list[float] = []
            with tempfile.TemporaryDirectory() as folder:
                arguments = transformers.TrainingArguments(
                    folder, max_steps=STEPS, per_device_train_batch_size=samples, save_strategy="no", use_cpu=True,
                    logging_strategy="no", report_to=[], disable_tqdm=True,
                )  # fmt: skip
                trainer = kind(model, arguments, train_dataset=rows, callbacks=[Ends(ends)], **options)
                trainer.remove_callback(transformers.PrinterCallback)
                trainer.train()
            return between(ends)

        return train

    ranked = Gate(rate=RATE, decision="topk")
    return {"ours": fit(Gated, gate=ranked), "host": fit(transformers.Trainer)}


def images_shape(small: bool) -> tuple[int, int, int, int]:
    """Samples of a batch, channels, height and width."""
    return (10, 3, 8, 8) if small else (64, 3, 32, 32)


def lightning(small: bool) -> dict[str, Fit]:
    from lightning.pytorch import Callback, LightningModule, Trainer

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    samples, *image = images_shape(small)
    data = TensorDataset(torch.randn(STEPS * samples, *image), torch.randint(0, 10, (STEPS * samples,)))
    loader = DataLoader(data, batch_size=samples, shuffle=True)

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            channels, strides = (image[0], 64, 64, 128, 256), (1, 1, 2, 2)
            pairs = zip(channels, channels[1:], strides, strict=False)
            blocks = [
                nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b, stride in pairs
            ]
            self.net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 10))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores: torch.Tensor = self.net(x)
            return scores

        def training_step(self, batch: Any, _index: int) -> torch.Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    class Gated(GatedModule, Classifier):
        pass

    class Ends(Callback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_batch_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    def fit(module: LightningModule) -> Fit:
        def train() -> list[float]:
            ends = Ends()
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="lightning")  # that a loader without workers is slow
                Trainer(
                    max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[ends],
                    enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
                ).fit(module, loader)  # fmt: skip
            return between(ends.ends)

        return train

    return {"ours": fit(Gated(gate=Gate(rate=RATE, decision="topk"))), "host": fit(Classifier())}
