"""A small study with given costs."""

import torch

from sparse_training.data.splits import ImageData, Split
from sparse_training.experiments.study import study_design, study_runner
from sparse_training.training.clock import Costs

FREE = {"score": ((1,), (0.0,)), "select": ((1,), (0.0,))}


COSTS = Costs(
    {"load": ((1, 100), (0.01, 1.0)), "train": ((1, 100), (0.1, 10.0))},
    {"dense": FREE, "random": FREE, "infobatch": FREE, "gate": {**FREE, "score": ((1, 100), (0.03, 3.0))}},
    5,
)


METHODS = ("dense", "random", "random-again", "infobatch", "gate")


def model(shape, classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(shape[1] * shape[2], classes))


def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (300,), generator=generator)
    images = torch.randint(0, 120, (300, 1, 8, 8), dtype=torch.uint8, generator=generator)
    images[:, 0, 0, :] += (40 * labels)[:, None].to(torch.uint8)
    train, test = Split(images[:200], labels[:200]), Split(images[200:], labels[200:])
    return ImageData.from_splits("stripes", train, test, ("a", "b", "c"), "made up")


def make(folder, **options):
    settings = {
        "model": f"{__name__}:model",
        "tasks": ("clean", "noise"),
        "methods": METHODS,
        "seeds": (0, 1),
        "rate": 0.25,
        "batch_size": 16,
        "seconds": 60.0,
        "lr": 0.01,
        "amp": "float32",
        "evaluations": 4,
    }
    resume = options.pop("resume", False)
    shard = options.pop("shard", (1, 1))
    return study_runner(data(), study_design(**{**settings, **options}), folder=folder, resume=resume, shard=shard)
