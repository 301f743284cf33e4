"""Data loaders as their own documentation makes them: a run that is stopped goes on bit for bit, or is refused."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from sparse_training import HistorySampler, SparseTrainer
from sparse_training.errors import UserError

ROWS = 40


def table():
    inputs = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, inputs.argmax(1))


class Augmented(Dataset):
    """Adds noise from whichever generator."""

    def __init__(self, noise):
        self.rows, self.noise = table(), noise

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        inputs, target = self.rows[row]
        return inputs + 0.3 * self.noise(), target


class Noise:
    """A transform with a generator of its own."""

    def __init__(self, kind):
        self.generator = {
            "torch": lambda: torch.Generator().manual_seed(3),
            "python": lambda: random.Random(3),
            "numpy": lambda: np.random.default_rng(3),
            "philox": lambda: np.random.Generator(np.random.Philox(3)),
            "numpy, old": lambda: np.random.RandomState(3),
        }[kind]()

    def __call__(self):
        if isinstance(self.generator, torch.Generator):
            return torch.randn((), generator=self.generator).item()
        if isinstance(self.generator, random.Random):
            return self.generator.gauss(0.0, 1.0)
        return float(self.generator.normal())


class ShuffledByNumPy(Sampler):
    """As many a tutorial writes it: the order is drawn from NumPy's global generator."""

    def __len__(self):
        return ROWS

    def __iter__(self):
        return iter(np.random.permutation(ROWS).tolist())  # noqa: NPY002


def with_generator(**options):
    return DataLoader(table(), batch_size=8, generator=torch.Generator().manual_seed(3), **options)


LOADERS = {
    "shuffle": lambda: DataLoader(table(), batch_size=8, shuffle=True),
    "generator": lambda: with_generator(shuffle=True),
    "generator and workers": lambda: with_generator(shuffle=True, num_workers=2),
    "sampler's generator": lambda: DataLoader(
        table(), batch_size=8, sampler=RandomSampler(table(), generator=torch.Generator().manual_seed(3))
    ),
    "with replacement": lambda: DataLoader(
        table(), batch_size=8,
        sampler=RandomSampler(table(), replacement=True, generator=torch.Generator().manual_seed(3)),
    ),
    "weighted": lambda: DataLoader(
        table(), batch_size=8,
        sampler=WeightedRandomSampler([1.0] * ROWS, ROWS, generator=torch.Generator().manual_seed(3)),
    ),
    "batch sampler's sampler": lambda: DataLoader(
        table(),
        batch_sampler=BatchSampler(RandomSampler(table(), generator=torch.Generator().manual_seed(3)), 8, False),
    ),
    "NumPy's order": lambda: DataLoader(table(), batch_size=8, sampler=ShuffledByNumPy()),
    "torch's noise": lambda: DataLoader(Augmented(lambda: torch.randn(()).item()), batch_size=8, shuffle=True),
    "Python's noise": lambda: DataLoader(Augmented(lambda: random.gauss(0.0, 1.0)), batch_size=8, shuffle=True),
    "NumPy's noise": lambda: DataLoader(Augmented(np.random.randn), batch_size=8, shuffle=True),
    "Python's noise, workers": lambda: DataLoader(
        Augmented(lambda: random.gauss(0.0, 1.0)), batch_size=8, shuffle=True, num_workers=2
    ),
    **{
        f"own noise: {kind}": lambda kind=kind: DataLoader(Augmented(Noise(kind)), batch_size=8, shuffle=True)
        for kind in ("torch", "python", "numpy", "philox", "numpy, old")
    },
    "own noise in a subset": lambda: DataLoader(Subset(Augmented(Noise("numpy")), range(ROWS)), batch_size=8),
}  # fmt: skip


def run(loader, folder=None, stop_at=None, seed=0, evaluate=False, policy="dense"):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.Linear(16, 6))
    trainer = SparseTrainer(model, policy=policy, lr=1e-2)
    steps = 0

    def stop():
        nonlocal steps
        steps += 1
        return steps == stop_at

    options = {"evaluate": loader, "evaluations": 6} if evaluate else {}
    log = trainer.fit(loader, steps=17, checkpoint=folder, resume=folder is not None, stop=stop, **options)
    return log, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("stop_at", [3, 5, 12])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, name, stop_at):
    """Epochs of 5 batches: stopped within the first, at its end, and within the third."""
    _, whole = run(LOADERS[name]())
    part, _ = run(LOADERS[name](), tmp_path, stop_at)
    assert part.interrupted
    log, resumed = run(LOADERS[name](), tmp_path, seed=1)
    assert log.steps == 17
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("stop_at", [9, 13])
def test_a_stopped_run_of_the_default_goes_on_bit_for_bit(tmp_path, name, stop_at):
    """Rows are left out from the second epoch on, and drawn ahead where there are workers."""
    log, whole = run(LOADERS[name](), policy=None)
    assert log.rows_trained < log.rows_seen == 17 * 8
    run(LOADERS[name](), tmp_path, stop_at, policy=None)
    again, resumed = run(LOADERS[name](), tmp_path, seed=1, policy=None)
    assert again.rows_trained == log.rows_trained
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["generator", "own noise: numpy"])
def test_evaluations_on_the_same_loader_draw_from_its_generators_too(tmp_path, name):
    _, whole = run(LOADERS[name](), evaluate=True)
    run(LOADERS[name](), tmp_path, 12, evaluate=True)
    _, resumed = run(LOADERS[name](), tmp_path, seed=1, evaluate=True)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_persistent_workers_are_refused_with_checkpoints(tmp_path):
    loader = DataLoader(table(), batch_size=8, num_workers=1, persistent_workers=True)
    with pytest.raises(UserError, match="needs a DataLoader with persistent_workers=False"):
        run(loader, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_generators_that_the_checkpoint_has_not_are_refused(tmp_path):
    run(LOADERS["shuffle"](), tmp_path, 3)
    with pytest.raises(UserError, match=r"must have the checkpoint's random generators, got others: .*generator"):
        run(LOADERS["generator"](), tmp_path)


# --- epochs -------------------------------------------------------------------------------------


class Numbered:
    """Keeps the numbers of the epochs that it is told."""

    def __init__(self):
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


class NumberedBatches(Numbered):
    def __init__(self, sampler=()):
        super().__init__()
        self.sampler = sampler

    def __len__(self):
        return 5

    def __iter__(self):
        return iter([list(range(8 * batch, 8 * batch + 8)) for batch in range(5)])


class NumberedStream(Numbered, IterableDataset):
    def __iter__(self):
        rows = table()
        return (rows[row] for row in range(ROWS))


class NumberedTable(Numbered, TensorDataset):
    def __init__(self):
        Numbered.__init__(self)
        TensorDataset.__init__(self, *table().tensors)


def epochs_of(loader, *parts):
    run(loader)
    return [getattr(part, "epochs", None) for part in parts]


def test_set_epoch_reaches_whatever_has_one():
    told = [0, 1, 2, 3]
    batches = NumberedBatches()
    assert epochs_of(DataLoader(table(), batch_sampler=batches), batches) == [told]
    inner = Numbered()
    batches = NumberedBatches(inner)
    assert epochs_of(DataLoader(table(), batch_sampler=batches), batches, inner) == [told, told]
    stream = NumberedStream()
    assert epochs_of(DataLoader(stream, batch_size=8), stream) == [told]
    data = NumberedTable()
    assert epochs_of(DataLoader(Subset(data, range(ROWS)), batch_size=8), data) == [told]
    sampler = DistributedSampler(table(), num_replicas=1, rank=0)
    run(DataLoader(table(), batch_sampler=BatchSampler(sampler, 8, False)))
    assert sampler.epoch == 3


@pytest.mark.parametrize("method", ["importance", "infobatch", "adaptive"])
def test_an_epoch_begins_when_it_is_iterated_not_at_its_first_batch(method):
    """Some trainers ask for the length between the two."""
    switched = {"deduplicate": True, "duplicate_counts": [1] * 100} if method == "adaptive" else {}
    pruned = {"delta": 0.5} if method == "infobatch" else {}
    sampler = HistorySampler(100, batch_size=10, method=method, epochs=2, **pruned, **switched)
    losses = torch.linspace(0.0, 1.0, 100)
    for batch in sampler:
        index = torch.tensor(batch)
        sampler.update(index, losses[index])
    assert sampler.epoch == 0
    batches = iter(sampler)
    assert sampler.epoch == 1
    length = len(sampler)
    rows = [row for batch in batches for row in batch]
    assert length == 10  # the last epoch is whole
    assert len(rows) == 100


def test_asking_twice_for_an_iterator_skips_no_epoch_and_loses_no_state():
    sampler = HistorySampler(100, batch_size=10)
    list(sampler)
    iter(sampler)
    batches = iter(sampler)
    assert sampler.epoch == 1
    first = next(batches)
    state = sampler.state_dict()
    restored = HistorySampler(100, batch_size=10)
    restored.load_state_dict(state)
    iter(restored)
    assert [first, *batches] == list(restored)


@pytest.mark.parametrize("stop", range(12, 16))
def test_an_epoch_whose_first_batch_is_left_out_has_the_order_that_it_had(tmp_path, stop):
    """The order is drawn from the generator that dropout moves on, before the first batch is read."""

    def run(folder=None, stop=None):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        data = TensorDataset(torch.randn(60, 8, generator=generator), torch.randint(3, (60,), generator=generator))
        model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 3))
        trainer = SparseTrainer(model, dense_start=0.0, dense_end=0.0)
        steps = iter(range(1, 100))
        trainer.fit(
            DataLoader(data, batch_size=5, shuffle=True), epochs=3, checkpoint=folder, resume=folder is not None,
            stop=lambda: next(steps) == stop, progress=False,
        )  # fmt: skip
        return [parameter.tolist() for parameter in model.parameters()]

    whole = run()
    run(tmp_path, stop)
    assert run(tmp_path) == whole
