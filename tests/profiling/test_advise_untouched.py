"""Nothing of the user's model, optimizer, data or generators changes when advice is asked for."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, WeightedRandomSampler
from trainer_parts import network as image_network
from trainer_parts import resident

from sparse_training import HistorySampler, SparseTrainer, StreamLoader, UserError, advise
from sparse_training.criterion import Criterion

LOSS = nn.CrossEntropyLoss(reduction="none")


class Augmented(Dataset):
    """Rows with noise from every kind of generator."""

    def __init__(self, rows=96):
        self.inputs, self.targets = torch.randn(rows, 6), torch.randint(0, 3, (rows,))
        self.own, self.numpy, self.python = torch.Generator(), np.random.default_rng(1), random.Random(2)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, row):
        noise = torch.rand(1, generator=self.own) + torch.rand(1) + self.numpy.random() + self.python.random()
        return self.inputs[row] + 0.01 * (noise + random.random() + np.random.rand()), self.targets[row]  # noqa: NPY002


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3))


def everything(model, optimizer, dataset, *generators):
    """Copies of all that might change."""
    return copy.deepcopy(
        {
            "weights": model.state_dict(),
            "gradients": [parameter.grad for parameter in model.parameters()],
            "frozen": [parameter.requires_grad for parameter in model.parameters()],
            "modes": [module.training for module in model.modules()],
            "optimizer": optimizer.state_dict(),
            "torch": torch.get_rng_state(),
            "own": [generator.get_state() for generator in (dataset.own, *generators)],
            "numpy": (np.random.get_state()[1].tolist(), dataset.numpy.bit_generator.state),  # noqa: NPY002
            "python": (random.getstate(), dataset.python.getstate()),
            "hooks": [
                [list(hooks) for name, hooks in vars(module).items() if name.endswith("hooks")]
                for module in model.modules()
            ],
        }
    )


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        tensors = name in ("weights", "gradients", "optimizer", "torch", "own")
        if tensors:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=name)
        else:
            assert a[name] == b[name], name


def trained(model, loader, optimizer, steps=3):
    """Train as a user does, and stop with gradients and optimizer state in hand."""
    for _, (inputs, targets) in zip(range(steps), loader, strict=False):
        optimizer.zero_grad()
        LOSS(model(inputs), targets).mean().backward()
        optimizer.step()


def test_everything_is_bit_for_bit_as_before():
    dataset, order = Augmented(), torch.Generator()
    loader = DataLoader(dataset, batch_size=16, shuffle=True, generator=order)
    model = network()
    model[0].bias.requires_grad_(False)
    model[2].eval()
    model[0].register_forward_hook(lambda *_: None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trained(model, loader, optimizer)
    kept = [parameter.grad for parameter in model.parameters()]
    before = everything(model, optimizer, dataset, order)
    advice = advise(model, loader, loss=LOSS, optimizer=optimizer, steps=12)
    assert advice.steps >= 12
    same(before, everything(model, optimizer, dataset, order))
    assert all(now.grad is was for now, was in zip(model.parameters(), kept, strict=True))


def test_the_users_training_goes_on_as_without_it():
    def run(asks):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
        loader = DataLoader(Augmented(), batch_size=16, shuffle=True)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        trained(model, loader, optimizer)
        schedule.step()
        if asks:
            advise(model, loader, loss=LOSS, optimizer=optimizer, steps=8)
        trained(model, loader, optimizer)
        schedule.step()
        SparseTrainer(model, loss=LOSS, policy="dense").fit(loader, steps=3)
        return {**model.state_dict(), "lr": torch.tensor(schedule.get_last_lr())}

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)


def test_a_loss_that_reaches_the_model_leaves_its_gradients():
    model, dataset = network(), Augmented()

    def loss(logits, targets):
        return F.cross_entropy(logits, targets, reduction="none") + 0.01 * model[0].weight.square().sum()

    loader = DataLoader(dataset, batch_size=16)
    advise(model, loader, loss=loss, steps=6)
    assert all(parameter.grad is None for parameter in model.parameters())
    trained(model, loader, torch.optim.SGD(model.parameters(), lr=0.1))
    before = [parameter.grad.clone() for parameter in model.parameters()]
    advise(model, loader, loss=loss, steps=6)
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], before, rtol=0, atol=0)


def test_a_loss_with_weights_of_its_own_is_refused_and_keeps_them():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, logits, targets):
            return F.cross_entropy(self.scale * logits, targets, reduction="none")

    for loss in (Scaled(), Criterion(Scaled(), targets="classes")):
        scale = loss.loss.scale if isinstance(loss, Criterion) else loss.scale
        with pytest.raises(UserError, match="parameters of its own"):
            advise(network(), DataLoader(Augmented(), batch_size=16), loss=loss, steps=6)
        scale.requires_grad_(False)
        advise(network(), DataLoader(Augmented(), batch_size=16), loss=loss, steps=6)
        assert (scale.item(), scale.grad) == (1.0, None)


def test_a_loader_in_the_midst_of_an_epoch_goes_on_with_it():
    dataset = Augmented()
    loader = DataLoader(dataset, batch_size=16, num_workers=2, persistent_workers=True)
    running = iter(loader)
    first = next(running)
    workers = loader._iterator
    assert advise(network(), loader, loss=LOSS, steps=9).steps % len(loader) != 1  # else it could end where it began
    assert loader._iterator is workers
    targets = torch.cat([targets for _, targets in (first, *running)])
    assert targets.equal(dataset.targets)


@pytest.mark.parametrize(
    "sampler",
    [
        lambda dataset, generator: RandomSampler(dataset, generator=generator),
        lambda dataset, generator: WeightedRandomSampler(torch.ones(len(dataset)), 64, generator=generator),
        lambda dataset, generator: torch.utils.data.DistributedSampler(dataset, num_replicas=1, rank=0),
    ],
    ids=["random", "weighted", "distributed"],
)
def test_samplers_keep_their_place(sampler):
    dataset, generator = Augmented(), torch.Generator()
    made = sampler(dataset, generator)
    if hasattr(made, "set_epoch"):
        made.set_epoch(7)
    before = (generator.get_state(), getattr(made, "epoch", None))
    advise(network(), DataLoader(dataset, batch_size=16, sampler=made), loss=LOSS, steps=8)
    torch.testing.assert_close(generator.get_state(), before[0], rtol=0, atol=0)
    assert getattr(made, "epoch", None) == before[1]


def test_a_history_sampler_keeps_its_place():
    dataset = Augmented()
    sampler = HistorySampler(dataset, batch_size=16, method="importance", rate=0.5)
    loader = DataLoader(dataset, batch_sampler=sampler)
    next(iter(loader))
    before = copy.deepcopy(sampler.state_dict())
    advise(network(), loader, loss=LOSS, steps=8)
    after = sampler.state_dict()
    assert (before["epoch"], before["drawn"], before["position"]) == (
        after["epoch"], after["drawn"], after["position"])  # fmt: skip


def test_data_in_memory_keeps_its_epoch_and_position():
    loader = resident()
    next(iter(loader))
    advise(image_network(), loader, steps=8)
    assert (loader.epoch, loader.position) == (0, 1)


class Numbered(Dataset):
    """Rows that know the epoch."""

    epoch = 5

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 48

    def __getitem__(self, row):
        return torch.randn(6), row % 3


class Placed(IterableDataset):
    """A stream that keeps its place, and its epoch."""

    epoch, place = 5, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for _ in range(3):
            self.place += 1
            yield torch.randn(16, 6), torch.randint(0, 3, (16,))


def test_neither_epoch_nor_place_is_set_in_data_of_the_users():
    numbered, placed = Numbered(), Placed()
    loaders = (DataLoader(numbered, batch_size=16), placed, DataLoader(placed, batch_size=None))
    for loader in (*loaders, *map(StreamLoader, loaders)):
        advise(network(), loader, loss=LOSS, steps=8)
        assert (numbered.epoch, placed.epoch, placed.place) == (5, 5, 0)


def test_an_error_on_the_way_leaves_everything_too():
    dataset = Augmented()
    loader = DataLoader(dataset, batch_size=16, shuffle=True)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    trained(model, loader, optimizer)
    before = everything(model, optimizer, dataset)
    with pytest.raises(UserError, match="one value per row"):
        advise(model, loader, loss=lambda logits, targets: F.cross_entropy(logits, targets), optimizer=optimizer)
    with pytest.raises(KeyboardInterrupt):
        advise(model, loader, loss=LOSS, optimizer=optimizer, steps=20, progress=stop)
    same(before, everything(model, optimizer, dataset))


def stop(share):
    if share > 0.5:
        raise KeyboardInterrupt


def test_it_works_where_gradients_are_off():
    loader = DataLoader(Augmented(), batch_size=16)
    with torch.no_grad():
        assert advise(network(), loader, loss=LOSS, steps=6).gradients is not None
        assert not torch.is_grad_enabled()
