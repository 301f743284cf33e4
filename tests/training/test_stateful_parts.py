"""Losses with statistics of their own, and parts whose state no checkpoint could hold."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_training import Callback, Criterion, SparseTrainer, UserError


def loader(width=6):
    generator = torch.Generator().manual_seed(1)
    inputs, classes = torch.randn(64, width, generator=generator), torch.randint(0, 4, (64,), generator=generator)
    return DataLoader(TensorDataset(inputs, classes), 16)


def network():
    torch.manual_seed(0)
    return nn.Linear(6, 4)


class Centred(nn.Module):
    """A loss relative to its running mean, which moves in training mode, as BatchNorm's statistics do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, logits, classes):
        losses = F.cross_entropy(logits, classes, reduction="none")
        if self.training:
            self.mean.lerp_(losses.detach().mean(), 0.1)
            self.calls += 1
        return losses * (1 + self.mean)


def fit(model, *, steps=8, data=None, fit=(), **options):
    options = {"policy": "dense", "lr": 0.1, "schedule": "constant", "lr_warmup": 0, **options}
    trainer = SparseTrainer(model, **options)
    return trainer.fit(loader() if data is None else data, steps=steps, progress=False, **dict(fit))


@pytest.mark.parametrize("policy", ["dense", "gate", "topk", "infobatch"])
def test_a_losss_statistics_are_of_the_batches_trained_on(policy):
    """Neither a trial, a scoring pass nor an evaluation moves them."""
    loss = Centred()
    fit(network(), policy=policy, loss=loss, fit={"evaluate": loader(), "evaluations": 4})
    assert 6 <= int(loss.calls) <= 8  # of some batches a gate keeps no row
    assert loss.training


def test_a_losss_statistics_are_those_of_a_plain_loop():
    loss, its = Centred(), Centred()
    model, twin = network(), network()
    fit(model, loss=loss, optimizer=torch.optim.SGD, fit={"evaluate": loader()})
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(2):
        for inputs, classes in loader():
            optimizer.zero_grad()
            its(twin(inputs), classes).mean().backward()
            optimizer.step()
    assert torch.equal(model.weight, twin.weight)
    assert torch.equal(loss.mean, its.mean)


def test_a_losss_statistics_are_resumed(tmp_path):
    steps = iter([False, False, True])
    fit(network(), loss=Centred(), fit={"checkpoint": tmp_path, "stop": lambda: next(steps)})
    loss, its = Centred(), Centred()
    model, twin = network(), network()
    fit(model, loss=loss, fit={"checkpoint": tmp_path, "resume": True})
    fit(twin, loss=its)
    assert torch.equal(loss.mean, its.mean)
    assert torch.equal(model.weight, twin.weight)


class Normalised(nn.Module):
    """A loss of normalised outputs: BatchNorm moves its statistics in training mode, and dropout draws."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(4, affine=False), nn.Dropout(0.5)

    def forward(self, outputs, classes):
        return F.cross_entropy(self.drop(self.norm(outputs)), classes, reduction="none")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("whose", ["the user's", "the trainer's"])
def test_outside_a_run_a_criterion_calls_its_loss_as_the_user_left_it(whose, training):
    """By the modules' own documentation: in training mode each call is counted, in evaluation mode none is."""
    model, loss = network(), Normalised().train(training)
    own = Criterion(loss, targets="classes")
    trainer = SparseTrainer(model, loss=own, policy="gate")
    criterion = own if whose == "the user's" else trainer.criterion
    rows = torch.ones(8, 6), torch.zeros(8, dtype=torch.int64)
    for run in (None, lambda: trainer.fit(loader(), steps=4, progress=False), lambda: trainer.evaluate(loader())):
        if run is not None:
            run()
        before = int(loss.norm.num_batches_tracked)
        criterion(model(rows[0]), rows[1])
        assert loss.norm.num_batches_tracked == before + training
        assert all(module.training is training for module in loss.modules())


def test_a_callback_that_measures_a_loss_does_not_move_its_statistics():
    class Measure(Callback):
        def on_step_end(self, run):
            run.trainer.criterion(torch.ones(8, 4), torch.zeros(8, dtype=torch.int64))

    loss = Normalised()
    SparseTrainer(network(), loss=Criterion(loss, targets="classes"), policy="dense").fit(
        loader(), steps=4, callbacks=[Measure()], progress=False
    )
    assert loss.norm.num_batches_tracked == 4


class Thing:
    pass


class Odd(torch.optim.SGD):
    """Keeps an object in its state, as some 8-bit optimizers do."""

    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["scale"] = Thing()


class OddModel(nn.Linear):
    def get_extra_state(self):
        return {"thing": Thing()}

    def set_extra_state(self, state):
        pass


class OddCallback(Callback):
    def state_dict(self):
        return {"thing": Thing()}


class Scheduled(torch.optim.lr_scheduler.LambdaLR):
    def state_dict(self):
        raise AttributeError("a function without attributes")


def odd_scheduler():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"model": model, "optimizer": optimizer, "schedule": Scheduled(optimizer, lambda step: 1.0)}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: {"model": network(), "optimizer": Odd}, "the state of the optimizer has .* Thing, and could not be"),
        (lambda: {"model": OddModel(6, 4)}, "the state of the model has .* Thing"),
        (
            lambda: {"model": network(), "fit": {"callbacks": [OddCallback()]}},
            "the state of the callbacks has .* Thing",
        ),
        (odd_scheduler, "a function without attributes"),
    ],
)
def test_a_state_that_could_not_be_read_again_is_refused_at_once(tmp_path, make, said):
    """Not by the run that is to go on from it, when the training is lost."""
    options = make()
    seen = []
    given = {"checkpoint": tmp_path / "run", "stop": lambda: seen.append(1), **options.pop("fit", {})}
    plain = {} if "schedule" not in options else {"schedule": options["schedule"], "lr": None, "lr_warmup": 0.02}
    with pytest.raises(UserError, match=f"`checkpoint` cannot be written: .*{said}") as caught:
        fit(fit={**given}, **{**options, **plain})
    assert "\n" not in str(caught.value)
    assert not seen
    assert os.listdir(tmp_path) == []


def test_what_could_not_be_read_again_is_refused_before_the_model_has_changed(tmp_path):
    torch.manual_seed(0)
    model = OddModel(6, 4)
    before = model.weight.detach().clone()
    with pytest.raises(UserError, match="the state of the model has"):
        fit(model, fit={"checkpoint": tmp_path / "run"})
    assert torch.equal(model.weight, before)


def test_a_run_refused_in_its_first_step_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="cannot take inputs"):
        fit(network(), data=loader(5), fit={"checkpoint": tmp_path / "runs" / "one"})
    assert os.listdir(tmp_path) == []
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="cannot take inputs"):
        fit(network(), data=loader(5), fit={"checkpoint": tmp_path / "runs" / "one"})
    assert os.listdir(tmp_path) == ["runs"]  # the user's own


def test_resuming_needs_a_folder():
    with pytest.raises(UserError, match="`resume` needs `checkpoint`"):
        fit(network(), fit={"resume": True})
