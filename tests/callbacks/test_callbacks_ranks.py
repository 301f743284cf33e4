"""Callbacks where two processes train one model."""

import os

import pytest
import torch
import torch.distributed as dist
from ranks_of_a_user import run_ranks
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from sparse_training import Callback, SparseTrainer
from sparse_training.callbacks import CsvLogger, EarlyStopping, KeepLast

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="a PyTorch without torch.distributed and gloo"
)


class StopsOnOne(Callback):
    def __init__(self, rank):
        self.rank = rank

    def on_step_end(self, run):
        if self.rank == 1 and run.status.step == 3:
            run.stop("rank 1 has seen enough")


def fit(callbacks, **options):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(96, 8), torch.arange(96) % 3)
    loader = DataLoader(data, batch_size=8, sampler=DistributedSampler(data))
    return SparseTrainer(nn.Linear(8, 3), policy="dense").fit(loader, epochs=2, callbacks=callbacks, **options)


def stopped(rank, size):
    log = fit([StopsOnOne(rank), CsvLogger(f"{rank}.csv", interval=1), KeepLast(2)], checkpoint="run")
    return log.steps, log.stopped, sorted(os.listdir())


def test_a_callback_of_one_process_ends_all_and_the_first_alone_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    found = run_ranks(_in(stopped, tmp_path / "work"), 2, tmp_path)
    assert [steps for steps, *_ in found] == [3, 3]
    assert [reason for _, reason, _ in found] == ["a callback of another process ended it", "rank 1 has seen enough"]
    assert found[0][2] == ["0.csv", "run"]


class _in:
    def __init__(self, check, folder):
        self.check, self.folder = check, folder

    def __call__(self, rank, size):
        os.chdir(self.folder)
        return self.check(rank, size)


def unequal(rank, size):
    data = torch.randn(8, 8), torch.arange(8) % 3
    return fit([EarlyStopping()] if rank else [], evaluate=[data])


def test_processes_with_other_callbacks_are_told_at_the_start(tmp_path):
    for said in run_ranks(unequal, 2, tmp_path):
        assert "callbacks is [] on rank 0 and ['EarlyStopping:1'] on rank 1" in str(said)
