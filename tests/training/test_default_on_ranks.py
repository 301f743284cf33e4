"""The default policy on several processes, each with a DistributedSampler's part of a DataLoader's rows."""

import collections

import pytest
import torch
import torch.distributed as dist
from ranks_of_a_user import run_ranks
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, WeightedRandomSampler

from sparse_training import SparseTrainer

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="a PyTorch without torch.distributed and gloo"
)

ROWS, PASSES, BATCH, LR = 192, 24, 8, 1e-4


class Rows(Dataset):
    """The first half has the slope 1 and a small loss, the second the slope 5 and a large one; reads are counted."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return ROWS

    def __getitem__(self, number):
        self.read.append(number)
        return torch.tensor([5.0 if number >= ROWS // 2 else 1.0]), torch.tensor(float(number))


def outputs_plus_targets(outputs, targets):
    """A loss for each row, whose gradient in the weight is the row's slope."""
    return outputs.squeeze(1) + targets


def train(rank, size):
    data, model = Rows(), nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    trainer = SparseTrainer(
        model, loss=outputs_plus_targets, optimizer=torch.optim.SGD, lr=LR, schedule="constant", lr_warmup=0.0,
        dense_start=0.0, dense_end=0.0,
    )  # fmt: skip
    loader = DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data, seed=1))
    log = trainer.fit(loader, epochs=PASSES, progress=False)
    assert trainer.policy.name == "infobatch"
    counts = {"seen": int(log.rows_seen), "trained": int(log.rows_trained), "selected": log.selected.tolist()}
    return {**counts, "weight": model.weight.item(), "read": data.read, "warnings": log.warnings}


def test_rows_come_once_a_pass_and_the_gradient_is_that_of_all(tmp_path):
    found = run_ranks(train, 2, tmp_path)
    read = collections.Counter(row for one in found for row in one["read"])
    assert found[0]["seen"] == PASSES * ROWS
    assert found[0]["trained"] == sum(read.values())  # what is left out is not read
    assert sum(read.values()) < 0.85 * PASSES * ROWS
    assert found[0]["selected"] == [read[row] for row in range(ROWS)]  # over all processes, which number rows alike
    # A large loss is never left out, so each such row is read once a pass by one of the processes.
    hard = [read[row] for row in range(3 * ROWS // 4, ROWS)]
    assert max(read.values()) <= PASSES
    assert sum(hard) >= PASSES * len(hard) - 2 * BATCH * 2  # less what waits at the end for a whole batch
    # The weight has gone as far as all rows would have moved it; unweighted it would be 8% less.
    whole = -LR * PASSES * (ROWS / (2 * BATCH)) * 3.0
    assert [one["weight"] for one in found] == [pytest.approx(whole, rel=0.02)] * 2


def test_a_warning_of_rows_says_whose_they_are(tmp_path):
    """Rows that another process trained on are no rows that were never trained on."""
    for one in run_ranks(short, 2, tmp_path):
        assert one == [
            "96 of 192 rows were never trained on by this process: the run was too short for past losses to matter"
        ]


def short(rank, size):
    data = Rows()
    trainer = SparseTrainer(nn.Linear(1, 1), loss=outputs_plus_targets, dense_start=0.0, dense_end=0.0)
    loader = DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data))
    return trainer.fit(loader, epochs=1, progress=False).warnings


def test_ranks_that_wait_for_rows_run_nothing(tmp_path):
    """A pass that leaves rows out has fewer steps with rows than batches; the others cost no forward pass."""
    for one in run_ranks(counted, 2, tmp_path):
        assert one["steps"] == PASSES * ROWS // (2 * BATCH)
        assert one["busy"] < 0.9 * one["steps"]
        assert one["forward passes"] == one["busy"]


def counted(rank, size):
    data, model, passes = Rows(), nn.Linear(1, 1, bias=False), []
    trainer = SparseTrainer(model, loss=outputs_plus_targets, lr=LR, dense_start=0.0, dense_end=0.0)
    loader = DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data, seed=1))
    step, busy = trainer.step, []

    def watched(*arguments):
        batch, kept = step(*arguments)
        busy.append(kept.rows > 0)
        if len(busy) == 1:  # behind the passes that try the model
            model.register_forward_hook(lambda *_: passes.append(1))
        return batch, kept

    trainer.step = watched
    log = trainer.fit(loader, epochs=PASSES, progress=False)
    return {"steps": log.steps, "busy": sum(busy[1:]), "forward passes": len(passes)}


def test_rows_that_the_sampler_never_gives_are_not_put_down_to_a_short_run():
    data = Rows()
    given = WeightedRandomSampler(torch.cat([torch.ones(ROWS // 2), torch.zeros(ROWS // 2)]), 4 * ROWS)
    trainer = SparseTrainer(nn.Linear(1, 1), loss=outputs_plus_targets, dense_start=0.0, dense_end=0.0)
    log = trainer.fit(DataLoader(data, batch_size=BATCH, sampler=given), epochs=3, progress=False)
    assert log.warnings == [
        f"{ROWS // 2} of {ROWS} rows were never trained on: the sampler of the data did not give them"
    ]
