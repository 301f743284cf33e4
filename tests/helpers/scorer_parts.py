"""A small network and its data, for tests of scorers."""

from types import SimpleNamespace

import torch
from torch import nn

from sparse_training.data.resident import ResidentLoader

ROWS, CLASSES = 44, 4


def split(rows=ROWS):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    images = torch.randint(0, 120, (rows, 1, 8, 8), dtype=torch.uint8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 2 * label : 2 * label + 2] += 120
    return SimpleNamespace(images=images, labels=labels)


def resident(rows=ROWS, batch_size=16, **options):
    return ResidentLoader(split(rows), batch_size=batch_size, std=(0.25,), **options)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
