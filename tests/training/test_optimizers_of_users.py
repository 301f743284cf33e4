"""Optimizers and learning rates that users bring: followed as in their own loop, or refused in one line."""

import functools
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from sparse_training import Callback, SparseTrainer, TrainerSettings, UserError
from sparse_training.callbacks import BestModel

CONSTANT = {"policy": "dense", "schedule": "constant", "lr_warmup": 0.0}


def rows():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(64, 6, generator=generator), torch.randint(0, 4, (64,), generator=generator)


def loader():
    return DataLoader(TensorDataset(*rows()), 16)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def plain_loop(optimizer, model, steps, after=lambda: None):
    for step in range(steps):
        x, y = (part[16 * (step % 4) :][:16] for part in rows())
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        after()
    return weights(model)


def fit(trainer, steps=8, **options):
    return trainer.fit(loader(), steps=steps, progress=False, **options)


class EachStep(Callback):
    def __init__(self, function):
        self.function = function

    def on_step_end(self, run):
        self.function()


# --- learning rates -----------------------------------------------------------------------------


def test_a_partial_has_its_own_learning_rate():
    make = functools.partial(SGD, lr=0.1, momentum=0.9)
    model, twin = network(), network()
    fit(SparseTrainer(model, optimizer=make, **CONSTANT))
    assert torch.equal(weights(model), plain_loop(make(twin.parameters()), twin, 8))
    with pytest.raises(UserError, match=r"got 0\.5 beside a partial with lr=0\.1"):
        SparseTrainer(network(), optimizer=make, lr=0.5)


def by_parts(parameters, lr):
    first, *others = parameters
    return SGD([{"params": [first], "lr": lr / 10}, {"params": others, "lr": lr}], lr=lr)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda parameters, lr: SGD(parameters, lr=0.5), "0.5"),
        (lambda parameters, lr: by_parts(parameters, 0.5), "0.05 and 0.5"),
        (lambda parameters, lr: SGD(parameters, lr=torch.tensor(0.5)), "0.5"),
    ],
)
def test_a_factory_that_passes_the_learning_rate_over_is_said(make, said):
    expected = f"was given lr=0.01 and made an optimizer with {said}, which the run begins with"
    with pytest.warns(UserWarning, match=re.escape(expected)) as caught:
        trainer = SparseTrainer(network(), optimizer=make, lr=0.01, **CONSTANT)
    assert [str(warning.filename) for warning in caught] == [__file__]
    assert trainer.optimizer.param_groups[-1]["lr"] == 0.5


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (SGD, {"lr": 0.01}),
        (lambda parameters, lr: SGD(parameters, lr=torch.tensor(lr)), {"lr": 0.01}),
        (by_parts, {"lr": 0.01}),
        (lambda parameters, lr: SGD(parameters, lr=0.5), {}),  # none was given
        (functools.partial(SGD, lr=0.5), {}),
    ],
)
def test_a_factory_of_its_own_rates_is_served_without_a_word(make, options, recwarn):
    SparseTrainer(network(), optimizer=make, **options, **CONSTANT)
    assert [str(warning.message) for warning in recwarn] == []


def test_a_rate_set_between_two_runs_is_the_next_runs():
    model, twin = network(), network()
    trainer = SparseTrainer(model, optimizer=SGD(model.parameters(), lr=0.1), **CONSTANT)
    fit(trainer, 4)
    trainer.optimizer.param_groups[0]["lr"] = 0.01
    fit(trainer, 4)
    optimizer = SGD(twin.parameters(), lr=0.1)
    plain_loop(optimizer, twin, 4)
    optimizer.param_groups[0]["lr"] = 0.01
    assert torch.equal(weights(model), plain_loop(optimizer, twin, 4))


def test_a_second_run_begins_with_the_first_rate_again():
    model = network()
    trainer = SparseTrainer(model, policy="dense", optimizer=SGD(model.parameters(), lr=0.1))
    fit(trainer)
    assert trainer.optimizer.param_groups[0]["lr"] < 0.01
    fit(trainer, 2)
    assert trainer.optimizer.param_groups[0]["initial_lr"] == 0.1


def test_a_callback_may_set_a_constant_rate():
    """A scheduler stepped there, as one that follows a metric, among it."""
    model, twin = network(), network()
    optimizer, other = SGD(model.parameters(), lr=0.1), SGD(twin.parameters(), lr=0.1)
    trainer = SparseTrainer(model, optimizer=optimizer, **CONSTANT)
    scheduler, its = (lr_scheduler.StepLR(of, 2, gamma=0.5) for of in (optimizer, other))
    fit(trainer, callbacks=[EachStep(scheduler.step)])
    assert torch.equal(weights(model), plain_loop(other, twin, 8, its.step))


@pytest.mark.parametrize("schedule", ["cosine", lambda progress: 1.0 - progress])
def test_a_callback_beside_a_schedule_is_refused(schedule):
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)

    def halve():
        optimizer.param_groups[0]["lr"] *= 0.5

    trainer = SparseTrainer(model, policy="dense", optimizer=optimizer, schedule=schedule)
    with pytest.raises(UserError, match=r"parameter group 0 was set to .* during the run"):
        fit(trainer, callbacks=[EachStep(halve)])


def test_a_rate_that_a_callback_sets_where_a_run_begins_is_its_first_one():
    class First(Callback):
        def on_fit_start(self, run):
            run.trainer.optimizer.param_groups[0]["lr"] = 0.05

    model = network()
    trainer = SparseTrainer(model, policy="dense", optimizer=SGD(model.parameters(), lr=0.1), lr_warmup=0.0)
    for _ in range(2):
        fit(trainer, 4, callbacks=[First()])
        assert trainer.optimizer.param_groups[0]["initial_lr"] == 0.05


def test_what_is_trained_beside_the_model_follows_its_scheduler():
    """In the last of three steps, whose rate is half the first one's."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    schedule = lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    trainer = SparseTrainer(model, policy="topk", scorer="early:1", rate=0.5, optimizer=optimizer, schedule=schedule)
    fit(trainer, 3)
    head = trainer.scorer.require_auxiliary()
    assert [group["lr"] for group in head.optimizer.param_groups] == [head.lr * 0.5]


def test_a_group_may_be_added_during_a_run():
    model = network()
    optimizer = SGD(model[2].parameters(), lr=0.1)
    before = model[0].weight.detach().clone()

    def thaw():
        if len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.01})

    fit(SparseTrainer(model, policy="dense", optimizer=optimizer), callbacks=[EachStep(thaw)])
    assert not torch.equal(model[0].weight, before)


def test_an_optimizer_without_a_learning_rate_is_refused():
    class Relative(SGD):
        def __init__(self, parameters, lr=None):
            super().__init__(parameters, lr=0.1)
            self.param_groups[0]["lr"] = lr

    model = network()
    with pytest.raises(UserError, match=r"must have a learning rate in each parameter group.*got Relative with none"):
        SparseTrainer(model, optimizer=Relative(model.parameters()))


# --- the parameters -----------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["after the optimizer", "after the trainer"])
def test_a_head_that_was_replaced_is_not_left_untrained(when):
    model = network()
    if when == "after the trainer":
        trainer = SparseTrainer(model, policy="dense")
        model[2] = nn.Linear(8, 4)
    else:
        optimizer = SGD(model.parameters(), lr=0.1)
        model[2] = nn.Linear(8, 4)
        trainer = SparseTrainer(model, policy="dense", optimizer=optimizer)
    before = weights(model)
    with pytest.raises(UserError, match=r"one without 2\.weight and 1 more, and with 2 that are not the model's"):
        fit(trainer)
    assert torch.equal(weights(model), before)


def test_parameters_outside_the_optimizer_are_named():
    model = network()
    log = fit(SparseTrainer(model, policy="dense", optimizer=SGD(model[2].parameters(), lr=0.1)))
    note = (
        "the optimizer holds 2 of the model's 4 parameters that require a gradient, and leaves out 0.weight and 1 more"
    )
    assert log.notes == [note]
    model[0].requires_grad_(False)
    assert fit(SparseTrainer(model, policy="dense", optimizer=SGD(model[2].parameters(), lr=0.1))).notes == []


# --- modes --------------------------------------------------------------------------------------


class Averaging(SGD):
    """Trains one set of weights and evaluates their mean over the steps, as schedule-free optimizers do."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr)
        self.param_groups[0] |= {"trains": False, "steps": 0}

    def step(self, closure=None):
        group = self.param_groups[0]
        if not group["trains"]:
            raise Exception("not in training mode")
        super().step(closure)
        group["steps"] += 1
        for parameter in group["params"]:
            state = self.state[parameter]
            mean = state.setdefault("mean", torch.zeros_like(parameter))
            mean.lerp_(parameter.detach(), 1 / group["steps"])

    def _swap(self, trains):
        group = self.param_groups[0]
        if group["trains"] != trains:
            group["trains"] = trains
            for parameter in group["params"]:
                if "mean" in (state := self.state[parameter]):
                    other = state["mean"].clone()
                    state["mean"].copy_(parameter.detach())
                    parameter.data.copy_(other)

    def train(self):
        self._swap(True)

    def eval(self):
        self._swap(False)


def averaging_loop(steps):
    model = network()
    optimizer = Averaging(model.parameters(), lr=0.1)
    optimizer.train()
    plain_loop(optimizer, model, steps)
    optimizer.eval()
    return model


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_optimizer_with_modes_trains_one_model_and_shows_the_other(mode, tmp_path):
    model = network()
    optimizer = Averaging(model.parameters(), lr=0.1)
    getattr(optimizer, mode)()
    trainer = SparseTrainer(model, optimizer=optimizer, **CONSTANT)
    seen = []
    shown = {"evaluate": lambda model: seen.append(weights(model)) or {"loss": 1.0 / len(seen)}, "evaluations": 2}
    fit(trainer, **shown, callbacks=[BestModel(tmp_path / "best.pt", restore=True)])
    for found, steps in ((seen[0], 4), (seen[1], 8), (weights(model), 8)):
        assert torch.equal(found, weights(averaging_loop(steps)))
    best = network()
    best.load_state_dict(torch.load(tmp_path / "best.pt"))
    assert torch.equal(weights(best), weights(model))
    x, y = rows()
    expected = F.cross_entropy(averaging_loop(8)(x), y).item()
    assert trainer.evaluate(loader())["loss"] == pytest.approx(expected, rel=1e-6)


def test_the_best_of_several_averages_is_the_model_afterwards(tmp_path):
    """And no switch of the optimizer's mode puts other weights in its place."""
    model, losses = network(), iter([0.5, 1.0])
    trainer = SparseTrainer(model, optimizer=Averaging(model.parameters(), lr=0.1), **CONSTANT)
    shown = {"evaluate": lambda model: {"loss": next(losses)}, "evaluations": 2}
    fit(trainer, **shown, callbacks=[BestModel(tmp_path / "best.pt", restore=True)])
    assert torch.equal(weights(model), weights(averaging_loop(4)))


def test_a_callback_evaluates_the_average_and_training_goes_on():
    model, seen = network(), []
    trainer = SparseTrainer(model, optimizer=Averaging(model.parameters(), lr=0.1), **CONSTANT)
    fit(trainer, callbacks=[EachStep(lambda: seen.append(trainer.evaluate(loader())["loss"]))])
    x, y = rows()
    expected = [F.cross_entropy(averaging_loop(steps)(x), y).item() for steps in range(1, 9)]
    assert seen == pytest.approx(expected, rel=1e-6)
    assert torch.equal(weights(model), weights(averaging_loop(8)))


def test_an_optimizer_with_modes_is_resumed_bit_for_bit(tmp_path):
    def run(**options):
        model = network()
        fit(SparseTrainer(model, optimizer=Averaging(model.parameters(), lr=0.1), **CONSTANT), **options)
        return weights(model)

    steps = iter([False, False, True])
    run(checkpoint=tmp_path, stop=lambda: next(steps), evaluate=loader(), evaluations=4)
    assert torch.equal(run(checkpoint=tmp_path, resume=True, evaluate=loader(), evaluations=4), run())


# --- Accelerate ---------------------------------------------------------------------------------


def test_another_accumulation_of_accelerates_is_refused():
    import accelerate

    model = network()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    prepared, optimizer, data = accelerator.prepare(model, SGD(model.parameters(), lr=0.1), loader())
    with pytest.raises(UserError, match=r"gradient_accumulation_steps=4.*TrainerSettings\(accumulate=4\), got 1"):
        SparseTrainer(prepared, optimizer=optimizer, **CONSTANT)
    settings = TrainerSettings(accumulate=4)
    SparseTrainer(prepared, optimizer=optimizer, settings=settings, **CONSTANT).fit(data, steps=8, progress=False)
    twin = network()
    fit(SparseTrainer(twin, optimizer=SGD(twin.parameters(), lr=0.1), settings=settings, **CONSTANT))
    assert torch.equal(weights(model), weights(twin))
    accelerator.free_memory()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def test_a_scheduler_in_a_wrapper_is_told_from_none():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 2)
    with pytest.raises(UserError, match=re.escape("got SimpleNamespace; give its .scheduler")):
        SparseTrainer(model, optimizer=optimizer, schedule=SimpleNamespace(scheduler=scheduler))
    optimizer.optimizer = optimizer  # as a wrapper has the one within
    with pytest.raises(UserError, match="the optimizer has a learning-rate scheduler"):
        SparseTrainer(model, optimizer=optimizer)
