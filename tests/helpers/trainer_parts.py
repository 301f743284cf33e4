"""A small network, its data and comparisons, for tests of the trainer."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_training.data.resident import ResidentLoader
from sparse_training.selection.policies.base import Policy
from sparse_training.selection.types import SelectedBatch

ROWS, CLASSES = 44, 4


def split(rows=ROWS):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    images = torch.randint(0, 120, (rows, 1, 8, 8), dtype=torch.uint8, generator=generator)
    images[:, :, 0, :] += (30 * labels)[:, None, None].to(torch.uint8)
    return SimpleNamespace(images=images, labels=labels)


def resident(batch_size=16, **options):
    return ResidentLoader(split(), batch_size=batch_size, std=(0.25,), **options)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, CLASSES)
    )


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


class Fixed(Policy):
    """Keeps the positions that it was given."""

    def __init__(self, positions):
        super().__init__()
        self.positions = torch.tensor(positions, dtype=torch.int64)

    def select(self, scores, batch):
        index = self.positions
        return SelectedBatch(batch.inputs[index], batch.targets[index], len(index), index)


def shuffled_stream():
    x, y = resident().fetch(torch.arange(ROWS))
    return DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
