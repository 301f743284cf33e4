"""Promises of ``advise`` beside the time that following them saves; for an idle machine.

    python benchmarks/advise.py [--rounds 3]

Four trainings: one that waits for its loader, one that waits for its backward pass (activations are recomputed), a
token task with half of its labels ignored, and one with nothing to gain. Each is advised, then trained dense and as
advised, in turn, and the medians are compared. The exit code is 1 where a saving is not within 20% of the promise, or
the recommendation is another one than expected. About five minutes on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from sparse_kernels import keep_freed_memory
from sparse_training import Compact, SparseTrainer, advise

LOSS = nn.CrossEntropyLoss(reduction="none")
LR, EPOCHS, CLOSE = 0.003, 10, 0.2
VOCABULARY = 8192


class Packed(Dataset[tuple[Tensor, Tensor]]):
    """Rows that are unpacked when they are read."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        noise = torch.randint(0, 16, (1 << 18,), dtype=torch.uint8).numpy().tobytes()
        self.packed, self.inputs, self.targets = zlib.compress(noise), inputs, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        zlib.decompress(self.packed)
        return self.inputs[row], self.targets[row]


class Recomputed(nn.Module):
    """Layers whose activations are recomputed in the backward pass."""

    def __init__(self, width: int = 1024) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, width), nn.Linear(width, 2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Linear(width, width)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        logits: Tensor = self.last(x)
        return logits


class Language(nn.Module):
    """Tokens to logits; with ``packed`` the head runs on the targets that count alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(VOCABULARY, 256), nn.Linear(256, 256), nn.ReLU())
        self.head = nn.Linear(256, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(tokens))
        return logits


def mostly_easy(rows: int) -> tuple[Tensor, Tensor]:
    """Two classes far apart, and a fifth of the rows between them, their labels at random."""
    targets = torch.randint(0, 2, (rows,))
    inputs = torch.randn(rows, 8)
    inputs[:, 0] = torch.where(torch.rand(rows) < 0.2, 0.0, 8.0 * targets - 4.0)
    return inputs, targets


def in_batches(inputs: Tensor, targets: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of a stream, which cannot be asked for rows."""
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def half_ignored(rows: int) -> list[tuple[Tensor, Tensor]]:
    """Sequences of 32 tokens whose first half is not learned."""
    tokens = torch.randint(0, VOCABULARY, (rows, 33))
    targets = tokens[:, 1:].clone()
    targets[:, :16] = -100
    return in_batches(tokens[:, :-1], targets, 16)


class Case(NamedTuple):
    """One training.

    Attributes:
        method: the recommendation that is expected.
        model: makes the model.
        loader: the data.
    """

    method: str
    model: Callable[[], nn.Module]
    loader: Any


def cases() -> dict[str, Case]:
    """The four trainings, by what they are bound by."""

    def small() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))

    alike = (torch.randn(4000, 8), torch.randint(0, 2, (4000,)))
    return {
        "loader": Case("infobatch", small, DataLoader(Packed(*mostly_easy(2000)), batch_size=50, shuffle=True)),
        "backward": Case("importance@self", Recomputed, in_batches(*mostly_easy(12800), 256)),
        "half ignored": Case("head", Language, half_ignored(320)),
        "nothing": Case("dense", small, in_batches(*alike, 100)),
    }


def train(code: str, case: Case) -> float:
    """Seconds of a training by a line of code."""
    torch.manual_seed(0)
    names = {"SparseTrainer": SparseTrainer, "model": case.model(), "loader": case.loader, "loss": LOSS}
    began = time.perf_counter()
    eval(code, names)
    return time.perf_counter() - began


def train_tokens(code: str | None, case: Case) -> float:
    """Seconds of a loop of one's own over the tokens, with the line of code before the head, or without."""
    torch.manual_seed(0)
    model = case.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    began = time.perf_counter()
    for _ in range(EPOCHS // 2):
        for tokens, targets in case.loader:
            scope = {"Compact": Compact, "hidden": model.body(tokens), "targets": targets}
            if code is not None:
                exec(code, scope)
            logits = model.head(scope["hidden"]).flatten(0, -2)
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, scope["targets"].flatten()).backward()
            optimizer.step()
    return time.perf_counter() - began


def main() -> int:
    """Advise, follow and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each kind; the medians are compared")
    rounds = parser.parse_args().rounds
    keep_freed_memory()
    torch.manual_seed(0)
    failed = False
    print(f"{'bound by':14}{'recommended':18}{'promised':>9}{'measured':>10}")
    for name, case in cases().items():
        torch.manual_seed(0)
        advice = advise(case.model(), case.loader, loss=LOSS, lr=LR, seconds=20, epochs=EPOCHS)
        dense = f'SparseTrainer(model, loss=loss, lr={LR:g}, policy="dense").fit(loader, epochs={EPOCHS})'
        ways = (None, advice.code) if advice.method == "head" else (dense, advice.code)
        work = train_tokens if advice.method == "head" else train
        taken = [[work(way, case) for way in ways] for _ in range(rounds)]  # type: ignore[operator]
        whole, part = (statistics.median(seconds) for seconds in zip(*taken, strict=True))
        saved = 1.0 - part / whole
        close = abs(saved - advice.saving) <= (CLOSE * advice.saving or 0.1)
        failed |= not close or advice.method != case.method
        wrong = "" if advice.method == case.method else f"  expected {case.method}"
        print(
            f"{name:14}{advice.method:18}{advice.saving:9.1%}{saved:10.1%}{'' if close else '  not within 20%'}{wrong}",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
