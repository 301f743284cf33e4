"""The original system's published settings, run: its models, optimisers, batches, epochs and rates, side by side.

    python benchmarks/original_tables.py                                    every setting and method, printed
    python benchmarks/original_tables.py --setting 3-epochs --method sundew  one line of a table
    python benchmarks/original_tables.py --data cifar10 --root FOLDER --rows 50000   on the published data
    python benchmarks/original_tables.py --record benchmarks/results/original-DATE.json
    python benchmarks/original_tables.py --times --record FILE              seconds; needs an idle machine

CIFAR-10 is in no package, so the data are Fashion-MNIST unless its published files are at hand. A record is written
after every run, and runs that it holds already are not repeated. On one core the accuracies of 4,000 rows with three
seeds take some 25 minutes, the times less than 4. docs/benchmarks/original.md shows the record (``make tables``).

Methods of this package select within batches, or before loading them, and take one step a batch. The original's own
laws decide row by row in batches of the loader, and take one step of the optimizer for every row kept. ``coin`` keeps
every row with the same probability; ``probe`` every hundredth row, which is all that the run of 1.2% did. ``sundew``
and ``standalone`` are the two gates (baselines.py); they read significance 0.5 loss / max + 0.3 contrast / max + 0.2
of the batch, and have the claimed rate for a target.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines import Standalone, Sundew
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparse_training.data.load import load_data
from sparse_training.data.resident import ResidentLoader
from sparse_training.data.splits import ImageData, take_part
from sparse_training.errors import UserError
from sparse_training.experiments.environment import environment
from sparse_training.files import write_atomic
from sparse_training.models.build import build_model
from sparse_training.trainer import SparseTrainer
from sparse_training.training.settings import TrainerSettings

FORMAT = "original-tables"
RATES = (0.012, 0.06, 0.106)
ROWS, SEEDS = 4000, 3
TIMED_ROWS, ROUNDS = 640, 5  # of a miniature of every run; the first round only warms up
EVENT_LAWS = ("coin", "probe", "sundew", "standalone")  # decide and step row by row


@dataclass(frozen=True)
class Method:
    """A method and its rate, a fraction; None where it has none of its own."""

    name: str
    rate: float | None = None

    @property
    def label(self) -> str:
        """Name for a table."""
        return self.name if self.rate is None else f"{self.name} {self.rate:.1%}"


@dataclass(frozen=True)
class Setting:
    """One of the original's published settings.

    Args:
        model: name of the model.
        epochs: passes over the data.
        batch_size: rows of a loader's batch.
        optimizer: makes the optimizer of parameters.
        schedule: of the learning rate: "cosine" or "constant".
        clip_norm: largest norm of the gradient; None for no limit.
        methods: methods to run.
    """

    model: str
    epochs: int
    batch_size: int
    optimizer: Callable[..., torch.optim.Optimizer]
    schedule: str
    clip_norm: float | None
    methods: tuple[Method, ...]


def _methods(*rates: float, laws: tuple[Method, ...]) -> tuple[Method, ...]:
    by_rate = (Method(name, rate) for name in ("random", "gate", "coin") for rate in rates)
    return (Method("dense"), Method("infobatch"), *by_rate, *laws)


def _adam(parameters: Any, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=lr)


def _adamw(parameters: Any, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)


SETTINGS = {
    "3-epochs": Setting(
        "cnn-2m", 3, 64, _adamw, "cosine", 1.0,
        _methods(*RATES, laws=(Method("masked", 0.106), Method("probe"), Method("sundew", 0.012))),
    ),
    "10-epochs": Setting(
        "cnn-620k", 10, 64, _adam, "constant", None,
        _methods(*RATES, laws=(Method("masked", 0.106), Method("standalone", 0.06))),
    ),
    "package": Setting(
        "cnn-620k", 10, 128, _adam, "constant", 1.0, _methods(0.357, laws=(Method("masked", 0.357),))
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """A trained model, rows trained on and offered, and raw seconds of training."""

    model: nn.Module
    trained: int
    offered: int
    seconds: float


def make_loader(split: Any, batch_size: int, seed: int, *, shuffle: bool = True) -> ResidentLoader:
    """Return batches, normalised as in the original."""
    return ResidentLoader(split, batch_size=batch_size, seed=seed, mean=(0.5,), std=(0.5,), shuffle=shuffle)


def train(setting: Setting, method: Method, data: ImageData, seed: int) -> Outcome:
    """Train one method from one seed."""
    torch.manual_seed(seed)
    model = build_model(setting.model, shape=data.shape, classes=len(data.classes))
    loader = make_loader(data.train, setting.batch_size, seed)
    if method.name in EVENT_LAWS:
        return train_by_event(setting, method, model, loader, seed)
    trainer = SparseTrainer(
        model,
        optimizer=setting.optimizer,
        policy=method.name,
        rate=method.rate,
        schedule=setting.schedule,
        lr_warmup=0.0,
        dense_start=0.0,
        dense_end=0.125 if method.name == "infobatch" else 0.0,
        seed=seed,
        settings=TrainerSettings(clip_norm=setting.clip_norm, scoring_precision="float32"),
    )
    log = trainer.fit(loader, epochs=setting.epochs, progress=False)
    return Outcome(model, int(log.rows_trained), int(log.rows_seen), log.raw_seconds)


def train_by_event(
    setting: Setting, method: Method, model: nn.Module, loader: ResidentLoader, seed: int
) -> Outcome:  # fmt: skip
    """Train as the original's scripts did: one step of the optimizer for every row kept."""
    optimizer = setting.optimizer(model.parameters())
    decide = _decisions(method, seed)
    steps_in_all, offered, trained, began = setting.epochs * len(loader), 0, 0, time.perf_counter()
    for batch in range(steps_in_all):
        if setting.schedule == "cosine":
            for group in optimizer.param_groups:
                group["lr"] = 5e-4 * (1.0 + np.cos(np.pi * batch / steps_in_all))
        images, targets = loader.fetch(next(_items(loader, batch)))
        for row in np.flatnonzero(decide(model, images, targets)):
            optimizer.zero_grad()
            loss = cross_entropy(model(images[row : row + 1]), targets[row : row + 1])
            loss.backward()  # type: ignore[no-untyped-call]
            if setting.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), setting.clip_norm)
            optimizer.step()
            trained += 1
        offered += len(targets)
    return Outcome(model, trained, offered, time.perf_counter() - began)


def _items(loader: ResidentLoader, batch: int) -> Iterator[Tensor]:
    """The rows of a run's batch."""
    epoch, place = divmod(batch, len(loader))
    yield loader.order(epoch)[place * loader.batch_size : (place + 1) * loader.batch_size]


def _decisions(method: Method, seed: int) -> Callable[[nn.Module, Tensor, Tensor], Any]:
    """Return the law: from model, images and targets of a batch to bool [rows]."""
    random, target = np.random.default_rng(seed), np.full((1, 1), method.rate or 0.0)
    sundew, standalone, seen = Sundew(target, seed), Standalone(target), [0]

    def decide(model: nn.Module, images: Tensor, targets: Tensor) -> Any:
        if method.name == "coin":
            return random.random(len(targets)) < target.item()
        if method.name == "probe":
            seen[0] += len(targets)
            return np.arange(seen[0] - len(targets) + 1, seen[0] + 1) % Sundew.PROBE == 0
        with torch.no_grad():
            losses = cross_entropy(model(images), targets, reduction="none")
        contrast = images.flatten(1).std(1)
        significance = (0.5 * losses / losses.max() + 0.3 * contrast / contrast.max() + 0.2).double().numpy()
        if method.name == "sundew":
            return sundew.decide(significance[:, None, None])[:, 0, 0]
        return standalone.decide(significance, random)

    return decide


def accuracy(model: nn.Module, data: ImageData) -> float:
    """Fraction of the test images that the model names rightly."""
    loader = make_loader(data.test, min(500, len(data.test)), 0, shuffle=False)
    return SparseTrainer(model, policy="dense").evaluate(loader)["accuracy"]


def chosen(options: argparse.Namespace) -> Iterator[tuple[str, Method]]:
    """Settings and methods that the options name, or all."""
    for name, setting in SETTINGS.items():
        for method in setting.methods:
            if (
                options.setting in (None, name)
                and options.method in (None, method.name)
                and options.rate in (None, method.rate)
            ):
                yield name, method


def measure_accuracy(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Run what the record does not hold yet; every run is printed and written."""
    data = load(options.data, options.root, options.rows)
    runs = record.setdefault("runs", [])
    done = {(run["setting"], run["method"], run["rate"], run["seed"]) for run in runs}
    for seed in range(options.seeds):
        for name, method in chosen(options):
            if (name, method.name, method.rate, seed) in done:
                continue
            outcome = train(SETTINGS[name], method, data, seed)
            run = {
                "setting": name, "method": method.name, "rate": method.rate, "seed": seed,
                "accuracy": accuracy(outcome.model, data), "trained": outcome.trained, "offered": outcome.offered,
                "raw_seconds": round(outcome.seconds, 2),
            }  # fmt: skip
            runs.append(run)
            kept = outcome.trained / outcome.offered
            print(f"{name} {method.label}, seed {seed}: {run['accuracy']:.2%}, trained on {kept:.1%}", flush=True)
            write(options.record, record)


def measure_times(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Time a miniature of every run, in rounds over all of them, and enter the median ratio to the dense one."""
    data = load(options.data, options.root, TIMED_ROWS)
    seconds: dict[tuple[str, Method], list[float]] = {one: [] for one in chosen(options)}
    for name in {name for name, _ in seconds}:
        seconds.setdefault((name, Method("dense")), [])
    for number in range(ROUNDS):
        for name, method in seconds:
            spent = train(SETTINGS[name], method, data, number).seconds
            if number:
                seconds[name, method].append(spent)
    times = record["times"] = []
    for (name, method), spent in seconds.items():
        dense = seconds[name, Method("dense")]
        ratios = [mine / of_dense for mine, of_dense in zip(spent, dense, strict=True)]
        ratio = statistics.median(ratios)
        times.append({"setting": name, "method": method.name, "rate": method.rate, "ratio": ratio, "ratios": ratios})
        print(f"{name} {method.label}: {ratio:.2f} of the dense run's time", flush=True)
    record["timed"] = {"rows": TIMED_ROWS, "rounds": ROUNDS - 1, "environment": environment(torch.device("cpu"))}
    write(options.record, record)


def load(name: str, root: str | None, rows: int) -> ImageData:
    """Load the data, with that many training rows."""
    return take_part(load_data(name, root), rows)


def open_record(options: argparse.Namespace) -> dict[str, Any]:
    """Return the record to continue, or a new one."""
    same = {"data": options.data, "rows": options.rows, "threads": options.threads}
    if options.record is not None and options.record.exists():
        record: dict[str, Any] = json.loads(options.record.read_text())
        kept = {key: record.get(key) for key in same}
        if record.get("format") != FORMAT or kept != same:
            raise UserError(f"{options.record} must be a record of {same}, got one of {kept}; name a new file")
        return record
    created = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"format": FORMAT, "created": created, **same, "environment": environment(torch.device("cpu"))}


def write(path: Path | None, record: dict[str, Any]) -> None:
    """Write the record where one is asked for."""
    if path is not None:
        write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description="The original system's published settings, run.")
    parser.add_argument("--data", choices=("fashion-mnist", "cifar10"), default="fashion-mnist", help="data set")
    parser.add_argument("--root", help="folder of the data, or the published CIFAR-10 archive")
    parser.add_argument("--rows", type=int, default=ROWS, help="training rows, evenly from each class")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="seeds of every run")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    parser.add_argument("--setting", choices=tuple(SETTINGS), help="one setting; all by default")
    parser.add_argument("--method", help="one method; all by default")
    parser.add_argument("--rate", type=float, help="one rate of that method, such as 0.012")
    parser.add_argument("--times", action="store_true", help="time the runs in place of measuring accuracies")
    parser.add_argument("--record", type=Path, help="JSON file to write, or to continue")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        if not any(chosen(options)):
            raise UserError(f"no such run: {options.setting}, {options.method}, {options.rate}; see SETTINGS")
        record = open_record(options)
        (measure_times if options.times else measure_accuracy)(options, record)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
