"""A run goes on with the model that it began with: modules without weights, and what modules were made with, too."""

import enum
import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_training import Callback, SparseTrainer, UserError


def loader():
    generator = torch.Generator().manual_seed(0)
    inputs, classes = torch.randn(64, 8, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    return DataLoader(TensorDataset(inputs, classes), batch_size=16)


def run(folder, model, *, ends=False, resume=True, callbacks=()):
    steps = itertools.count()
    trainer = SparseTrainer(model, policy="dense")
    return trainer.fit(
        loader(), steps=8, checkpoint=folder, resume=resume, callbacks=callbacks, progress=False,
        stop=lambda: ends and next(steps) == 2,
    )  # fmt: skip


def between(*modules):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), *modules, nn.Linear(8, 3))


class Net(nn.Module):
    """A network as users write them, with modules by name."""

    def __init__(self, **modules):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        x = self.body(x)
        for name, module in self.named_children():
            x = module(x) if name not in ("body", "head") else x
        return self.head(x)


class Attends(nn.Module):
    def __init__(self, heads, dropout=0.0):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, heads, dropout, batch_first=True)

    def forward(self, x):
        return self.attention(x[:, None], x[:, None], x[:, None], need_weights=False)[0][:, 0]


class Convolves(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, **options)

    def forward(self, x):
        return self.conv(x[:, None])[:, 0]


class Recurs(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.cells = nn.LSTM(8, 8, 2, dropout=dropout)

    def forward(self, x):
        return self.cells(x[None])[0][0]


class Drops(nn.Dropout):
    """Passes its arguments on, as subclasses do."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)


class Scales(nn.Module):
    def __init__(self, eps=1e-6, rank=0, device="cpu"):
        super().__init__()
        self.eps, self.rank, self.device, self.calls, self.latest = eps, rank, device, 0, 0.0

    def forward(self, x):
        self.calls += 1
        self.latest = float(x.detach().mean())
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


CHANGES = {
    "dropout": (lambda: between(nn.Dropout(0.1)), lambda: between(nn.Dropout(0.5)), r"model_options\.1\.p 0\.1 is now"),
    "eps": (lambda: between(nn.LayerNorm(8)), lambda: between(nn.LayerNorm(8, eps=1e-3)), "eps 1e-05 is now 0.001"),
    "momentum": (
        lambda: between(nn.BatchNorm1d(8)), lambda: between(nn.BatchNorm1d(8, momentum=None)),
        "momentum 0.1 is now None",
    ),
    "padding": (
        lambda: between(Convolves(padding=1)), lambda: between(Convolves(padding=2, dilation=2)),
        r"conv\.padding \(1,\) is now \(2,\)",
    ),
    "heads": (lambda: between(Attends(2)), lambda: between(Attends(4)), "attention.num_heads 2 is now 4"),
    "dropout of attention": (lambda: between(Attends(2)), lambda: between(Attends(2, 0.5)), "dropout 0.0 is now 0.5"),
    "dropout of an LSTM": (lambda: between(Recurs(0.0)), lambda: between(Recurs(0.5)), "dropout 0.0 is now 0.5"),
    "a subclass": (lambda: between(Drops(0.1)), lambda: between(Drops(p=0.5)), r"model_options\.1\.p 0\.1 is now 0\.5"),
    "a user's module": (lambda: between(Scales()), lambda: between(Scales(0.1)), "eps 1e-06 is now 0.1"),
    "activation": (lambda: between(nn.ReLU()), lambda: between(nn.GELU()), r"model\.1 ReLU is now GELU"),
    "one more": (lambda: Net(), lambda: Net(drop=nn.Dropout(0.5)), r"model\.drop absent is now Dropout"),
    "one less": (lambda: Net(drop=nn.Dropout(0.5)), lambda: Net(), r"model\.drop Dropout is now absent"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_of_equal_weights_that_computes_otherwise_is_refused(tmp_path, change):
    began, now, said = CHANGES[change]
    assert run(tmp_path, began(), ends=True, resume=False).interrupted
    with pytest.raises(UserError, match=f"made with other settings: .*{said}") as caught:
        run(tmp_path, now())
    assert "\n" not in str(caught.value)
    assert run(tmp_path, began()).steps == 8


class Pad(enum.IntEnum):
    NOTHING = 1


class Embeds(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.table = nn.Embedding(4, width, padding_idx=Pad.NOTHING)

    def forward(self, x):
        return x + self.table((x[:, 0] > 0).long())


def lazy():
    torch.manual_seed(0)
    return nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Linear(8, 3))


class Held(nn.Sequential):
    """Holds a function, whose description has an address."""

    def __init__(self, function):
        super().__init__(*between())
        self.function = function


class Limits(nn.Module):
    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def forward(self, x):
        return x


EQUAL = {
    "the process's own": (lambda: between(Scales(rank=0)), lambda: between(Scales(rank=1, device="cuda:0"))),
    "a function": (lambda: Held(torch.relu), lambda: Held(lambda x: torch.relu(x))),
    "several processes": (
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(between(nn.BatchNorm1d(8))),
        lambda: between(nn.BatchNorm1d(8)),
    ),
    "an enumeration": (lambda: between(Embeds()), lambda: between(Embeds())),
    "not a number": (lambda: between(Limits(float("nan"))), lambda: between(Limits(float("nan")))),
    "1000 layers": (lambda: between(*map(nn.Dropout, [0.0] * 1000)), lambda: between(*map(nn.Dropout, [0.0] * 1000))),
}


@pytest.mark.parametrize("kind", EQUAL)
def test_what_is_no_part_of_the_computation_may_differ(tmp_path, kind):
    began, now = EQUAL[kind]
    assert run(tmp_path, began(), ends=True, resume=False).interrupted
    assert run(tmp_path, now()).steps == 8


def test_a_run_goes_on_in_its_own_process_with_the_model_that_it_has_trained(tmp_path):
    """What a module has counted or measured since is its state."""
    model = between(Scales())
    assert run(tmp_path, model, ends=True, resume=False).interrupted
    assert model[1].calls
    assert run(tmp_path, model).steps == 8


@pytest.mark.parametrize("first", [True, False])
def test_a_model_whose_sizes_are_not_known_when_it_is_made(tmp_path, first):
    """As PyTorch's documentation asks, a batch is passed through it, before or after the trainer is made."""

    def run_of(first, **options):
        model = lazy()
        if first:
            model(torch.zeros(2, 8))
        trainer = SparseTrainer(model, policy="dense", optimizer=torch.optim.SGD)
        if not first:
            with pytest.raises(UserError, match=r"the model's 0\.weight has no size yet; call the model with"):
                trainer.fit(loader(), steps=8, progress=False)
            model(torch.zeros(2, 8))
        return trainer.fit(loader(), steps=8, checkpoint=tmp_path, progress=False, **options)

    steps = itertools.count()
    assert run_of(True, stop=lambda: next(steps) == 2).interrupted
    assert run_of(first, resume=True).steps == 8


def test_a_callback_may_change_a_momentum_in_the_run(tmp_path):
    class Momentum(Callback):
        def on_step_end(self, run):
            run.trainer.model[1].momentum = 0.1 / (1 + run.status.step)

    def model():
        return between(nn.BatchNorm1d(8))

    assert run(tmp_path, model(), ends=True, resume=False, callbacks=[Momentum()]).interrupted
    assert run(tmp_path, model(), callbacks=[Momentum()]).steps == 8
