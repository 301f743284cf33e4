"""Epochs over JPEGs of 500x375, loader included: every row, a tenth of them, and 70%; for an idle machine.

    python benchmarks/images.py FOLDER [--images 200000] [--workers 2] [--seconds 480] [--out FILE.json]

FOLDER receives the images once (200,000: about 11 GB, some minutes on all cores) and is used again if it has them.
Each is a part of a large textured picture, a file with bytes of its own. The rows pass through the sides in segments,
one of each side in turn, and medians are compared, so the time is the same for any number of images: --seconds, with
--images 200000 and two cores 8 minutes. A row that a sampler leaves out has passed too.

Two models: a linear one on small images, where the loader is what a step waits for, and ResNet-50 on 16 images a step,
where it is the model. Scores are fixed numbers, log-normal, so that the samplers' rates stand still.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timing
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from sparse_training import HistorySampler, ImageFiles, Indexed, RandomCropAndFlip, build_model

WIDTH, HEIGHT, QUALITY = 500, 375, 89
BASES, CLASSES = 8, 100
KEPT = 0.7
TARGETS = {"10%": 6.0, "70%": 1.3}  # times the rows a second of the dense epoch, where the loader binds


def base(number: int) -> np.ndarray:
    """A picture of 2000x1500 with detail at every scale and edges, as photographs have: uint8 [1500, 2000, 3]."""
    draws = np.random.default_rng(number)
    picture = np.zeros((4 * HEIGHT, 4 * WIDTH, 3))
    for octave in range(2, 10):
        side = (3 * 2**octave // 4 + 1, 2**octave + 1)
        coarse = [Image.fromarray(draws.normal(size=side).astype(np.float32)) for _ in range(3)]
        fine = [np.array(layer.resize((4 * WIDTH, 4 * HEIGHT), Image.Resampling.BICUBIC)) for layer in coarse]
        common = fine[0][..., None]
        picture += (common + 0.35 * np.stack(fine, -1)) * 0.62 ** (octave - 2)
    y, x = np.mgrid[: 4 * HEIGHT, : 4 * WIDTH]
    for _ in range(60):  # shapes with edges
        cx, cy, radius = draws.uniform(0, 4 * WIDTH), draws.uniform(0, 4 * HEIGHT), draws.uniform(20, 160)
        picture[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] += draws.normal(size=3)
    picture += 0.2 * draws.normal(size=picture.shape)  # grain
    spread = picture.std()
    return (128 + 52 * (picture - picture.mean()) / spread).clip(0, 255).astype(np.uint8)


def path_of(folder: Path, number: int) -> Path:
    return folder / f"class{number % CLASSES:03}" / f"{number:07}.jpg"


def write_images(folder: Path, images: int, pictures: int, first: int, step: int) -> None:
    """Write every ``step``-th image from ``first`` that is not there yet."""
    bases = [base(number) for number in range(pictures)]
    for number in range(first, images, step):
        path = path_of(folder, number)
        if path.exists():
            continue
        place = number // pictures * 1_000_003 % (3 * WIDTH * 3 * HEIGHT)  # prime to it: no part twice
        top, left = divmod(place, 3 * WIDTH)
        encoded = io.BytesIO()
        part = np.ascontiguousarray(bases[number % pictures][top : top + HEIGHT, left : left + WIDTH])
        Image.fromarray(part).save(encoded, "JPEG", quality=QUALITY)
        temporary = path.with_suffix(".part")
        temporary.write_bytes(encoded.getvalue())
        temporary.replace(path)


def generate(folder: Path, images: int, pictures: int = BASES) -> float:
    """Write the images that are not there, on all cores; return the seconds that it took."""
    for number in range(CLASSES):
        (folder / f"class{number:03}").mkdir(parents=True, exist_ok=True)
    began, cores = time.perf_counter(), len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=write_images, args=(folder, images, pictures, core, cores)) for core in range(cores)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0, "an image could not be written"
    return time.perf_counter() - began


class Side:
    """An endless training on one side's rows, in segments.

    Attributes:
        rate: rows trained on by rows of the data set that pass.
        rows_a_second: rows that passed by seconds, of each segment.
        starts: seconds from the start of an epoch to its first batch.
    """

    def __init__(
        self, data: ImageFiles, scores: torch.Tensor, model: nn.Module, sampler: HistorySampler | None, options: Any
    ) -> None:
        self.scores, self.model, self.sampler, self.options = scores, model, sampler, options
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        workers: dict[str, Any] = {"num_workers": options.workers}
        indexed = Indexed(data)
        if sampler is None:
            self.loader = DataLoader(indexed, options.batch, shuffle=True, **workers)
            self.rate = 1.0
        else:
            sampler.table.update(torch.arange(len(data)), scores)
            self.loader = DataLoader(indexed, batch_sampler=sampler, **workers)
            self.rate = math.nan  # of the first epoch
        self.size = len(data)
        self.rows_a_second, self.starts = list[float](), list[float]()
        self.batches = self._endless()

    def _endless(self) -> Iterator[Any]:
        while True:
            if self.sampler is not None:
                self.rate = min(1.0, len(self.sampler) * self.options.batch / self.size)
            began, first = time.perf_counter(), True
            for batch in self.loader:
                if first:
                    self.starts.append(time.perf_counter() - began)
                    first = False
                yield batch

    def step(self) -> int:
        index, (inputs, targets) = next(self.batches)
        losses = F.cross_entropy(self.model(inputs), targets, reduction="none")
        weights = 1.0 if self.sampler is None else self.sampler.weights(index)
        (losses * weights).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.sampler is not None:
            self.sampler.update(index, self.scores[index])
        return len(index)

    def segment(self, batches: int) -> None:
        """Use what the workers had ready, and time what they bring from then on."""
        for _ in range(2 * self.options.workers):
            self.step()
        began, starts = time.perf_counter(), len(self.starts)
        rows = sum(self.step() for _ in range(batches))
        seconds = time.perf_counter() - began - sum(self.starts[starts:])  # a start is counted once an epoch, below
        self.rows_a_second.append(rows / self.rate / seconds)

    def summary(self) -> dict[str, float]:
        """Rows a second of a whole epoch: its start, and all rows at the median pace."""
        pace, start = statistics.median(self.rows_a_second), statistics.median(self.starts)
        return {
            "rows_per_second": self.size / (start + self.size / pace),
            "epoch_start_seconds": start,
            "rate": self.rate,
            **timing.quantiles(self.rows_a_second),
        }


class Case(NamedTuple):
    """A model, and how it is measured.

    Attributes:
        model: makes the model.
        batch: rows of a batch.
        segment: batches of a segment.
        share: share of the time.
    """

    model: Any
    batch: int
    segment: int
    share: float


CASES = {
    "loader-bound": Case(
        lambda: nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(3 * 14 * 14, CLASSES)), 64, 12, 0.55
    ),
    "model-bound": Case(lambda: build_model("resnet50", shape=(3, 224, 224), classes=CLASSES), 16, 3, 0.45),
}


def measure(case: Case, data: ImageFiles, options: argparse.Namespace) -> dict[str, Any]:
    """Train all sides in turn for the case's share of the time, three rounds at least."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(len(data), generator=generator).exp()
    below = float((scores < scores.mean()).float().mean())
    options.batch = 4 if options.small else case.batch
    tenth = HistorySampler(data, options.batch, rate=0.1)
    pruned = HistorySampler(data, options.batch, method="infobatch", prune=(1.0 - KEPT) / below)
    sides = {
        name: Side(data, scores, case.model(), sampler, options)
        for name, sampler in (("dense", None), ("10%", tenth), ("70%", pruned))
    }
    began, rounds = time.perf_counter(), 0
    while rounds < (1 if options.small else 3) or time.perf_counter() - began < case.share * options.seconds:
        for side in sides.values():
            side.segment(1 if options.small else case.segment)
        rounds += 1
    found = {name: side.summary() for name, side in sides.items()}
    dense = found["dense"]["rows_per_second"]
    ratios = {name: found[name]["rows_per_second"] / dense for name in TARGETS}
    return {"sides": found, "ratio_to_dense": ratios, "rounds": rounds, "batch": options.batch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=480.0, help="of the measurement, the images apart")
    parser.add_argument("--small", action="store_true", help="run every line, measure nothing")
    parser.add_argument("--out", type=Path, help="default: results/images-DATE.json")
    options = parser.parse_args()
    if options.small:
        options.images, options.seconds = 160, 0.0
    seconds = generate(options.folder, options.images, 1 if options.small else BASES)
    print(f"{options.images} images in {options.folder}, made in {seconds:.0f} s", flush=True)
    data = ImageFiles(options.folder, RandomCropAndFlip(224))
    assert len(data) == options.images, f"{options.folder} must hold {options.images} images, got {len(data)}"
    sample = [
        path_of(options.folder, number).stat().st_size for number in range(0, len(data), max(1, len(data) // 100))
    ]
    record: dict[str, Any] = {
        "created": timing.today(),
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "images": {"rows": len(data), "size": [WIDTH, HEIGHT], "median_bytes": statistics.median(sample)},
        "workers": options.workers,
        "cases": {},
    }
    for name, case in CASES.items():
        found = record["cases"][name] = measure(case, data, options)
        print(
            f"{name}: "
            + ", ".join(f"{side} {each['rows_per_second']:.0f} rows/s" for side, each in found["sides"].items())
        )
        for side, target in TARGETS.items():
            ratio = found["ratio_to_dense"][side]
            said = f", {'met' if ratio >= target else 'MISSED'}: at least {target}" if name == "loader-bound" else ""
            print(f"    {side}: {ratio:.2f} times dense{said}", flush=True)
    path = options.out or timing.RESULTS / f"images-{timing.today()}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
