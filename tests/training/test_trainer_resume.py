"""A run that stopped goes on bit for bit; arguments out of range are refused."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trainer_parts import network, resident, same, shuffled_stream, weights
from trainers import NAMES, make_trainer

from sparse_training.errors import UserError
from sparse_training.trainer import SparseTrainer
from sparse_training.training.clock import Clock, Costs

# --- going on -----------------------------------------------------------------------------------


def run(folder, policy, stop_at=None, resume=False, checkpoint_interval=None, data=resident, budget=None, clock=None):
    model = network(seed=0 if not resume else 7)
    torch.manual_seed(3 if not resume else 8)
    trainer = make_trainer(model, policy=policy, rate=0.3, dense_start=0.2, dense_end=0.2, lr=1e-2)
    steps = 0

    def stop():
        nonlocal steps
        steps += 1
        return steps == stop_at

    history = trainer.fit(
        data(),
        **(budget or {"steps": 17}),
        evaluate=resident(shuffle=False),
        evaluations=4,
        clock=clock,
        checkpoint=folder,
        checkpoint_interval=checkpoint_interval,
        resume=resume,
        stop=stop,
    )
    return trainer, history


def facts(trainer, history):
    """All that a run left, but for the time it took where that is not the calibrated clock's."""
    found = history.to_dict()
    if found.pop("raw_seconds") == found["seconds"]:
        for timed in (found, *found["evals"]):
            del timed["seconds"]
    return found, weights(trainer.model), trainer.optimizer.state_dict(), trainer.policy.state_dict(), history.selected


@pytest.mark.parametrize(
    ("policy", "data"),
    [
        *[(policy, resident) for policy in NAMES],
        *[(policy, shuffled_stream) for policy in ("dense", "random", "gate")],
    ],
)
@pytest.mark.parametrize("stop_at", [1, 3, 5, 10, 16])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, policy, stop_at, data):
    whole = facts(*run(tmp_path / "whole", policy, data=data))
    _, part = run(tmp_path / "part", policy, stop_at=stop_at, data=data)
    assert part.interrupted
    assert part.steps == stop_at
    resumed = facts(*run(tmp_path / "part", policy, resume=True, data=data))
    assert len(whole[0]["evals"]) == 4
    assert resumed[0] == whole[0]
    same(resumed[1:], whole[1:])


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    whole = facts(*run(tmp_path / "whole", "gate"))

    class Killed(Exception):
        pass

    model = network()
    torch.manual_seed(3)
    trainer = SparseTrainer(model, policy="gate", rate=0.3, dense_start=0.2, dense_end=0.2, lr=1e-2)

    def kill(status):
        if status.step == 11:
            raise Killed

    options = {
        "evaluate": resident(shuffle=False),
        "evaluations": 4,
        "checkpoint": tmp_path / "part",
        "checkpoint_interval": 4,
    }
    with pytest.raises(Killed):
        trainer.fit(resident(), steps=17, progress=kill, **options)
    resumed, history = run(tmp_path / "part", "gate", resume=True)
    same(facts(resumed, history)[1:], whole[1:])


@pytest.mark.parametrize("policy", ["random", "gate", "importance", "infobatch"])
def test_a_calibrated_run_goes_on_with_its_own_costs(tmp_path, policy):
    def clock():
        flat = {"score": ((1,), (0.3,)), "select": ((1,), (0.01,))}
        shared = {"load": ((1, 16), (0.1, 0.7)), "train": ((1, 16), (1 / 3, 2.1))}
        return Clock(Costs(shared, {"dense": flat, policy: flat}, 1))

    options = {"policy": policy, "budget": {"seconds": 40.0}}
    whole = facts(*run(tmp_path / "whole", clock=clock(), **options))
    _, part = run(tmp_path / "part", stop_at=9, clock=clock(), **options)
    assert part.interrupted
    resumed = facts(*run(tmp_path / "part", resume=True, **options))
    assert whole[0]["seconds"] >= 40.0
    assert resumed[0] == whole[0]
    same(resumed[1:], whole[1:])


def test_a_checkpoint_in_the_way_or_of_another_run_is_refused(tmp_path):
    run(tmp_path, "gate", stop_at=3)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        run(tmp_path, "gate")
    with pytest.raises(UserError, match="policy gate is now random"):
        run(tmp_path, "random", resume=True)
    with pytest.raises(UserError, match=r"budget 17 steps is now 16 steps"):
        run(tmp_path, "gate", resume=True, budget={"steps": 16})
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(reduction="sum"),
        F.cross_entropy,
        partial(F.cross_entropy, reduction="mean"),
    ],
)
def test_a_loss_that_reduces_is_refused_when_the_trainer_is_made(loss):
    with pytest.raises(UserError, match=r'got reduction="(mean|sum)"; use reduction="none"'):
        SparseTrainer(network(), loss=loss)


@pytest.mark.parametrize(
    "loss", [partial(F.cross_entropy, reduction="none"), lambda z, y: F.cross_entropy(z, y, reduction="none")]
)
def test_any_callable_loss_will_do(loss):
    assert SparseTrainer(network(), loss=loss).fit(resident(), steps=2).steps == 2


@pytest.mark.parametrize("policy", ["dense", "gate"])
def test_a_loss_of_the_wrong_shape_is_refused_before_anything_changes(policy):
    model = network()
    trainer = SparseTrainer(model, loss=lambda z, y: F.cross_entropy(z, y), policy=policy, dense_start=0)
    before, rng = weights(model), torch.get_rng_state()
    with pytest.raises(UserError, match=r"the loss must return one value per row, \[16\], got \[\]"):
        trainer.fit(resident(), steps=3)
    same(weights(model), before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert not trainer.optimizer.state


def test_inputs_and_targets_that_disagree_are_refused():
    with pytest.raises(UserError, match=r"an input \[3, 3\] float32 and 4 targets"):
        SparseTrainer(nn.Linear(3, 2)).fit([(torch.randn(3, 3), torch.zeros(4, dtype=torch.int64))], steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, r"`rate` must be in \(0, 1\], got 0.0"),
        ({"policy": "best"}, "`policy` must be .*'best'"),
        ({"lr": 0.0}, "`lr` must be above 0, got 0.0"),
        ({"clip_norm": -1.0}, "`clip_norm` must be .*, got -1.0"),
        ({"amp": "int8"}, "`amp` must be .*, got 'int8'"),
        ({"scoring_precision": "int8"}, "`scoring_precision` must be .*, got 'int8'"),
        ({"dense_start": 0.6, "dense_end": 0.6}, "add up to more than 1"),
        ({"dense_start": -0.1}, "`dense_start` must be .*, got -0.1"),
        ({"schedule": "linear"}, "`schedule` must be .*, got 'linear'"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make_trainer(network(), **options)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "exactly one of epochs, steps, rows, seconds, got none"),
        ({"steps": 3, "seconds": 1.0}, "steps and seconds"),
        ({"steps": 0}, "`steps` must be above 0 and finite, got 0"),
        ({"seconds": -1}, "`seconds` must be above 0 and finite, got -1"),
    ],
)
def test_budgets_are_checked(budget, message):
    with pytest.raises(UserError, match=message):
        SparseTrainer(network()).fit(resident(), **budget)
