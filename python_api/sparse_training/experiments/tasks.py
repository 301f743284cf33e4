"""Tasks of a study: changes to a data set's training split that every method then trains on.

Each task maps data to data and leaves the test split alone. Rows that were tampered with, or are rare, are remembered,
so that a report can tell whether a policy found them. To add a task, write a function of (data, generator) and enter
it in ``TASKS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_training.data.splits import ImageData, Split
from sparse_training.errors import UserError

NOISE = 0.2  # fraction of labels that are replaced
IMBALANCE = 100.0  # rows of the largest class over those of the smallest
COPIES = 10  # times that a duplicated image occurs
RARE = 0.1  # fraction of rows that occur once beside them
MIN_ROWS = 10 * COPIES
SEED = 20_240  # seed of the tasks' draws: the same in every run of every method


@dataclass(frozen=True, eq=False)
class Task:
    """A data set to train on, with a description.

    Attributes:
        name: key in ``TASKS``.
        says: description in one sentence.
        data: the data set; its test split is untouched.
        planted: bool [N], the training rows that were tampered with or are rare; None for none.
        planted_name: name of those rows, in the plural, such as "wrong labels".
        start_rows: number of rows at the front of ``data.train`` on which the weights are trained that every run
            starts from; 0 for fresh weights.
    """

    name: str
    says: str
    data: ImageData
    planted: Tensor | None = None
    planted_name: str = ""
    start_rows: int = 0


def make_task(name: str, data: ImageData, *, min_rows: int = MIN_ROWS) -> Task:
    """Make a task from a data set; the same rows every time.

    Args:
        name: key in ``TASKS``.
        data: data set to change.
        min_rows: smallest number of training rows to accept. Default 100.

    Returns:
        The task, with data of its own where it differs.

    Raises:
        UserError: an unknown name, or too few rows.
    """
    if name not in TASKS:
        raise UserError(f"task {name!r} is unknown; use one of {', '.join(TASKS)}")
    if len(data.train) < min_rows:
        raise UserError(f"a study's tasks need at least {min_rows} rows to train on, got {len(data.train)}")
    return TASKS[name](data, torch.Generator().manual_seed(SEED))


def clean(data: ImageData, generator: torch.Generator) -> Task:
    """Leave the data as published."""
    return Task("clean", "the data as published", data)


def noise(data: ImageData, generator: torch.Generator) -> Task:
    """Replace a fifth of the training labels by another class, each as likely."""
    rows, classes = len(data.train), len(data.classes)
    planted = torch.zeros(rows, dtype=torch.bool)
    planted[torch.randperm(rows, generator=generator)[: round(NOISE * rows)]] = True
    shift = torch.randint(1, classes, (rows,), generator=generator)
    labels = torch.where(planted, (data.train.labels + shift) % classes, data.train.labels)
    says = f"{NOISE:.0%} of the training labels replaced by another class"
    return Task("noise", says, replace(data, train=Split(data.train.images, labels)), planted, "wrong labels")


def longtail(data: ImageData, generator: torch.Generator) -> Task:
    """Thin the classes exponentially by their number: the first keeps a hundred times as many rows as the last."""
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
    """Make nine tenths of the rows of few images, ten times each; the others, the planted ones, occur once."""
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
    """Start every run from weights trained on the first half of the rows."""
    says = "every run starts from one checkpoint, trained densely on the first half of the rows"
    return Task("finetune", says, data, start_rows=len(data.train) // 2)


def _rows(data: ImageData, index: Tensor) -> ImageData:
    return replace(data, train=Split(data.train.images[index], data.train.labels[index]))


TASKS: dict[str, Callable[[ImageData, torch.Generator], Task]] = {
    made.__name__: made for made in (clean, noise, longtail, duplicated, finetune)
}
