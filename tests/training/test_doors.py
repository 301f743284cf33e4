"""What a newcomer brings to the trainer: served right, or refused in one line before the model has changed."""

import copy
import functools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sparse_kernels
from sparse_training import Criterion, Gate, SparseTrainer, StreamLoader, TrainerSettings, UserError, advise

CLASSES = 4
PLAIN = {"optimizer": torch.optim.SGD, "lr": 0.1, "schedule": "constant", "lr_warmup": 0.0}
WHOLE = {"dense_start": 0.0, "dense_end": 0.0}


def rows(count=64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 6, generator=generator), torch.randint(0, CLASSES, (count,), generator=generator)


def loader(inputs=None, targets=None, **options):
    x, y = rows()
    return DataLoader(TensorDataset(x if inputs is None else inputs, y if targets is None else targets), 16, **options)


def network(width=6, outputs=CLASSES):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, outputs))


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def train(model, data=None, steps=4, fit=(), **options):
    options = {"policy": "dense", **options}
    return SparseTrainer(model, **options).fit(
        loader() if data is None else data, **{"steps": steps, "progress": False, **dict(fit)}
    )


def refused(words, model, data=None, **options):
    """Refused in one line that has the words, and the model is as it was."""
    before = copy.deepcopy(dict(model.state_dict())) if isinstance(model, nn.Module) else {}
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        train(model, data, **options)
    assert "\n" not in str(caught.value)
    for name, value in before.items():
        assert torch.equal(value, model.state_dict()[name]), name


# --- targets and losses -------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["dense", "infobatch", "gate", "topk", "random"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.bool])
def test_classes_of_any_integer_type_train_as_int64_do(dtype, policy):
    classes = rows()[1] % 2 if dtype == torch.bool else rows()[1]
    model, twin = network(), network()
    for trained, targets in ((model, classes.to(dtype)), (twin, classes)):
        data = loader(targets=targets)
        train(trained, data, policy=policy, **WHOLE, fit={"evaluate": data, "evaluations": 1})
    assert torch.equal(weights(model), weights(twin))


@pytest.mark.parametrize(
    "shapes", ["outputs [N], targets [N, 1]", "outputs [N, 1], targets [N]", "images of a channel"]
)
def test_a_loss_that_compares_all_with_all_is_refused(shapes):
    x, y = rows()
    y = y.float()
    if shapes.startswith("outputs [N],"):
        model, y = nn.Sequential(network(outputs=1), nn.Flatten(0)), y[:, None]
    elif shapes.startswith("outputs [N, 1]"):
        model = network(outputs=1)
    else:  # [N, 1, 1, 6] beside [N, 1, 6]: N becomes a dimension of its own
        model, y = nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (1, 1, 6))), x[:, None]
    with pytest.warns(UserWarning, match="different to the input size"):
        refused("compares each of 16 outputs", model, loader(x, y), loss=nn.MSELoss(reduction="none"))


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (rows()[1][:, None], "targets [16, 1] int64"),
        (rows()[1].float(), "targets [16] float32"),
        (F.one_hot(rows()[1], CLASSES), "targets [16, 4] int64"),
        (rows()[1] + CLASSES, "is out of bounds"),
    ],
)
@pytest.mark.parametrize("policy", ["dense", "infobatch", "gate"])
def test_targets_that_do_not_fit_are_said_with_their_shape(targets, said, policy):
    refused("the loss CrossEntropyLoss cannot take outputs [16, 4] float32", network(), loader(targets=targets),
            policy=policy)  # fmt: skip
    refused(said, network(), loader(targets=targets), policy=policy)


class Learned(nn.Module):
    """A loss with a parameter of its own, such as a temperature."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, logits, targets):
        return F.cross_entropy(logits * self.scale.exp(), targets, reduction="none")


def test_a_losss_own_parameters_are_not_left_behind():
    refused("has parameters of its own", network(), loss=Learned())
    refused("has parameters of its own", network(), loss=Criterion(Learned()))
    loss = Learned().requires_grad_(False)
    train(network(), loss=loss)
    model = network()
    model.loss = Learned()  # not called by forward: Sequential has no such attribute
    model.forward = functools.partial(nn.Sequential.forward, nn.Sequential(*list(model)[:3]))
    train(model, loss=model.loss)
    assert model.loss.scale != 0.0


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ("cross_entropy", "must be a function of logits and targets"),
        (lambda z, y: (z.argmax(1) != y).long(), "must return floating numbers"),
        (lambda z, y: F.cross_entropy(z.detach(), y, reduction="none"), "must have a gradient"),
        (lambda z, y: z["logits"], "cannot take outputs"),
        (nn.CrossEntropyLoss(torch.ones(3), reduction="none"), "weight tensor should be defined"),
    ],
)
def test_losses_that_are_none(loss, said):
    refused(said, network(), loss=loss)


# --- models -------------------------------------------------------------------------------------


def made_in_inference_mode():
    with torch.inference_mode():
        return network()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Linear, "got the class Linear; make it"),
        (lambda x: x, "must be a torch.nn.Module, got function"),
        (nn.Flatten(), "must have parameters to train"),
        (network().requires_grad_(False), "must have a parameter that requires a gradient"),
        (network().half(), "cannot train float16 weights"),
        (network(width=5), "the model Sequential cannot take inputs [16, 6] float32: RuntimeError: mat1 and mat2"),
        (network().double(), "must have the same dtype"),
    ],
)
def test_models_that_cannot_be_trained(model, said):
    refused(said, model)


def test_models_without_values():
    for model, said in ((network().to("meta"), "on the meta device"), (made_in_inference_mode(), "in inference mode")):
        with pytest.raises(UserError, match=said):
            train(model)


def test_gradients_are_recorded_wherever_the_caller_is():
    model, twin = network(), network()
    train(model)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            train(other := copy.deepcopy(twin) if isinstance(context, torch.no_grad) else network_outside())
        assert torch.equal(weights(other), weights(model))


def network_outside():
    with torch.inference_mode(False):
        return network()


class OwnLoss(nn.Module):
    """A model that returns a plain dictionary, with a loss of its own where labels are given."""

    def __init__(self, smoothing):
        super().__init__()
        self.net, self.smoothing = network(), smoothing

    def forward(self, x, labels=None):
        logits = self.net(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels, label_smoothing=self.smoothing), "logits": logits}


def test_a_loss_in_a_plain_dictionary_is_the_models_own():
    x, y = rows()
    data = [{"x": x[i : i + 16], "labels": y[i : i + 16]} for i in range(0, 64, 16)]
    refused("the model's own loss of the first batch is", OwnLoss(0.3), data)
    train(OwnLoss(0.0), data)


# --- optimizers and schedules -------------------------------------------------------------------


class NeedsClosure(torch.optim.SGD):
    def step(self, closure=None):
        assert closure is not None, "a second pass is needed"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda model: torch.optim.LBFGS(model.parameters()), "whose step needs a closure"),
        (lambda model: torch.optim.LBFGS, "whose step needs a closure"),
        (lambda model: NeedsClosure(model.parameters(), lr=0.1), "the optimizer NeedsClosure cannot take a step"),
        (lambda model: torch.optim.SGD(network().parameters(), lr=0.1), "got one of none of them"),
        (lambda model: "adamw", "must be an optimizer or a factory of one, got str"),
        (lambda model: lambda parameters, lr: None, "must be an optimizer or a factory of one, got NoneType"),
        (lambda model: lambda: None, "the factory `optimizer` cannot be called"),
        (lambda model: torch.optim.SGD(model.parameters(), lr=0.1, differentiable=True), "cannot take a step"),
    ],
)
def test_optimizers_that_cannot_train_the_model(make, said):
    model = network()
    refused(said, model, optimizer=make(model))


def test_sparse_gradients_are_refused_where_the_optimizer_does_not_take_them():
    data = loader(torch.randint(0, 9, (64, 3)))
    for options in ({}, {"optimizer": torch.optim.SGD, "settings": TrainerSettings(clip_norm=1.0)}):
        model = nn.Sequential(nn.EmbeddingBag(9, 4, sparse=True), nn.Linear(4, CLASSES))
        refused("gradients", model, data, **options)


def test_a_learning_rate_beside_an_optimizer_has_no_effect_and_is_refused():
    model = network()
    refused("`lr` is of an optimizer made here", model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), lr=0.5)
    with pytest.raises(UserError, match="`lr` is of an optimizer made here"):
        advise(model, loader(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), lr=0.5, steps=6)


@pytest.mark.parametrize("schedule", ["cosine", lambda progress: 1.0 - progress])
def test_a_learning_rate_that_is_a_tensor_follows_the_schedule(schedule):
    def trained(lr):
        model = network()
        train(model, optimizer=torch.optim.SGD(model.parameters(), lr=lr), schedule=schedule, steps=8)
        return weights(model)

    rate = torch.tensor(0.1)
    torch.testing.assert_close(trained(rate), trained(0.1))
    assert rate < 0.1  # the user's own tensor, which a compiled or captured step reads


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), None, "half"])
def test_a_schedule_gives_a_factor(value):
    refused("must map progress to a", network(), schedule=lambda progress: value)


# --- data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (TensorDataset(*rows()), "got a TensorDataset; give a DataLoader of it"),
        (lambda: iter(()), "got function; call it"),
        (42, "must be an iterable of batches, got int"),
        (DataLoader(TensorDataset(*rows()), batch_size=None), "must have a row each, got one number"),
        ([(rows()[0], rows()[1][:-1])], "the same number of rows in dim 0, got an input [64, 6] float32 and 63"),
        ([(rows()[0], rows()[1].to("meta"))], "cannot be on cpu"),
    ],
)
def test_data_that_are_no_batches(data, said):
    refused(said, network(), data)


class TakesNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, name=None):
        return self.net(x)


@pytest.mark.parametrize("policy", ["gate", "random"])
def test_texts_in_a_batch_are_refused_before_the_first_step(policy):
    """Not at the end of the dense start, where a policy selects for the first time."""
    x, y = rows()
    data = [{"x": x, "labels": y, "name": ["a"] * 64}]
    refused("cannot be selected", TakesNames(), data, policy=policy, steps=40)
    train(TakesNames(), data)


class TakesLabels(nn.Module):
    """Computes its own loss where labels are given, as models of Transformers do."""

    def __init__(self):
        super().__init__()
        self.net = network(outputs=1)

    def forward(self, x, labels=None):
        return self.net(x).squeeze(1)


def test_labels_before_the_last_element_are_not_an_input():
    """The weights of the rows would be taken for the targets."""
    x, y = rows()
    data = loader_of(x, y.float(), torch.ones(64))
    refused("element 1 of a batch is the model's `labels`", TakesLabels(), data, loss=nn.MSELoss(reduction="none"))
    first_two = TrainerSettings(inputs=lambda batch: batch[0], targets=lambda batch: batch[1])
    train(TakesLabels(), data, loss=nn.MSELoss(reduction="none"), settings=first_two)


def loader_of(*tensors):
    return DataLoader(TensorDataset(*tensors), 16)


def test_a_run_without_a_row_says_so():
    log = train(network(), [(rows()[0][:0], rows()[1][:0])])
    assert any("no row was trained on" in warning for warning in log.warnings)


# --- settings and the arguments of fit ----------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": "1e-3"}, "`lr` must be above 0, got '1e-3'"),
        ({"lr": float("inf")}, "`lr` must be above 0, got inf"),
        ({"rate": "0.3"}, "`rate` must be in (0, 1], got '0.3'"),
        ({"dense_start": "a"}, "`dense_start` must be a fraction"),
        ({"policy": 3}, "must be a name, a Policy or a Gate, got int"),
        ({"policy": Gate}, "got the class Gate; make it"),
        ({"scorer": nn.Linear(1, 1)}, "`scorer` must be a name or a Scorer, got Linear"),
        ({"device": "gpu"}, "device 'gpu' cannot be used"),
        ({"device": "meta"}, "device 'meta' cannot be used: its tensors have no values"),
        ({"device": 1.5}, "device '1.5' cannot be used"),
        pytest.param(
            {"device": "cuda"},
            "device 'cuda' cannot be used",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it can"),
        ),
        ({"settings": {"amp": "bfloat16"}}, "must be TrainerSettings, got dict"),
    ],
)
def test_arguments_of_a_trainer(options, said):
    refused(said, network(), **{"policy": "gate", **options})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clip_norm": "1"}, "`clip_norm` must be above 0"),
        ({"ema": "x"}, "`ema` must be a decay"),
        ({"compile": 3}, "`compile` must be True, False or the name"),
        ({"compile": "nope"}, "names no backend of torch.compile"),
        ({"channels_last": "x"}, "`channels_last` must be True, False or None"),
        ({"inputs": 3}, "`inputs` must be a function of a batch"),
        ({"scoring_precision": "half"}, "`scoring_precision` must be one of"),
    ],
)
def test_settings_of_a_step(options, said):
    with pytest.raises(UserError, match=re.escape(said)):
        train(network(), settings=TrainerSettings(**options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 2.5}, "`steps` must be a whole number"),
        ({"steps": "3"}, "`steps` must be above 0 and finite, got '3'"),
        ({"steps": True}, "got True"),
        ({"evaluations": 0}, "`evaluations` must be a whole number, at least 1"),
        ({"evaluations": "2"}, "`evaluations` must be a whole number"),
        ({"evaluate": 42}, "must be an iterable of batches"),
        ({"evaluate": lambda model: 3.0}, "must return numbers by name"),
        ({"checkpoint_interval": 2}, "`checkpoint_interval` needs `checkpoint`"),
        ({"checkpoint": "unused", "checkpoint_interval": 0}, "`checkpoint_interval` must be a whole number"),
        ({"checkpoint": "unused", "resume": "yes"}, "`resume` must be True or False"),
        ({"callbacks": 3}, "`callbacks` must be a sequence"),
        ({"stop": True}, "`stop` must be a function"),
        ({"clock": 3}, "`clock` must be a Clock"),
        ({"cost_budget": 3}, "`cost_budget` must be a cost and its unit"),
        ({"meter": 3}, "`meter` must have a source"),
    ],
)
def test_arguments_of_fit(options, said):
    if said == "must return numbers by name":
        with pytest.raises(UserError, match=said):
            train(network(), fit=options)
    else:
        refused(said, network(), fit=options)


def test_a_stop_that_returns_nothing_goes_on():
    assert train(network(), fit={"stop": lambda: None}).steps == 4


def test_a_stream_needs_batches_and_functions():
    for arguments in ({"batches": None}, {"batches": [], "inputs": 3}, {"batches": [], "device": "gpu"}):
        with pytest.raises(UserError):
            StreamLoader(**arguments)


def test_importing_everything_leaves_names_of_pytorch_alone():
    names = {"nn": nn}
    exec("from sparse_training import *", names)
    assert names["nn"] is nn


@pytest.mark.parametrize("policy", ["infobatch", "importance"])
def test_past_losses_are_kept_whatever_the_default_type_is(policy):
    torch.set_default_dtype(torch.float64)
    try:
        train(network(), loader(), policy=policy)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("ask", [sparse_kernels.backend_info, lambda name: sparse_kernels.warm_up(name, [(4, 3)])])
def test_a_device_that_pytorch_does_not_know(ask):
    with pytest.raises(ValueError, match="`device` must name a PyTorch device, such as 'cpu' or 'cuda:0', got 'gpu'"):
        ask("gpu")
    with pytest.raises(TypeError, match="`device` must be a PyTorch device or its name"):
        ask(3.0)
