"""The data that ``sparse-train train`` trains and evaluates on: in memory, or crops of a folder's images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from sparse_training.data.image_files import ImageFiles
from sparse_training.data.load import load_crops, load_data
from sparse_training.data.loaders import evaluation_loader, make_loader
from sparse_training.data.resident import ResidentLoader
from sparse_training.data.splits import hold_out, split_validation
from sparse_training.errors import UserError
from sparse_training.ranks import rank_and_world_size

WORKERS = 8  # at most, where none are named
NAMED = 3  # images that a warning names


class TrainingData(NamedTuple):
    """Batches to train and to evaluate on, those of this process.

    Attributes:
        train: the training rows.
        validation: rows held out of them; None for none.
        test: the test rows.
        shape: (C, H, W) of an image.
        classes: name of each class.
        images: data sets that read images when their rows are asked for.
    """

    train: ResidentLoader | DataLoader[Any]
    validation: Iterable[Any] | None
    test: Iterable[Any]
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    images: tuple[ImageFiles, ...] = ()

    def warnings(self) -> list[str]:
        """Name the images that could not be decoded."""
        lost = sorted({name for images in self.images for name in images.unreadable})
        if not lost:
            return []
        more = f" and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
        images = "images" if len(lost) > 1 else "image"
        return [f"{len(lost)} {images} that could not be decoded left out: {', '.join(lost[:NAMED])}{more}"]


def training_data(options: Mapping[str, Any], device: torch.device) -> TrainingData:
    """Load the data that the options name.

    Args:
        options: options of the command; those that a former version did not have may be missing.
        device: PyTorch device of the training.

    Raises:
        UserError: data missing, or options that do not fit one another.
    """
    if options.get("crops") is not None:
        return _crops(options)
    if options.get("workers") is not None:
        raise UserError("--workers is for --crops, whose images are read while the model trains")
    data = load_data(options["data"], options["root"], size=options.get("image_size"))
    fraction = options.get("validation", 0.0)
    data, held = split_validation(data, fraction=fraction) if fraction else (data, None)
    return TrainingData(
        make_loader(data.train, data, batch_size=options["batch_size"], seed=options["seed"], device=device),
        None if held is None else evaluation_loader(data, device, held),
        evaluation_loader(data, device),
        data.shape,
        data.classes,
    )


def _crops(options: Mapping[str, Any]) -> TrainingData:
    size, seed, fraction = options["crops"], options["seed"], options.get("validation", 0.0)
    if options["data"] != "imagefolder":
        raise UserError(f"--crops is for --data imagefolder; the images of {options['data']} have a fixed size")
    if options.get("image_size") is not None:
        raise UserError("give --crops or --image-size, not both: crops are of the images as they are")
    rank, ranks = rank_and_world_size()
    workers = options.get("workers")
    if workers is None:
        workers = min(WORKERS, max(1, (os.cpu_count() or 1) // ranks))
    images = load_crops(options["root"], size=size, seed=seed)
    train: Dataset[Any] = images.train
    held: Dataset[Any] | None = None
    if fraction:
        parts = hold_out(images.train.labels, fraction=fraction)
        train = Subset(images.train, parts.train.tolist())
        held = Subset(images.plain, parts.validation.tolist())

    def in_order(rows: Any) -> DataLoader[Any]:
        own = Subset(rows, range(rank, len(rows), ranks))
        return DataLoader(own, batch_size=options["batch_size"], num_workers=workers)

    sampler = None if ranks == 1 else DistributedSampler(train, seed=seed)  # type: ignore[var-annotated]
    loader = DataLoader(
        train, batch_size=options["batch_size"], sampler=sampler, shuffle=sampler is None, num_workers=workers,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    return TrainingData(
        loader, None if held is None else in_order(held), in_order(images.test), (3, size, size), images.train.classes,
        tuple(images),
    )  # fmt: skip
