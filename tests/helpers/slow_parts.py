"""Models and data whose time is counted, not measured: each piece of work moves a clock on by its number of rows."""

import time

import torch
from torch import nn
from torch.utils.data import Dataset


class FakeClock:
    """Stands in for ``time.perf_counter``; ``on`` while the test wants it."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1e-9  # a clock moves
        return self.now

    def spend(self, seconds):
        self.now += seconds

    def __deepcopy__(self, memo):
        return self


def install(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


class _Tick(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, clock, forward, backward):
        ctx.clock, ctx.seconds = clock, backward * x.shape[0]
        clock.spend(forward * x.shape[0])
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.clock.spend(ctx.seconds)
        return gradient, None, None, None


class Slow(nn.Module):
    """Passes its input on, and takes its time for each row, forward and backward."""

    def __init__(self, clock, forward, backward):
        super().__init__()
        self.clock, self.seconds = clock, (forward, backward)

    def forward(self, x):
        return _Tick.apply(x, self.clock, *self.seconds)


class SlowBatch(nn.Module):
    """Passes its input on, and takes its time for each batch, however small."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def forward(self, x):
        self.clock.spend(self.seconds)
        return x


class SlowLinear(nn.Linear):
    """A linear layer that takes its time for each row of its input, forward and twice that backward."""

    def __init__(self, clock, seconds, features, classes):
        super().__init__(features, classes)
        self.clock, self.seconds = clock, seconds

    def forward(self, x):
        rows = super().forward(x).reshape(-1, self.out_features)
        return _Tick.apply(rows, self.clock, self.seconds, 2 * self.seconds).reshape(*x.shape[:-1], -1)


class SlowRows(Dataset):
    """Rows that take their time to read."""

    def __init__(self, clock, seconds, inputs, targets):
        self.clock, self.seconds, self.inputs, self.targets = clock, seconds, inputs, targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, row):
        self.clock.spend(self.seconds)
        return self.inputs[row], self.targets[row]


def mostly_easy(rows, seed=0, hard=0.2):
    """Two classes, far apart, and a part of the rows in between with labels at random."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 2, (rows,), generator=generator)
    inputs = torch.randn(rows, 8, generator=generator)
    inputs[:, 0] = 4.0 * (2.0 * targets - 1.0)
    between = torch.rand(rows, generator=generator) < hard
    inputs[between, 0] = 0.0
    return inputs, targets


def classifier(*slow):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 2), *slow)
