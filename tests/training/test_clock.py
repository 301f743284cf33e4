"""The clock charges what was measured, and measuring changes nothing."""

import copy
import json
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from trainers import make_trainer

from sparse_training import SparseTrainer
from sparse_training.data.resident import ResidentLoader
from sparse_training.errors import UserError
from sparse_training.profiling.calibration import calibrate
from sparse_training.selection.policies.base import Policy
from sparse_training.selection.policies.importance import ImportancePolicy
from sparse_training.selection.policies.infobatch import InfoBatchPolicy
from sparse_training.selection.policies.random import RandomPolicy
from sparse_training.training.clock import Clock, Costs

COSTS = Costs(
    shared={"load": ((10, 100), (1.0, 2.0)), "train": ((1, 50, 100), (5.0, 30.0, 60.0))},
    own={
        "dense": {"score": ((100,), (0.0,)), "select": ((100,), (0.0,))},
        "gate": {"score": ((100,), (20.0,)), "select": ((100,), (0.5,))},
    },
    rounds=7,
)


def test_a_step_costs_the_sum_of_its_stages_linear_between_what_was_measured():
    assert COSTS.step("dense", 100, 100)["total"] == 62.0
    assert COSTS.step("gate", 100, 75) == {"load": 2.0, "score": 20.0, "select": 0.5, "train": 45.0, "total": 67.5}
    assert COSTS.step("dense", 55, 50)["load"] == 1.5


def test_a_step_without_rows_does_not_train():
    assert COSTS.step("gate", 100, 0)["train"] == 0.0


def test_an_arm_that_was_not_calibrated_is_refused():
    with pytest.raises(UserError, match="no costs for the policy 'random': it was calibrated for dense, gate"):
        COSTS.step("random", 10, 10)


def test_choosing_goes_by_the_rows_offered_and_keeping_losses_is_charged_in_every_phase():
    own = {
        "dense": {"score": ((1,), (0.0,)), "select": ((1,), (0.0,)), "observe": ((1,), (0.0,))},
        "past": {"score": ((1,), (0.0,)), "select": ((100,), (4.0,)), "observe": ((10, 100), (1.0, 10.0))},
    }
    costs = Costs(COSTS.shared, own, 1)
    assert costs.step("past", 10, 10, 100)["select"] == 5.0
    assert costs.step("past", 0, 0, 100) == {"load": 0.0, "score": 0.0, "select": 4.0, "train": 0.0, "total": 4.0}
    assert costs.step("dense", 100, 100, 100)["select"] == 0.0
    assert costs.step("dense", 100, 100, 100, observer="past")["total"] == 72.0
    clock = Clock(costs)
    clock.charge("dense", 100, 100, 100, observer="past")
    assert clock.seconds == 72.0
    with pytest.raises(UserError, match="no costs for the policy 'gate'"):
        costs.step("dense", 1, 1, observer="gate")


def test_costs_survive_json_bit_for_bit():
    odd = Costs(
        {"load": ((1,), (0.1 + 0.2,)), "train": ((3,), (1 / 3,))},
        {"a": {"score": ((1,), (1e-9,)), "select": ((1,), (2e-9,))}},
        3,
    )
    assert Costs.from_dict(json.loads(json.dumps(odd.to_dict()))) == odd


def test_the_clock_advances_by_costs_and_goes_on_from_its_state():
    clock = Clock(COSTS)
    clock.charge("gate", 100, 75)
    clock.charge("dense", 100, 100)
    assert clock.seconds == 129.5
    other = Clock()
    other.load_state_dict(clock.state_dict())
    for either in (clock, other):
        either.charge("gate", 100, 10)
    assert other.seconds == clock.seconds


def test_raw_seconds_are_those_between_start_and_stop():
    clock = Clock()
    clock.start()
    time.sleep(0.02)
    clock.stop(torch.device("cpu"))
    time.sleep(0.05)
    assert 0.02 <= clock.raw_seconds == clock.seconds < 0.05


def trainer_and_loader(rows=40, batch_size=16, **options):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (rows, 1, 4, 4), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 3, (rows,), generator=generator)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    loader = ResidentLoader(SimpleNamespace(images=images, labels=labels), batch_size=batch_size)
    return make_trainer(model, **options), loader


def test_calibration_leaves_everything_as_it_was():
    trainer, loader = trainer_and_loader(policy="gate")
    trainer.fit(loader, steps=7)
    policies = {"random": RandomPolicy(0.1), "gate": trainer.policy}

    def state():
        parts = (trainer.model, trainer.optimizer, trainer.policy, policies["random"], loader)
        return copy.deepcopy([part.state_dict() for part in parts]), torch.get_rng_state()

    before = state()
    calibrate(trainer, loader, policies, rounds=2)
    torch.testing.assert_close(state(), before, rtol=0, atol=0)


class Slow(Policy):
    def score(self, batch):
        time.sleep(0.01)

    def select(self, scores, batch):
        time.sleep(0.02)
        return super().select(scores, batch)


def test_each_stage_is_timed_apart_for_full_and_short_batches():
    trainer, loader = trainer_and_loader()
    costs = calibrate(trainer, loader, {"slow": Slow(), "random": RandomPolicy(0.25)}, rounds=5)
    assert costs.rounds == 5
    assert set(costs.own) == {"dense", "slow", "random"}
    for rows in (16, 8):
        step = costs.step("slow", rows, rows)
        # It sleeps 10 and 20 ms. No upper bounds: a busy machine oversleeps.
        assert 0.01 <= step["score"] < step["select"]
        assert step["select"] >= 0.02
        assert costs.step("dense", rows, rows)["total"] < step["total"]
    assert costs.shared["load"][0] == (2, 4, 8, 16)
    assert costs.shared["train"][0] == (2, 4, 8, 16)


def test_choosing_and_keeping_losses_are_timed_as_an_arms_own_in_the_midst_of_a_run():
    chosen = []

    class Past(ImportancePolicy):
        name = "past"

        def choose(self, offer):
            time.sleep(0.02)
            chosen.append(super().choose(offer))
            return chosen[-1]

        def observe(self, ids, losses, logits):
            super().observe(ids, losses, logits)
            time.sleep(0.01 if len(ids) < self.table.rows else 0.0)

    trainer, loader = trainer_and_loader()
    costs = calibrate(trainer, loader, {"past": Past(0.5), "infobatch": InfoBatchPolicy()}, rounds=5)
    step, random = costs.step("past", 8, 8, 16), costs.step("dense", 8, 8)
    assert step["select"] >= 0.03
    assert step["load"] == random["load"] < 0.02  # shared: what choosing costs is not in it
    assert any((choice.weight != 1.0).any() for choice in chosen)  # drawn by losses, not in the first pass
    assert costs.step("infobatch", 0, 0, 16)["total"] == costs.step("infobatch", 0, 0, 16)["select"] > 0.0
    assert costs.step("infobatch", 16, 16)["train"] == costs.step("dense", 16, 16)["train"]


def test_a_budget_in_seconds_ends_by_the_clock():
    trainer, loader = trainer_and_loader(policy="random", rate=0.25)
    own = {
        name: {"score": ((1,), (cost,)), "select": ((1,), (0.0,))} for name, cost in (("dense", 0.0), ("random", 5.0))
    }
    costs = Costs({"load": ((1,), (0.0,)), "train": ((1, 101), (1.0, 101.0))}, own, 1)
    began = time.perf_counter()
    history = trainer.fit(loader, seconds=400.0, clock=Clock(costs))
    assert time.perf_counter() - began < 20
    assert 400.0 <= history.seconds < 416.0
    assert history.seconds == int(history.rows_trained) + 5 * history.phases["sparse"]
    assert history.phases["sparse"] > 10
    assert history.raw_seconds < 20


def test_seconds_of_a_numbered_data_loader_are_raw_and_said_to_be(caplog):
    rows = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(2, (64,)))
    loader = torch.utils.data.DataLoader(rows, batch_size=16, shuffle=True)
    log = SparseTrainer(torch.nn.Linear(4, 2)).fit(loader, seconds=0.05, progress=False)
    assert log.seconds == log.raw_seconds
    sentence = "seconds of this run are raw seconds: rows that a DataLoader's workers read cannot be calibrated"
    assert caplog.messages.count(sentence) == 1
