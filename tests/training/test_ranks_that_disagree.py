"""Ranks that were given different things are told so at the start, all of them, in one line."""

from __future__ import annotations

import functools
import shutil
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks_of_a_user import run_ranks
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from sparse_training import SparseTrainer, TrainerSettings

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="a PyTorch without torch.distributed and gloo"
)

X, Y = torch.randn(96, 8), torch.arange(96) % 3
HUBER = nn.HuberLoss(reduction="none")


def train(rank, size, *, rows=None, batch_size=8, sampler=True, model=None, run=None, **options):
    data = TensorDataset(X[:rows], Y[:rows])
    part = DistributedSampler(data) if sampler else None
    trainer = SparseTrainer(model or nn.Linear(8, 3), **options)
    return trainer.fit(DataLoader(data, batch_size=batch_size, sampler=part), **{"epochs": 1, **(run or {})})


def only(rank, of, one, other):
    return one if rank == of else other


# Name, what one rank (the last) is given, what the others are, and what the line says of both.
CASES: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("policy", {"policy": "random"}, {"policy": "dense"}, "policy is 'dense' on {others} and 'random' on {last}"),
    ("rate", {"policy": "gate", "rate": 0.2}, {"policy": "gate", "rate": 0.3},
     "rate is 0.3 on {others} and 0.2 on {last}"),
    ("seed", {"seed": 1}, {}, "seed is 0 on {others} and 1 on {last}"),
    ("lr", {"lr": 0.1}, {}, "lr is [0.001] on {others} and [0.1] on {last}"),
    ("loss", {"loss": nn.MultiMarginLoss(reduction="none")}, {}, "loss is \"CrossEntropyLoss"),
    ("smoothing", {"loss": nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)}, {}, "'label_smoothing': 0.1"),
    ("optimizer", {"optimizer": torch.optim.SGD}, {}, "optimizer is 'AdamW' on {others} and 'SGD' on {last}"),
    (
        "momentum", {"optimizer": functools.partial(torch.optim.SGD, momentum=0.9)}, {"optimizer": torch.optim.SGD},
        "'momentum': 0.9",
    ),
    ("schedule", {"schedule": "constant"}, {}, "schedule is 'cosine' on {others} and 'constant' on {last}"),
    ("accumulate", {"settings": TrainerSettings(accumulate=2)}, {}, "accumulate is 1 on {others} and 2 on {last}"),
    ("amp", {"settings": TrainerSettings(amp="bfloat16")}, {}, "amp is 'None' on {others} and 'torch.bfloat16'"),
    ("batch_size", {"batch_size": 4}, {}, "batch_size is 8 on {others} and 4 on {last}"),
    ("batches", {"rows": 40, "sampler": False}, {"sampler": False}, "batches is 12 on {others} and 5 on {last}"),
    ("budget", {"run": {"epochs": 2}}, {}, "budget is"),
    ("stop", {"run": {"stop": bool}}, {}, "stop is False on {others} and True on {last}"),
    (
        "resume", {"run": {"resume": True, "checkpoint": "run"}}, {"run": {"checkpoint": "run"}},
        "resume is False on {others} and True on {last}",
    ),
    ("model", {"model": nn.Linear(8, 4)}, {"model": nn.Linear(8, 3)}, "weight is '[3, 8] torch.float32' on {others}"),
    ("layers", {"model": nn.Sequential(nn.Linear(8, 3))}, {}, "0.weight is absent on {others}"),
]  # fmt: skip


def every_case(rank: int, size: int) -> list[str]:
    said = []
    for _, one, other, _ in CASES:
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            train(rank, size, **only(rank, size - 1, one, other))
        said.append(str(caught.value))
    train(rank, size)  # and after that they train together
    return said


@pytest.fixture(scope="module", params=[2, 3])
def said(request, tmp_path_factory):
    return run_ranks(every_case, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", range(len(CASES)), ids=[name for name, *_ in CASES])
def test_all_are_told_who_has_what(said, case):
    ranks = {"others": "rank 0" if len(said) == 2 else "ranks 0, 1", "last": f"rank {len(said) - 1}"}
    lines = {of_rank[case] for of_rank in said}
    assert len(lines) == 1
    line = lines.pop()
    assert line.startswith("all ranks must be given the same, but ")
    assert CASES[case][3].format(**ranks) in line
    assert "\n" not in line


# --- checkpoints ----------------------------------------------------------------------------------


def write(rank, size, folder):
    train(rank, size, run={"epochs": 1, "checkpoint": folder})


def go_on(rank, size, folders):
    train(rank, size, run={"epochs": 1, "checkpoint": folders[rank], "resume": True})


@pytest.fixture
def checkpoint(tmp_path):
    run_ranks(functools.partial(write, folder=tmp_path / "run"), 2, tmp_path)
    return tmp_path / "run"


def test_a_rank_that_cannot_see_the_checkpoint(tmp_path, checkpoint):
    found = run_ranks(functools.partial(go_on, folders=[checkpoint, tmp_path / "empty"]), 2, tmp_path)
    for error, path in zip(found, (checkpoint, tmp_path / "empty"), strict=True):
        assert str(error) == f"rank 0 sees {path}/checkpoint.pt and rank 1 does not; give all of them one folder"


def test_ranks_that_see_different_checkpoints(tmp_path, checkpoint):
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    run_ranks(functools.partial(write, folder=tmp_path / "second"), 2, tmp_path)
    shutil.copy(tmp_path / "second" / "checkpoint.pt", other)
    found = run_ranks(functools.partial(go_on, folders=[checkpoint, other]), 2, tmp_path)
    assert len({str(error) for error in found}) == 1
    assert "the digest of the checkpoint is '" in str(found[0])


def test_a_checkpoint_that_one_rank_alone_finds_damaged(tmp_path, checkpoint):
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    with open(other / "checkpoint.pt", "ab") as file:
        file.write(b"?")
    found = run_ranks(functools.partial(go_on, folders=[checkpoint, other]), 2, tmp_path)
    assert "damaged or not a checkpoint" in str(found[1])
    assert str(found[0]) == f"rank 1 failed: {found[1]}; this rank ends too"
