"""Accuracy of sparse attention against dense at equal steps: ``python benchmarks/attention_accuracy.py [TASK...]``.

Not a timing. Each task trains one small transformer per kind of attention and seed, from the same weights on the same
batches. The record, benchmarks/results/attention-accuracy-<date>.json, is written after every run, and runs that it has
are not repeated: an interrupted command is taken up where it was. ``--small`` shows that it runs; nothing is written.

pixels       Fashion-MNIST, a token for each pixel, behind one convolution of 7x7: first at 28x28, in tiles of 4x7, so
             224 of 784 keys are read; then each model goes on at 56x56, in tiles of 8x8, 512 of 3,136
bare-pixels  28x28 without the convolution
find         16 tokens of 3,136 in a row are marked, and the first must tell their class: only the choice finds them

"summary" is "sparse" that also reads the means of the blocks that it does not choose; "local" reads as many keys as
"sparse", but chooses none by content; "none" has no attention. "mass kept" is the share
of dense attention's weights that the blocks chosen by a trained model hold, beside the best choice of as many blocks
and a random one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timing
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_training import load_data
from sparse_training.models.vit import Attention, Block, Mean, Tokens, tile_of
from sparse_training.nn import BlockSparseAttention, choose_blocks

Batches = Iterator[tuple[Tensor, Tensor]]
CLASSES = 10


class Stage(NamedTuple):
    """Steps on sequences of one length."""

    tokens: int
    block: int
    steps: int
    batch: int
    rows: int  # of the test
    rate: float


class Task(NamedTuple):
    """Stages that a model goes through, one after the other."""

    depth: int
    width: int
    kinds: tuple[str, ...]
    seeds: int
    stages: tuple[Stage, ...]


TASKS = {
    "find": Task(1, 64, ("dense", "sparse", "local"), 3, (Stage(3136, 64, steps=200, batch=8, rows=200, rate=3e-3),)),
    "bare-pixels": Task(
        2, 32, ("dense", "sparse", "summary", "none"), 3, (Stage(784, 32, steps=300, batch=32, rows=4000, rate=6e-3),)
    ),
    "pixels": Task(
        2,
        32,
        ("dense", "sparse", "none"),
        2,
        (
            Stage(784, 32, steps=400, batch=32, rows=4000, rate=4e-3),
            Stage(3136, 64, steps=40, batch=16, rows=1024, rate=1e-3),
        ),
    ),
}


def small(task: Task) -> Task:
    stages = (s._replace(tokens=s.tokens // 4, block=s.block // 8, steps=2, batch=4, rows=8) for s in task.stages)
    return task._replace(seeds=1, stages=tuple(stages))


class Nothing(nn.Module):
    """Attention that adds nothing."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def attention(kind: str, block: int) -> Callable[[int, int], nn.Module]:
    if kind in ("dense", "none"):
        return Attention if kind == "dense" else Nothing
    chosen: dict[str, dict[str, Any]] = {
        "sparse": {},
        "summary": {"summary": True},
        "local": {"local": 8, "top": 0, "global_blocks": 0},
    }
    return partial(BlockSparseAttention, block=block, dense_below=0, **chosen[kind])


class First(nn.Module):
    """Maps tokens [B, T, D] to the first of them [B, D]."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


def model_of(name: str, task: Task, stage: Stage, kind: str) -> nn.Sequential:
    find, width = name == "find", task.width
    size, tile = block_of(name, stage), None if find else tile_of(*sides(stage), stage.block)
    embed: nn.Module = nn.Linear(CLASSES + 1, width)
    if not find:
        embed = Tokens((1 if name == "bare-pixels" else 16, *sides(task.stages[0])), width, patch=1, tile=tile)
    if name == "pixels":
        embed = nn.Sequential(nn.Conv2d(1, 16, 7, padding=3), nn.GELU(), embed)
    layers = [Block(width, 1, attention(kind, size)) for _ in range(task.depth)]
    return nn.Sequential(embed, *layers, nn.LayerNorm(width), First() if find else Mean(), nn.Linear(width, CLASSES))


def sides(stage: Stage) -> tuple[int, int]:
    side = int(stage.tokens**0.5)
    return side, side


def block_of(name: str, stage: Stage) -> int:
    """Tokens of a block: of an image those of a tile."""
    return stage.block if name == "find" else math.prod(tile_of(*sides(stage), stage.block))


def found(stage: Stage, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences of random classes, one-hot; a last feature marks a run of one class, which is the target."""
    run = stage.tokens // 196
    classes = torch.randint(CLASSES, (rows, stage.tokens), generator=generator)
    target = torch.randint(CLASSES, (rows, 1), generator=generator)
    place = torch.randint(1, stage.tokens - run, (rows, 1), generator=generator) + torch.arange(run)
    classes.scatter_(1, place, target.expand(-1, run))
    mark = torch.zeros(rows, stage.tokens, 1).scatter_(1, place.unsqueeze(-1), 4.0)
    return torch.cat([F.one_hot(classes, CLASSES).float(), mark], -1), target.squeeze(1)


def pixels(train: bool) -> tuple[Tensor, Tensor]:
    data = load_data("fashion-mnist")
    split = data.train if train else data.test
    return split.images, split.labels


def prepared(images: Tensor, stage: Stage) -> Tensor:
    x = (images.float() / 255 - 0.286) / 0.353
    return F.interpolate(x, size=sides(stage), mode="bilinear", align_corners=False)


def batches(name: str, stage: Stage, seed: int, train: bool) -> Batches:
    """Batches of a stage, the same for every kind of attention; those of the test are the same for every seed."""
    generator = torch.Generator().manual_seed(seed if train else 1_000_003)
    number = stage.steps if train else stage.rows // stage.batch
    if name == "find":
        yield from (found(stage, stage.batch, generator) for _ in range(number))
        return
    images, labels = pixels(train)
    order = torch.randperm(len(images), generator=generator)
    for step in range(number):
        at = order[torch.arange(step * stage.batch, (step + 1) * stage.batch) % len(order)]
        yield prepared(images[at], stage), labels[at]


def train(model: nn.Sequential, name: str, stage: Stage, seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, stage.rate, total_steps=stage.steps + 1, pct_start=0.2)
    for x, target in batches(name, stage, seed, train=True):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Sequential, name: str, stage: Stage) -> float:
    """Percent of the test rows."""
    right = [(model(x).argmax(1) == target).float().mean() for x, target in batches(name, stage, 0, train=False)]
    return 100 * float(torch.stack(right).mean())


@torch.no_grad()
def mass_kept(model: nn.Sequential, name: str, stage: Stage, rows: int = 4) -> dict[str, list[float]]:
    """Share of dense attention's weights in the chosen blocks, a layer; beside the best choice and a random one.

    In "find" of the first token's weights alone, which the answer is read from.
    """
    x, _ = next(batches(name, stage, 0, train=False))
    kept: dict[str, list[float]] = {"chosen": [], "best": [], "random": []}
    tokens, block = model[0](x[:rows]), block_of(name, stage)
    for layer in model[1:-3]:
        q, k, _ = layer.attention.qkv(layer.norm1(tokens)).unflatten(-1, (3, 1, -1)).permute(2, 0, 3, 1, 4)
        weights = F.pad((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1), (0, -stage.tokens % block))
        if name == "find":
            weights = weights[:, :, :1]
        of_blocks = weights.unflatten(-1, (-1, block)).sum(-1)  # [rows, heads, tokens, blocks]
        mine = torch.arange(weights.shape[2]) // block
        for way in kept:
            noise = torch.rand_like(of_blocks[:, :, ::block])
            if way == "best":
                noise = F.pad(of_blocks, (0, 0, 0, -weights.shape[2] % block))
                noise = noise.unflatten(2, (-1, block)).sum(3)[:, :, : mine[-1] + 1]
            picked = with_neighbours(noise)
            if way == "chosen":
                picked = choose_blocks(q, k, block=block)[:, :, : mine[-1] + 1]
            share = of_blocks.gather(-1, picked[:, :, mine]).sum(-1).mean()
            kept[way].append(round(float(share), 4))
        tokens = layer(tokens)
    return kept


def with_neighbours(scores: Tensor) -> Tensor:
    """The blocks of the best scores, neighbours and the first block among them as in ``choose_blocks``."""
    count = scores.shape[-1]
    mine, other = torch.arange(scores.shape[2]).unsqueeze(-1), torch.arange(count)
    start = (mine - 1).clamp(0, max(0, count - 3))
    forced = ((other >= start) & (other < start + 3)) | (other < 1)
    return scores.masked_fill(forced, torch.inf).topk(min(8, count), dim=-1).indices


def run_of(name: str, task: Task, kind: str, seed: int) -> dict[str, Any]:
    """Accuracy of a model after each of its stages, by the stage's number of tokens."""
    run: dict[str, Any] = {}
    torch.manual_seed(seed)
    before = None
    for stage in task.stages:
        model = model_of(name, task, stage, kind)
        if before is not None:
            model.load_state_dict(before.state_dict())
        train(model, name, stage, seed)
        run[str(stage.tokens)] = {"accuracy": round(accuracy(model, name, stage), 2)}
        if kind == "sparse":
            run[str(stage.tokens)]["mass kept"] = mass_kept(model, name, stage)
        before = model
    return run


def summary(runs: dict[str, dict[str, Any]], task: Task) -> dict[str, Any]:
    """Mean accuracies, and the mean difference from dense with its standard error over the seeds that both have."""
    lines: dict[str, Any] = {}
    for stage in task.stages:
        by_kind: dict[str, dict[str, float]] = {}
        for key, run in runs.items():
            kind, seed = key.split("/")
            by_kind.setdefault(kind, {})[seed] = run[str(stage.tokens)]["accuracy"]
        for kind, results in by_kind.items():
            line = lines.setdefault(str(stage.tokens), {}).setdefault(kind, {})
            line |= {"accuracy": round(statistics.mean(results.values()), 2), "seeds": len(results)}
            gaps = [results[seed] - by_kind["dense"][seed] for seed in results if seed in by_kind.get("dense", {})]
            if kind != "dense" and len(gaps) > 1:
                line["minus dense"] = round(statistics.mean(gaps), 2)
                line["standard error"] = round(statistics.stdev(gaps) / len(gaps) ** 0.5, 2)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"{', '.join(TASKS)}; all by default")
    parser.add_argument("--kinds", help="kinds of attention, by comma; all of a task's by default")
    parser.add_argument("--small", action="store_true", help="tiny: shows that it runs, writes nothing")
    parser.add_argument("--out", type=Path, default=timing.RESULTS / f"attention-accuracy-{timing.today()}.json")
    options = parser.parse_args()
    if unknown := set(options.tasks) - set(TASKS):
        sys.exit(f"unknown task {', '.join(sorted(unknown))}; use {', '.join(TASKS)}")
    record: dict[str, Any] = {"created": timing.today(), "machine": {}, "tasks": {}}
    if options.out.exists() and not options.small:
        record = json.loads(options.out.read_text())
    record["machine"] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in options.tasks or TASKS:
        task = small(TASKS[name]) if options.small else TASKS[name]
        entry = record["tasks"].setdefault(name, {"settings": task._asdict(), "runs": {}, "summary": {}})
        for seed in range(task.seeds):
            for kind in options.kinds.split(",") if options.kinds else task.kinds:
                if f"{kind}/{seed}" in entry["runs"]:
                    continue
                entry["runs"][f"{kind}/{seed}"] = run_of(name, task, kind, seed)
                entry["summary"] = summary(entry["runs"], task)
                print(name, f"{kind}/{seed}", entry["runs"][f"{kind}/{seed}"], flush=True)
                if not options.small:
                    temporary = options.out.with_suffix(f".{os.getpid()}.tmp")
                    temporary.write_text(json.dumps(record, indent=1) + "\n")
                    os.replace(temporary, options.out)
        print(name, json.dumps(entry["summary"]))


if __name__ == "__main__":
    main()
