"""Tasks of a study: data to train on, the measure of success, and the model where none by name fits.

Most are made of the study's own images by a change to their training rows. A validation split, of a stated share, is
held out before the change, so it is drawn as the test split is; choices are made on it. Rows that were tampered with,
or are rare, are remembered, so that a report can tell whether a policy found them. To add a task, write a function of
(data, validation, generator) and enter it in ``TASKS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparse_training.criterion import Loss
from sparse_training.data import diamonds, shakespeare
from sparse_training.data.splits import VALIDATION, ImageData, Split, split_validation
from sparse_training.data.tensors import TensorData, TensorSplit
from sparse_training.errors import UserError
from sparse_training.experiments.measures import ACCURACY, R_SQUARED, Measure
from sparse_training.models.augment import RandomShiftFlip
from sparse_training.models.build import build_model
from sparse_training.models.small import Regressor, TextClassifier

NOISE = 0.2  # fraction of labels that are replaced
IMBALANCE = 100.0  # rows of the largest class over those of the smallest
MINORITY = 0.05  # share of the rare class of two
COPIES = 10  # times that a duplicated image occurs
RARE = 0.1  # fraction of rows that occur once beside them
LONG_ROWS = 10_000  # of a long run: few enough for many passes
MIN_ROWS = 10 * COPIES
SEED = 20_240  # seed of the tasks' draws: the same in every run of every method
IMAGES = ""  # bench of the tasks whose steps cost what those of the data as they are cost


@dataclass(frozen=True, eq=False)
class Task:
    """A data set to train on, with a description.

    Attributes:
        name: key in ``TASKS``.
        says: description in one sentence.
        data: the data set, without the validation rows.
        validation: rows to make choices on; never trained on.
        planted: bool [N], the training rows that were tampered with or are rare; None for none.
        planted_name: name of those rows, in the plural, such as "wrong labels".
        start_rows: number of rows at the front of ``data.train`` on which the weights are trained that every run
            starts from; 0 for fresh weights.
        measure: measure of success on validation and test rows. Default: accuracy.
        loss: per-row loss; None for cross-entropy.
        model: maps the name of the study's model to the task's model, with fresh weights; None for the one by name.
        bench: tasks of one bench are timed together, as their steps cost the same. Default: the images as they are.
    """

    name: str
    says: str
    data: ImageData | TensorData
    validation: Split | TensorSplit
    planted: Tensor | None = None
    planted_name: str = ""
    start_rows: int = 0
    measure: Measure = ACCURACY
    loss: Loss | None = None
    model: Callable[[str], nn.Module] | None = None
    bench: str = IMAGES

    def build(self, name: str) -> nn.Module:
        """Make the task's model, with fresh weights, drawn from torch's global generator."""
        if self.model is not None:
            return self.model(name)
        assert isinstance(self.data, ImageData)
        return build_model(name, shape=self.data.shape, classes=len(self.data.classes))


def make_task(name: str, data: ImageData, *, min_rows: int = MIN_ROWS, validation: float = VALIDATION) -> Task:
    """Make a task from a data set; the same rows every time.

    Args:
        name: key in ``TASKS``.
        data: data set to change; a task of other data leaves it alone.
        min_rows: smallest number of training rows to accept. Default 100.
        validation: share of the training rows that is held out for choices, in (0, 1). Default 0.1.

    Returns:
        The task, with data of its own.

    Raises:
        UserError: an unknown name, too few rows, or a data set that is not installed.
    """
    if name not in TASKS:
        raise UserError(f"task {name!r} is unknown; use one of {', '.join(TASKS)}")
    generator = torch.Generator().manual_seed(SEED)
    if name in OF_OTHER_DATA:
        return OF_OTHER_DATA[name](validation)
    if len(data.train) < min_rows:
        raise UserError(f"a study's tasks need at least {min_rows} rows to train on, got {len(data.train)}")
    rest, held = split_validation(data, fraction=validation)
    return OF_THE_IMAGES[name](rest, held, generator)


# --- the study's own images ------------------------------------------------------------------------


def clean(data: ImageData, validation: Split, generator: torch.Generator) -> Task:
    """Leave the data as published."""
    return Task("clean", "the data as published", data, validation)


def noise(data: ImageData, validation: Split, generator: torch.Generator) -> Task:
    """Replace a fifth of the training labels by another class, each as likely."""
    rows, classes = len(data.train), len(data.classes)
    planted = torch.zeros(rows, dtype=torch.bool)
    planted[torch.randperm(rows, generator=generator)[: round(NOISE * rows)]] = True
    shift = torch.randint(1, classes, (rows,), generator=generator)
    labels = torch.where(planted, (data.train.labels + shift) % classes, data.train.labels)
    says = f"{NOISE:.0%} of the training labels replaced by another class"
    noisy = replace(data, train=Split(data.train.images, labels))
    return Task("noise", says, noisy, validation, planted, "wrong labels")


def longtail(data: ImageData, validation: Split, generator: torch.Generator) -> Task:
    """Thin the classes exponentially by their number: the first keeps a hundred times as many rows as the last."""
    train, says = _long_tail(data, data.train, generator)
    return Task("longtail", f"{says}; the test is balanced", replace(data, train=train), validation)


def longtail_alike(data: ImageData, validation: Split, generator: torch.Generator) -> Task:
    """Thin the classes of all splits alike: the test has the training rows' shares."""
    train, says = _long_tail(data, data.train, generator)
    (test, _), (held, _) = (_long_tail(data, split, generator) for split in (data.test, validation))
    return Task("longtail-alike", f"{says}; the test alike", replace(data, train=train, test=test), held)


def imbalanced(data: ImageData, validation: Split, generator: torch.Generator) -> Task:
    """Tell the first class, thinned to one row in twenty, from all others; the test has the same shares."""
    splits = []
    for split in (data.train, data.test, validation):
        rare = (split.labels == 0).nonzero().squeeze(1)
        others = (split.labels != 0).nonzero().squeeze(1)
        kept = max(1, min(len(rare), round(len(others) * MINORITY / (1.0 - MINORITY))))
        index = torch.cat((rare[torch.randperm(len(rare), generator=generator)[:kept]], others)).sort().values
        splits.append(Split(split.images[index], (split.labels[index] == 0).long()))
    train, test, held = splits
    says = f"{data.classes[0]} against all others, {MINORITY:.0%} of the rows, in the test as in training"
    two = replace(data, train=train, test=test, classes=("others", data.classes[0]))
    return Task("imbalanced", says, two, held, train.labels == 1, "rows of the rare class")


def duplicated(data: ImageData, validation: Split, generator: torch.Generator) -> Task:
    """Make nine tenths of the rows of few images, ten times each; the others, the planted ones, occur once."""
    rows = len(data.train)
    once = round(RARE * rows)
    repeated = (rows - once) // COPIES
    order = torch.randperm(rows, generator=generator)
    index = torch.cat((order[:once], order[once : once + repeated].repeat(COPIES)))
    planted = torch.arange(len(index)) < once
    mixed = torch.randperm(len(index), generator=generator)
    says = f"{repeated:,} images {COPIES} times each beside {once:,} images seen once"
    copied = replace(data, train=data.train.take(index[mixed]))
    return Task("duplicated", says, copied, validation, planted[mixed], "images seen once")


def finetune(data: ImageData, validation: Split, generator: torch.Generator) -> Task:
    """Start every run from weights trained on the first half of the rows."""
    says = "every run starts from one checkpoint, trained densely on the first half of the rows"
    return Task("finetune", says, data, validation, start_rows=len(data.train) // 2)


def long(data: ImageData, validation: Split, generator: torch.Generator) -> Task:
    """Train for many passes on a part of the rows, shifted and reflected anew each time."""
    rows = min(LONG_ROWS, len(data.train))
    index = torch.randperm(len(data.train), generator=generator)[:rows].sort().values
    part = replace(data, train=data.train.take(index))

    def model(name: str) -> nn.Module:
        built = build_model(name, shape=data.shape, classes=len(data.classes))
        return nn.Sequential(RandomShiftFlip(), built)

    says = f"{rows:,} images, each shifted and reflected at random whenever it is trained on, for many passes"
    return Task("long", says, part, validation, model=model, bench="long")


def _long_tail(data: ImageData, split: Split, generator: torch.Generator) -> tuple[Split, str]:
    """A split with its classes thinned exponentially, and its description."""
    last = max(len(data.classes) - 1, 1)
    parts = []
    for label in range(len(data.classes)):
        rows = (split.labels == label).nonzero().squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        parts.append(rows[: max(1, round(len(rows) * IMBALANCE ** (-label / last)))])
    says = f"classes from {len(parts[0]):,} rows falling exponentially to {len(parts[-1]):,}"
    return split.take(torch.cat(parts).sort().values), says


# --- other data --------------------------------------------------------------------------------------


def tabular(validation: float = VALIDATION) -> Task:
    """Predict the prices of diamonds from a table, by least squares."""
    data, held = diamonds.load().split_validation(fraction=validation)
    says = "prices of diamonds from 26 features of a table, by squared errors; measured by R²"
    return Task(
        "tabular", says, data, held, measure=R_SQUARED, loss=nn.MSELoss(reduction="none"),
        model=lambda _: Regressor(diamonds.FEATURES), bench="tabular",
    )  # fmt: skip


def text(validation: float = VALIDATION) -> Task:
    """Tell from which work of Shakespeare's a passage is."""
    data, held = shakespeare.load().split_validation(fraction=validation)
    words = 1 + max(int(split.images.max()) for split in (data.train, data.test, held))
    says = f"which of {len(data.classes)} works of Shakespeare's four lines are from"
    return Task("text", says, data, held, model=lambda _: TextClassifier(words, len(data.classes)), bench="text")


OF_THE_IMAGES: dict[str, Callable[[ImageData, Split, torch.Generator], Task]] = {
    "clean": clean,
    "noise": noise,
    "longtail": longtail,
    "duplicated": duplicated,
    "finetune": finetune,
    "imbalanced": imbalanced,
    "longtail-alike": longtail_alike,
    "long": long,
}
OF_OTHER_DATA: dict[str, Callable[[float], Task]] = {"tabular": tabular, "text": text}
TASKS = (*OF_THE_IMAGES, *OF_OTHER_DATA)
DEFAULT_TASKS = tuple(name for name in OF_THE_IMAGES if name != "long")  # those that any data set of images can give
