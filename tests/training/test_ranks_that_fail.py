"""A rank that fails is named on the others, which end in place of waiting; it may live on or be killed."""

from __future__ import annotations

import functools
import os
import shutil
import signal

import pytest
import torch
import torch.distributed as dist
from ranks_of_a_user import run_ranks
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from sparse_training import SparseTrainer

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="a PyTorch without torch.distributed and gloo"
)


class Rows(Dataset):
    """A file of it is gone on one rank."""

    def __init__(self, broken):
        self.broken = broken

    def __len__(self):
        return 96

    def __getitem__(self, index):
        if self.broken and index == 41:
            raise FileNotFoundError("row 41 is gone")
        return torch.full((8,), index / 96), index % 3


class Model(nn.Module):
    def __init__(self, fails=None):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))  # DDP sends buffers, too
        self.fails, self.calls = fails, 0

    def forward(self, x):
        self.calls += 1
        if self.fails == "forward" and self.calls > 9:
            raise IndexError("index out of range in self")
        y = self.layer(x)
        if self.fails == "backward" and self.calls > 9 and y.requires_grad:
            y.register_hook(self.refuse)
        return y

    def refuse(self, gradient):
        raise MemoryError("out of memory")


def fail(*arguments):
    raise OSError("the display is gone")


def train(rank, size, *, where, one, folder=None, **given):
    this = rank == one
    data = Rows(this and where == "data")
    trainer = SparseTrainer(
        Model(where if this else None),
        policy=given.get("policy", "gate"),
        granularity=given.get("granularity"),
        lr=-1.0 if this and where == "settings" else 0.1,
    )
    loader = DataLoader(data, batch_size=8, sampler=DistributedSampler(data))
    options = {}
    if where == "progress":
        options["progress"] = fail if this else False
    if where == "evaluation":
        options |= {"evaluations": 4, "evaluate": lambda model: fail() if this else {"a": 0.0}}
    if where == "checkpoint":
        options |= {"checkpoint": folder, "checkpoint_interval": 5}
        if this:
            options["progress"] = lambda status: shutil.rmtree(folder, ignore_errors=True)
    if where == "killed" and this:
        options["progress"] = lambda status: os.kill(os.getpid(), signal.SIGKILL) if status.step == 3 else None
    if where == "interrupted" and this:
        options["progress"] = lambda status: signal.raise_signal(signal.SIGINT)
    if where == "unbudgeted":
        return trainer.fit(loader, steps=0 if this else 40)
    return trainer.fit(loader, steps=40, **options)


@pytest.mark.parametrize(
    ("where", "one", "size", "said"),
    [
        ("settings", 1, 2, "`lr` must be above 0, got -1.0"),
        ("unbudgeted", 0, 2, "`steps` must be above 0 and finite, got 0"),
        ("data", 2, 3, "FileNotFoundError: row 41 is gone"),
        ("forward", 1, 3, "IndexError: index out of range in self"),
        ("progress", 0, 3, "OSError: the display is gone"),
        ("evaluation", 1, 2, "OSError: the display is gone"),
        ("checkpoint", 0, 2, "cannot be written: No such file or directory"),
    ],
)
def test_the_others_end_and_say_which_rank_failed(tmp_path, where, one, size, said):
    """The one that failed caught the error and lives on: nobody is woken by its end."""
    found = run_ranks(functools.partial(train, where=where, one=one, folder=tmp_path / "run"), size, tmp_path)
    assert said in str(found[one])
    for rank in set(range(size)) - {one}:
        assert str(found[rank]).startswith(f"rank {one} failed: "), found[rank]
        assert said in str(found[rank])
        assert str(found[rank]).endswith("; this rank ends too")
        assert "\n" not in str(found[rank])


def test_a_failure_among_tokens(tmp_path):
    found = run_ranks(functools.partial(train, where="data", one=0, granularity="token"), 2, tmp_path)
    assert str(found[1]) == "rank 0 failed: FileNotFoundError: row 41 is gone; this rank ends too"


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["gate", "dense"])
def test_a_backward_pass_that_fails(tmp_path, policy):
    """PyTorch itself waits in the others: they wake up when the process ends."""
    found = run_ranks(functools.partial(train, where="backward", one=1, policy=policy), 3, tmp_path, stays=False)
    for rank in (0, 2):
        assert str(found[rank]) == "rank 1 failed: MemoryError: out of memory; this rank ends too"


def test_a_rank_that_is_killed(tmp_path):
    found = run_ranks(functools.partial(train, where="killed", one=1), 3, tmp_path, stays=False, lost=1)
    for rank in (0, 2):
        assert str(found[rank]).startswith("another rank has ended or does not answer: "), found[rank]
        assert "\n" not in str(found[rank])
