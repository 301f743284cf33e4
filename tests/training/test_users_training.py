"""The model, the optimizer and the schedule are the user's: as their own loop would treat them."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from sparse_training import Gate, ResidentLoader, SparseTrainer, TrainerSettings, load_data
from sparse_training.data.splits import Split
from sparse_training.errors import UserError
from sparse_training.selection.policies.base import Policy
from sparse_training.training.optimizer_step import OptimizerStep

PLAIN = {"policy": "dense", "dense_start": 0, "dense_end": 0}


def classifier(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(288, 10)
    )


def digits(batch_size=64):
    data = load_data("digits")
    return ResidentLoader(data.train, batch_size=batch_size, mean=data.mean, std=data.std)


def pairs(rows=40, batch_size=8):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(rows, 6, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs.argmax(1)), batch_size=batch_size)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# --- modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["dense", "gate", "infobatch"])
def test_a_model_in_evaluation_mode_is_trained_and_given_back(policy):
    """As from_pretrained leaves it: dropout draws, BatchNorm's statistics move, and the mode comes back."""
    live, quiet = classifier(), classifier().eval()
    for model in (live, quiet):
        torch.manual_seed(1)
        SparseTrainer(model, policy=policy).fit(digits(), steps=5)
    same(weights(live), weights(quiet))
    assert int(quiet[1].num_batches_tracked) > 2
    assert not any(module.training for module in quiet.modules())
    assert all(module.training for module in live.modules())


def test_modules_frozen_by_hand_stay_frozen():
    model = classifier().train()
    model[1].eval()
    before = model[1].running_mean.clone()
    SparseTrainer(model, policy="dense").fit(digits(), steps=5)
    assert torch.equal(model[1].running_mean, before)
    assert [module.training for module in model] == [True, False, True, True, True, True]


def test_a_users_evaluation_that_leaves_evaluation_mode_behind():
    model = classifier()

    def evaluate(model):
        model.eval()
        return {"accuracy": 0.5}

    SparseTrainer(model, policy="dense").fit(digits(), steps=6, evaluate=evaluate, evaluations=3)
    assert int(model[1].num_batches_tracked) == 6


def test_modes_come_back_after_an_error():
    model = classifier().eval()
    with pytest.raises(UserError):
        SparseTrainer(model, policy="dense", loss=lambda z, y: F.cross_entropy(z, y)).fit(digits(), steps=1)
    assert not any(module.training for module in model.modules())


# --- schedulers ---------------------------------------------------------------------------------

SCHEDULERS = {
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=12),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=12),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4)),
    "cyclic": lambda optimizer: lr_scheduler.CyclicLR(optimizer, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, total_iters=4), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        milestones=[4],
    ),
}


def with_scheduler(name, **options):
    torch.manual_seed(0)
    model = nn.Linear(6, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = SCHEDULERS[name](optimizer)
    return SparseTrainer(model, optimizer=optimizer, schedule=schedule, **PLAIN, **options)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_is_stepped_once_an_optimizer_step(name, accumulate):
    trainer = with_scheduler(name, settings=TrainerSettings(accumulate=accumulate))
    rates = []
    trainer.fit(pairs(), steps=12, progress=lambda status: rates.append(trainer.optimizer.param_groups[0]["lr"]))
    plain = torch.optim.SGD(nn.Linear(6, 6).parameters(), lr=0.1, momentum=0.9)
    schedule, wanted = SCHEDULERS[name](plain), []
    for step in range(12):
        if (step + 1) % accumulate == 0:
            plain.step()
            schedule.step()
        wanted.append(plain.param_groups[0]["lr"])
    assert rates == wanted
    assert len(set(rates)) > 2


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_is_resumed_bit_for_bit(name, tmp_path):
    whole = with_scheduler(name)
    whole.fit(pairs(), steps=11)
    stops = iter([False] * 4 + [True])
    with_scheduler(name).fit(pairs(), steps=11, checkpoint=tmp_path, stop=lambda: next(stops))
    resumed = with_scheduler(name)
    resumed.fit(pairs(), steps=11, checkpoint=tmp_path, resume=True)
    same(weights(resumed.model), weights(whole.model))
    assert resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]


def test_a_scheduler_is_untouched_by_calibration():
    trainer = with_scheduler("one cycle")
    log = trainer.fit(pairs(), seconds=0.001)
    assert trainer.schedule.scheduler.last_epoch == log.steps


def test_schedulers_that_cannot_be_followed_are_refused():
    model = nn.Linear(6, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match="got a ReduceLROnPlateau"):
        SparseTrainer(model, optimizer=optimizer, schedule=lr_scheduler.ReduceLROnPlateau(optimizer))
    with pytest.raises(UserError, match="got the class CosineAnnealingLR"):
        SparseTrainer(model, optimizer=optimizer, schedule=lr_scheduler.CosineAnnealingLR)
    schedule = lr_scheduler.StepLR(optimizer, 3)
    with pytest.raises(UserError, match="a scheduler of the trainer's own optimizer"):
        SparseTrainer(model, schedule=schedule)
    with pytest.raises(UserError, match="the optimizer has a learning-rate scheduler; give it as `schedule`"):
        SparseTrainer(model, optimizer=optimizer)
    with pytest.raises(UserError, match="`schedule`, a OneCycleLR, cannot take this step"):
        with_scheduler("one cycle").fit(pairs(), steps=14)


# --- a rate that changes nothing ----------------------------------------------------------------


@pytest.mark.parametrize("policy", [None, "adaptive+denoise", "infobatch", "dense", "infobatch@self"])
def test_a_rate_that_the_policy_does_not_use_is_refused(policy):
    words = re.escape(f"got 0.1 with {policy or 'infobatch'}; give none")
    with pytest.raises(UserError, match=rf"`rate` is used by the policies random, gate, .*, {words}"):
        SparseTrainer(classifier(), policy=policy, rate=0.1)
    assert SparseTrainer(classifier(), policy=policy).fit(digits(), steps=2).steps == 2


@pytest.mark.parametrize("policy", [Gate(0.3), Policy(rate=0.3)])
def test_a_rate_beside_a_policy_with_its_own_is_refused(policy):
    with pytest.raises(UserError, match=r"`rate` must be that of the policy, 0.3, .* got 0.5"):
        SparseTrainer(classifier(), policy=policy, rate=0.5)
    SparseTrainer(classifier(), policy=policy, rate=0.3)


@pytest.mark.parametrize("policy", ["random", "gate", "topk", "importance", "masked"])
def test_the_default_rate_is_a_tenth(policy):
    assert SparseTrainer(classifier(), policy=policy).policy.rate == 0.1


# --- several runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["adaptive+denoise+deduplicate+balance", "importance", "infobatch", "gate@history"])
def test_a_second_run_is_that_of_a_new_trainer(policy):
    """On other data of as many rows, with other labels: nothing of the first data is left in the policy."""
    data = load_data("digits").train

    def other():
        return ResidentLoader(Split(data.images, 9 - data.labels), batch_size=64, std=(0.3,))

    options = {"policy": policy, "optimizer": torch.optim.SGD, "lr": 0.01}
    trainer = SparseTrainer(classifier(), **options)
    trainer.fit(digits(), steps=60)
    fresh = SparseTrainer(copy.deepcopy(trainer.model), **options)
    if policy == "gate@history":
        fresh.policy.gate.load_state_dict(trainer.policy.gate.state_dict())  # the threshold is the model's
    found = []
    for one in (trainer, fresh):
        torch.manual_seed(5)
        one.fit(other(), steps=60)
        found.append(weights(one.model))
    same(*found)


def test_a_second_run_on_more_rows():
    trainer = SparseTrainer(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), policy="importance")
    data = load_data("digits").train
    trainer.fit(ResidentLoader(Split(data.images[:500], data.labels[:500]), batch_size=64), steps=10)
    assert trainer.fit(digits(), steps=10).steps == 10


def test_a_stopped_accumulation_is_not_carried_into_another_run():
    def weights_after(first_run):
        torch.manual_seed(0)
        options = {"optimizer": torch.optim.SGD, "lr": 0.1, "schedule": "constant", **PLAIN}
        trainer = SparseTrainer(nn.Linear(6, 6), settings=TrainerSettings(accumulate=4), **options)
        if first_run:
            trainer.fit(pairs(), steps=8, stop=lambda: True)
        trainer.fit(pairs(), steps=4)
        return weights(trainer.model)

    same(weights_after(True), weights_after(False))


# --- losses that are not finite -----------------------------------------------------------------


def poisoned(numbers, value=math.nan):
    """Batches of 8, of which those of the given numbers hold a value that is not finite."""
    batches = [list(batch) for batch in pairs()]
    for number in numbers:
        batches[number][0] = batches[number][0].clone()
        batches[number][0][0, 0] = value
    return [tuple(batch) for batch in batches]


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"clip_norm": 1.0}, {"ema": 0.9}, {"amp": "float16"}])
def test_a_batch_whose_loss_is_not_finite_is_skipped_counted_and_said(settings, value):
    """It leaves no trace: neither in the weights nor in BatchNorm's statistics."""
    options = {"optimizer": torch.optim.SGD, "lr": 0.1, "schedule": lambda progress: 1.0, **PLAIN}
    options["settings"] = TrainerSettings(**settings)
    bad, good = normed(), normed()
    log = SparseTrainer(bad, **options).fit(poisoned([1, 3], value), steps=10)
    assert int(log.invalid) == 4
    assert log.to_dict()["invalid_batches"] == 4
    assert any("4 batches of 10 had a loss that is not finite" in text for text in log.warnings)
    assert all(value.isfinite().all() for value in weights(bad).values())
    assert int(bad[1].num_batches_tracked) == 6
    if "accumulate" not in settings:
        SparseTrainer(good, **options).fit([poisoned([])[number] for number in (0, 2, 4)], steps=6)
        same(weights(bad), weights(good))


@pytest.mark.parametrize("settings", [{}, {"clip_norm": 1.0}, {"ema": 0.9}])
def test_a_device_skips_an_invalid_batch_without_telling_the_host(monkeypatch, settings):
    """As on a GPU, where the fused optimizer is told by a tensor: here by the same one on the CPU."""
    monkeypatch.setattr(OptimizerStep, "skips_on_device", lambda self: True)
    options = {"lr": 0.1, "schedule": lambda progress: 1.0, "settings": TrainerSettings(**settings), **PLAIN}
    bad, good = normed(), normed()
    log = SparseTrainer(bad, **options).fit(poisoned([1, 3]), steps=10)
    assert isinstance(log.invalid, torch.Tensor)
    assert int(log.invalid) == 4
    SparseTrainer(good, **options).fit([poisoned([])[number] for number in (0, 2, 4)], steps=6)
    same(weights(bad), weights(good))


@pytest.mark.parametrize("scorer", ["proxy:cnn-tiny", "early:1"])
def test_what_is_trained_beside_the_model_learns_no_invalid_batch_either(scorer):
    data = load_data("digits").train
    images = data.images[:128].float() / 255
    images[70, 0, 0, 0] = math.nan
    batches = DataLoader(TensorDataset(images, data.labels[:128]), batch_size=32)
    trainer = SparseTrainer(classifier(), policy="gate", scorer=scorer, rate=0.5, dense_start=0.5)
    log = trainer.fit(batches, steps=8)
    assert int(log.invalid) > 0
    assert all(value.isfinite().all() for value in weights(trainer.model).values())
    assert all(value.isfinite().all() for value in trainer.policy.scorer.parameters())


def test_finite_runs_say_nothing_of_it():
    log = SparseTrainer(normed(), policy="dense").fit(pairs(), steps=4)
    assert int(log.invalid) == 0
    assert not log.warnings


def test_invalid_batches_are_counted_over_an_interruption(tmp_path):
    def fit(**options):
        return SparseTrainer(normed(), policy="dense").fit(poisoned([1, 3]), steps=10, checkpoint=tmp_path, **options)

    stops = iter([False] * 5 + [True])
    assert int(fit(stop=lambda: next(stops)).invalid) == 2
    assert int(fit(resume=True).invalid) == 4
