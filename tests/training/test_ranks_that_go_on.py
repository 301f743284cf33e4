"""What one rank alone is refused before a run begins ends the call on all of them, and then they can go on."""

from __future__ import annotations

import functools
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_parts import PLAIN, network, split, weights
from ranks_of_a_user import run_ranks
from torch import nn

from sparse_training import SparseTrainer
from sparse_training.data.resident import ResidentLoader
from sparse_training.errors import UserError
from sparse_training.rank_failures import SharedError

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="a PyTorch without torch.distributed and gloo"
)

# What one rank gives, to the trainer and to fit, and what it is told.
MISTAKES = {
    "no rate": ({"lr": -1.0}, {}, "`lr` must be above 0, got -1.0"),
    "a loss that reduces": ({"loss": nn.CrossEntropyLoss()}, {}, 'got reduction="mean"'),
    "no device": ({"device": "nowhere"}, {}, "nowhere"),
    "no budget": ({}, {"epochs": None}, "give exactly one of"),
    "no data": ({}, {"train": 3}, "must be an iterable of batches"),
    "a typing error": ({"optimizer": lambda parameters, lr: parameters.missing}, {}, "AttributeError"),
}


def run(given: dict[str, Any], of_fit: dict[str, Any]) -> nn.Module:
    model = network()
    trainer = SparseTrainer(model, **{**PLAIN, "policy": "dense", **given})
    of_fit = {"train": ResidentLoader(split(), batch_size=5), "epochs": 1, "progress": False, **of_fit}
    trainer.fit(**of_fit)
    return model


def mistaken(rank: int, size: int, *, one: int, name: str) -> dict[str, Any]:
    given, of_fit, _ = MISTAKES[name]
    found: dict[str, Any] = {}
    try:
        run(*((given, of_fit) if rank == one else ({}, {})))
    except UserError as error:
        found = {"said": str(error), "heard": isinstance(error, SharedError)}
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    return {**found, "total": total.item(), "weights": weights(run({}, {}))}


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MISTAKES)
def test_ranks_of_which_one_was_refused_go_on(tmp_path, name, size):
    found = run_ranks(functools.partial(mistaken, one=1, name=name), size, tmp_path)
    assert all(isinstance(one, dict) for one in found), found
    for rank, one in enumerate(found):
        assert one["heard"] == (rank != 1)
        assert MISTAKES[name][2] in one["said"]
        assert one["said"].startswith("rank 1 failed: ") == (rank != 1)
        assert "\n" not in one["said"]
        assert one["total"] == sum(range(1, size + 1))
        assert one["weights"] == found[0]["weights"]


def both(rank: int, size: int) -> list[str]:
    """One rank after the other fails alone, and then both do."""
    said = []
    for failing in ([0], [1], [0, 1]):
        with pytest.raises(UserError) as caught:
            run({"lr": -1.0} if rank in failing else {}, {})
        said.append(str(caught.value))
    return said


def test_ranks_may_be_refused_again_and_again(tmp_path):
    own = "`lr` must be above 0, got -1.0"
    heard = [f"rank {rank} failed: {own}; this rank ends too" for rank in (0, 1)]
    assert run_ranks(both, 2, tmp_path) == [[own, heard[1], own], [heard[0], own, own]]


def alone(rank: int, size: int) -> float:
    """One rank makes a trainer, and the other never does."""
    began = time.monotonic()
    if rank == 0:
        with pytest.raises(UserError, match="`lr` must be above 0"):
            run({"lr": -1.0}, {})
    return time.monotonic() - began


@pytest.mark.slow
def test_a_rank_that_is_refused_does_not_wait_for_others_that_never_come(tmp_path):
    assert run_ranks(alone, 2, tmp_path)[0] < 30.0
