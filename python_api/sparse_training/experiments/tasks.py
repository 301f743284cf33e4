"""The tasks of a study: what is done to a data set before every arm trains on it.

Each is data in, data out; the test split stays as it is. What was planted is kept, so that a report can say
whether a policy found it. To add one, write a function of (data, generator) and enter it in TASKS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_training.data.splits import ImageData, Split
from sparse_training.errors import UserError

NOISE, IMBALANCE, COPIES, RARE = 0.2, 100.0, 10, 0.1
SEED = 20_240  # of what is planted: the same in every run of every arm


@dataclass(frozen=True, eq=False)
class Task:
    """A data set to train on, and what is known of it.

    Attributes:
        says: one sentence on what is special about it.
        planted: bool [N], the training rows that were tampered with or are rare; None for none.
        planted_name: what those rows are, in the plural.
        start_rows: rows at the front of ``data.train`` on which a checkpoint is trained that every run
            starts from; 0 for fresh weights.
    """

    name: str
    says: str
    data: ImageData
    planted: Tensor | None = None
    planted_name: str = ""
    start_rows: int = 0


def make_task(name: str, data: ImageData) -> Task:
    """A task by its name in TASKS; the same rows every time.

    Raises:
        UserError: an unknown name, or too few rows for it.
    """
    if name not in TASKS:
        raise UserError(f"task {name!r}: wanted one of {', '.join(TASKS)}")
    if len(data.train) < 10 * COPIES:
        raise UserError(f"{len(data.train)} rows to train on: wanted at least {10 * COPIES} for a study's tasks")
    return TASKS[name](data, torch.Generator().manual_seed(SEED))


def clean(data: ImageData, generator: torch.Generator) -> Task:
    """As published."""
    return Task("clean", "the data as published", data)


def noise(data: ImageData, generator: torch.Generator) -> Task:
    """A fifth of the training labels replaced by another class, each as likely."""
    rows, classes = len(data.train), len(data.classes)
    planted = torch.zeros(rows, dtype=torch.bool)
    planted[torch.randperm(rows, generator=generator)[: round(NOISE * rows)]] = True
    shift = torch.randint(1, classes, (rows,), generator=generator)
    labels = torch.where(planted, (data.train.labels + shift) % classes, data.train.labels)
    says = f"{NOISE:.0%} of the training labels replaced by another class"
    return Task("noise", says, replace(data, train=Split(data.train.images, labels)), planted, "wrong labels")


def longtail(data: ImageData, generator: torch.Generator) -> Task:
    """Rows of a class falling exponentially with its number, a hundredfold from the first to the last."""
    last = len(data.classes) - 1
    parts = []
    for label in range(len(data.classes)):
        rows = (data.train.labels == label).nonzero().squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        parts.append(rows[: max(1, round(len(rows) * IMBALANCE ** (-label / last)))])
    index = torch.cat(parts).sort().values
    says = f"classes from {len(parts[0]):,} rows falling exponentially to {len(parts[-1]):,}; the test is balanced"
    return Task("longtail", says, _rows(data, index))


def duplicated(data: ImageData, generator: torch.Generator) -> Task:
    """Nine tenths of the rows are few images, ten times each; the rest are images seen once, the planted ones."""
    rows = len(data.train)
    once = round(RARE * rows)
    repeated = (rows - once) // COPIES
    order = torch.randperm(rows, generator=generator)
    index = torch.cat((order[:once], order[once : once + repeated].repeat(COPIES)))
    planted = torch.arange(len(index)) < once
    mixed = torch.randperm(len(index), generator=generator)
    says = f"{repeated:,} images {COPIES} times each beside {once:,} images seen once"
    return Task("duplicated", says, _rows(data, index[mixed]), planted[mixed], "images seen once")


def finetune(data: ImageData, generator: torch.Generator) -> Task:
    """From a checkpoint of the first half of the rows, on all of them."""
    says = "every run starts from one checkpoint, trained densely on the first half of the rows"
    return Task("finetune", says, data, start_rows=len(data.train) // 2)


def _rows(data: ImageData, index: Tensor) -> ImageData:
    return replace(data, train=Split(data.train.images[index], data.train.labels[index]))


TASKS: dict[str, Callable[[ImageData, torch.Generator], Task]] = {
    made.__name__: made for made in (clean, noise, longtail, duplicated, finetune)
}
