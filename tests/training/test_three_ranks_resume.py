"""Three processes that were stopped go on bit for bit, though a sum of three depends on its order."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from ranks_of_a_user import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from sparse_training import SparseTrainer, TrainerSettings

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="a PyTorch without torch.distributed and gloo"
)


def model():
    """Several layers, in which gradients come in another order than the parameters, and more than a bucket holds."""
    torch.manual_seed(0)
    wide = [nn.Linear(16, 600), nn.BatchNorm1d(600), nn.ReLU(), nn.Dropout(0.2), nn.Linear(600, 600), nn.ReLU()]
    return nn.Sequential(*wide, nn.Linear(600, 3))


def train(rank, size, *, folder=None, stop=None, wrap=None, **settings):
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(240, 16, generator=generator), torch.randint(3, (240,), generator=generator))
    net = model()
    trainer = SparseTrainer(
        net if wrap is None else DistributedDataParallel(net, **wrap),
        policy="gate", rate=0.5, settings=TrainerSettings(**settings),
    )  # fmt: skip
    torch.manual_seed(rank)
    steps = iter(range(1, 100))
    trainer.fit(
        DataLoader(data, batch_size=8, sampler=DistributedSampler(data)), steps=16,
        checkpoint=folder, resume=folder is not None, stop=lambda: next(steps) == stop,
    )  # fmt: skip
    return {name: value.tolist() for name, value in net.state_dict().items()}


OPTIONS = {
    "ours": {},
    "accumulated": {"accumulate": 3},
    "wrapped": {"wrap": {}},
    "wrapped, with unused parameters": {"wrap": {"find_unused_parameters": True}},
}


def every_option(rank, size, folder):
    found = {}
    for name, options in OPTIONS.items():
        whole = train(rank, size, **options)
        train(rank, size, folder=folder / name, stop=7, **options)
        found[name] = train(rank, size, folder=folder / name, **options) == whole
    return found


def test_what_was_stopped_goes_on_bit_for_bit(tmp_path):
    found = run_ranks(functools.partial(every_option, folder=tmp_path), 3, tmp_path)
    assert found == [dict.fromkeys(OPTIONS, True)] * 3
