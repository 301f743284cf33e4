"""The default policy: fewer rows, the expected gradient of all of them, no assumption, and nothing said silently."""

import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from sparse_training import ResidentLoader, SparseTrainer, load_data
from sparse_training.data.splits import Split
from sparse_training.errors import UserError

ROWS, CLASSES = 64, 4


def table(rows=ROWS):
    inputs = torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.where(torch.rand(rows, generator=torch.Generator().manual_seed(1)) < 0.3, 3, inputs.argmax(1) % 3)
    return inputs, targets


class Counted(Dataset):
    """Counts how often each row is read."""

    def __init__(self, rows=ROWS):
        self.inputs, self.targets = table(rows)
        self.reads = [0] * rows

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, row):
        self.reads[row] += 1
        return self.inputs[row], self.targets[row]


def images():
    """The same rows in memory, as pixels."""
    inputs, targets = table()
    pixels = ((inputs + 4.0) * 30).clamp(0, 255).to(torch.uint8)[:, None, None, :]
    return Split(pixels, targets)


def linear(inputs=6):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, CLASSES, dtype=torch.float64))


class Double(nn.Module):
    """Computes in float64, so that tiny steps can be told apart."""

    def __init__(self):
        super().__init__()
        self.layers = linear()

    def forward(self, inputs):
        return self.layers(inputs.double())


def mean_step(model, data, policy, epochs, **options):
    """Mean change of the weights in a batch offered, by learning rate, of a model that hardly moves."""
    before = torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])
    trainer = SparseTrainer(
        model,
        policy=policy,
        optimizer=torch.optim.SGD,
        lr=1e-6,
        schedule="constant",
        dense_start=0,
        dense_end=0,
        **options,
    )
    log = trainer.fit(data, epochs=epochs)
    after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return (after - before) / (1e-6 * log.steps), log


SOURCES = {
    "in memory": lambda: ResidentLoader(images(), batch_size=8, mean=(0.5,), std=(0.1,)),
    "loader": lambda: DataLoader(Counted(), batch_size=8, shuffle=True),
    "workers": lambda: DataLoader(Counted(), batch_size=8, shuffle=True, num_workers=2, persistent_workers=True),
    "short last batch": lambda: DataLoader(Counted(ROWS - 4), batch_size=8, shuffle=True, drop_last=True),
    "with replacement": lambda: DataLoader(
        Counted(), batch_size=8, sampler=RandomSampler(range(ROWS), replacement=True)
    ),
    "own batches": lambda: DataLoader(Counted(), batch_sampler=Pairs()),
}


class Pairs(BatchSampler):
    """Batches of rows that belong together, as of equal lengths."""

    def __init__(self):
        super().__init__(SequentialSampler(range(ROWS)), 8, drop_last=False)


@pytest.mark.parametrize("name", SOURCES)
def test_the_expected_gradient_is_that_of_all_rows(name):
    epochs = 60 if name == "workers" else 300
    torch.manual_seed(0)
    dense, _ = mean_step(Double(), SOURCES[name](), "dense", epochs)
    torch.manual_seed(0)
    pruned, log = mean_step(Double(), SOURCES[name](), None, epochs)
    assert 0.6 < int(log.rows_trained) / log.rows_seen < 0.85
    error = (pruned - dense).norm() / dense.norm()
    assert error < 0.06  # of a third and more where the weights or the divisor are wrong


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = linear(6)[1]

    def forward(self, inputs):
        return self.layer(inputs)


@pytest.mark.parametrize(
    "options", [{"granularity": "token"}, {"scorer": "self"}, {"scorer": "self", "policy": "infobatch"}]
)
def test_the_expected_gradient_of_tokens_and_of_scored_rows(options):
    generator = torch.Generator().manual_seed(0)
    shape = (48, 5) if "granularity" in options else (48,)
    inputs = torch.randn(*shape, 6, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, CLASSES, shape, generator=generator)
    if "granularity" in options:
        targets[torch.rand(shape, generator=generator) < 0.4] = -100
    data = DataLoader(TensorDataset(inputs, targets), batch_size=16)
    granularity = {"granularity": options.get("granularity", "sample")}
    dense, _ = mean_step(Tagger(), data, "dense", 300, **granularity)
    policy = options.pop("policy", None)
    pruned, log = mean_step(Tagger(), data, policy, 300, **options)
    assert 0.5 < int(log.rows_trained) / int(log.rows_seen) < 0.9
    assert (pruned - dense).norm() / dense.norm() < 0.05


def test_the_first_pass_is_that_of_the_dense_run_bit_for_bit():
    found = []
    for policy in (None, "dense"):
        torch.manual_seed(3)
        model = linear()
        torch.manual_seed(4)
        loader = DataLoader(Counted(), batch_size=8, shuffle=True)
        SparseTrainer(model, policy=policy, dense_start=0.0).fit(loader, epochs=1)
        found.append(model.state_dict())
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_rows_left_out_are_not_read():
    data = Counted()
    log = SparseTrainer(linear(), dense_start=0, dense_end=0).fit(DataLoader(data, batch_size=8), epochs=12)
    assert log.rows_seen == 12 * ROWS
    assert sum(data.reads) - 8 <= int(log.rows_trained) <= sum(data.reads) < 0.9 * log.rows_seen
    assert min(data.reads) >= 1


def test_a_row_that_comes_twice_a_pass_is_drawn_for_twice():
    """Else what was learned of it the first time would decide on the second."""
    data = Counted()
    loader = DataLoader(data, batch_size=8, sampler=[*range(ROWS), *range(ROWS)])
    SparseTrainer(linear(), dense_start=0, dense_end=0).fit(loader, epochs=6)
    assert sum(reads % 2 for reads in data.reads) > 8  # at most a batch of rows is still to come


def test_rare_classes_are_not_drawn_more_than_others():
    """95:5, test alike: the loss is the user's, and so are the classes' shares."""
    generator = torch.Generator().manual_seed(0)
    targets = (torch.rand(4000, generator=generator) < 0.05).long()
    inputs = torch.randn(4000, 8, generator=generator) + 1.2 * targets[:, None] * (torch.arange(8) < 4)
    train = TensorDataset(inputs[:3000], targets[:3000])
    test = DataLoader(TensorDataset(inputs[3000:], targets[3000:]), batch_size=500)
    accuracy = {}
    for policy in (None, "dense"):
        found = []
        for seed in range(3):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
            trainer = SparseTrainer(model, policy=policy, lr=3e-3, seed=seed)
            log = trainer.fit(DataLoader(train, batch_size=50, shuffle=True), epochs=8)
            found.append(trainer.evaluate(test)["accuracy"])
            if policy is None:
                rare = log.selected[targets[:3000] == 1].float().mean() / log.selected.float().mean()
                assert 0.9 < rare < 2.0  # at most the inverse of what others keep: no row twice a pass
                assert int(log.selected.max()) <= 8
        accuracy[policy] = sum(found) / 3
    assert accuracy["dense"] > 0.95
    assert abs(accuracy[None] - accuracy["dense"]) < 0.01


@pytest.mark.parametrize(
    "sampler",
    [
        lambda: RandomSampler(range(ROWS), generator=torch.Generator().manual_seed(2)),
        lambda: WeightedRandomSampler([1.0] * 32 + [0.0] * 32, 40, generator=torch.Generator().manual_seed(2)),
        lambda: SubsetRandomSampler(range(0, ROWS, 2), generator=torch.Generator().manual_seed(2)),
        lambda: SequentialSampler(range(ROWS)),
    ],
    ids=["random", "weighted", "subset", "sequential"],
)
def test_the_order_is_the_users_samplers(sampler):
    read = []

    class Written(Counted):
        def __getitem__(self, row):
            read.append(row)
            return super().__getitem__(row)

    loader = DataLoader(Written(), batch_size=8, sampler=sampler())
    SparseTrainer(linear(), dense_start=0, dense_end=0).fit(loader, epochs=3)
    expected, own = [], sampler()
    for _ in range(3):
        expected += list(own)
    per_epoch = len(expected) // 3
    assert read[:per_epoch] == expected[:per_epoch]
    left = iter(expected)
    assert all(row in left for row in read)  # what is kept comes in the sampler's order
    assert len(read) < len(expected)


def test_the_loader_is_kept_as_it_is_and_its_settings_are_used():
    used = []

    def collate(items):
        used.append(len(items))
        return torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])

    loader = DataLoader(Counted(), batch_size=12, shuffle=True, drop_last=True, collate_fn=collate)
    before = dict(vars(loader))
    log = SparseTrainer(linear(), dense_start=0, dense_end=0).fit(loader, epochs=4)
    assert vars(loader) == before
    assert log.steps == 4 * 5
    assert log.rows_seen == 4 * 60
    assert set(used[2:]) == {12}  # but for the trial of the function: batches are filled


@pytest.mark.parametrize("policy", [None, "adaptive+deduplicate"])
def test_draws_follow_the_trainers_seed(policy):
    def kept(seed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(6, CLASSES))
        loader = ResidentLoader(images(), batch_size=8, mean=(0.5,), std=(0.1,))
        trainer = SparseTrainer(model, policy=policy, seed=seed, dense_start=0, dense_end=0)
        trainer.fit(loader, epochs=5)
        return trainer.model.state_dict()["1.weight"]

    assert torch.equal(kept(3), kept(3))
    assert not torch.equal(kept(3), kept(4))


# --- what cannot be numbered --------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(*table(), strict=True))

    def __len__(self):
        return ROWS


class Batched(Dataset):
    """Items that are batches."""

    def __len__(self):
        return 8

    def __getitem__(self, number):
        inputs, targets = table()
        return inputs[8 * number : 8 * number + 8], targets[8 * number : 8 * number + 8]


class Ahead(DataLoader):
    def __iter__(self):
        return iter(list(super().__iter__()))


def shortest_first(items):
    items = sorted(items, key=lambda item: float(item[0][0]))
    return torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])


def mixed(items):
    inputs, targets = torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])
    return 0.5 * inputs + 0.5 * inputs.roll(1, 0), F.one_hot(targets, CLASSES) * 0.5 + 0.5 * F.one_hot(
        targets, CLASSES
    ).roll(1, 0)


def twice(items):
    return torch.stack([x for x, _ in items] * 2), torch.stack([y for _, y in items] * 2)


UNNUMBERED = {
    "a list": (lambda: list(DataLoader(Counted(), batch_size=8)), "a list of batches has no rows"),
    "a generator": (lambda: iter(list(DataLoader(Counted(), batch_size=8))), "a list_iterator of batches"),
    "iterable": (lambda: DataLoader(Stream(), batch_size=8), "the rows of the IterableDataset Stream come in its own"),
    "batch_size=None": (lambda: DataLoader(Batched(), batch_size=None), "has batch_size=None"),
    "batches in batches": (
        lambda: DataLoader(Batched(), collate_fn=lambda items: items[0]),
        "another order",
    ),
    "own iteration": (lambda: Ahead(Counted(), batch_size=8), "Ahead iterates"),
    "sorted": (lambda: DataLoader(Counted(), batch_size=8, collate_fn=shortest_first), "another order"),
    "mixed": (lambda: DataLoader(Counted(), batch_size=8, collate_fn=mixed), "mixes rows"),
    "doubled": (lambda: DataLoader(Counted(), batch_size=8, collate_fn=twice), "makes 16 rows of 8"),
}


@pytest.mark.parametrize("name", UNNUMBERED)
def test_what_cannot_be_numbered_is_trained_on_whole_and_said(name):
    make, reason = UNNUMBERED[name]
    found, statuses = [], []
    for policy in (None, "dense"):
        model = linear()
        torch.manual_seed(5)
        trainer = SparseTrainer(model, policy=policy, lr=0.1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            log = trainer.fit(make(), steps=8, progress=statuses.append)
        texts = [str(one.message) for one in caught if "every row is trained on" in str(one.message)]
        if policy is None:
            (text,) = texts
            assert reason in text
            assert [one.filename for one in caught if str(one.message) == text] == [__file__]
            assert reason in log.warnings[0]
            assert reason in statuses[0].notes[0]
        else:
            assert texts == []
        assert log.rows_trained == log.rows_seen
        found.append(model.state_dict())
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("policy", ["infobatch", "importance", "adaptive+deduplicate"])
def test_a_policy_that_was_asked_for_refuses_what_it_cannot_do(policy):
    with pytest.raises(UserError, match=r"asks for rows by their number, and the rows of the IterableDataset Stream"):
        SparseTrainer(linear(), policy=policy).fit(DataLoader(Stream(), batch_size=8), steps=3)


def test_a_collate_function_that_leaves_rows_out_ends_the_pruning():
    def without_broken(items):
        items = [item for item in items if float(item[0][0]) != broken]
        return torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])

    broken = float(table()[0][5, 0])
    trainer = SparseTrainer(linear(), dense_start=0, dense_end=0)
    with pytest.warns(UserWarning, match=r"every row is trained on from now on, because .* made 7 rows of 8"):
        log = trainer.fit(DataLoader(Counted(), batch_size=8, collate_fn=without_broken), epochs=3)
    assert log.rows_trained == log.rows_seen < 3 * ROWS


def test_rows_that_a_sampler_does_not_number_are_refused():
    loader = DataLoader(Counted(), batch_size=8, sampler=[-1] * 32)
    with pytest.raises(UserError, match=r"sampler must give row numbers from 0 to 63, got -1; use policy=.dense"):
        SparseTrainer(linear()).fit(loader, steps=3)


# --- what is said -------------------------------------------------------------------------------


def test_pruning_is_announced_once(caplog):
    seen = []
    with caplog.at_level(logging.WARNING, logger="sparse_training"):
        trainer = SparseTrainer(linear(), dense_start=0, dense_end=0)
        log = trainer.fit(DataLoader(Counted(), batch_size=8), epochs=6, progress=seen.append)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith("infobatch: from now on rows whose last loss is below the mean are left out")
    assert tuple(log.notes) == seen[-1].notes == tuple(said)
    assert seen[7].notes == ()  # in the first pass
    assert log.to_dict()["notes"] == said


def test_every_switch_is_announced(caplog):
    data = load_data("digits").train
    images = data.images.clone()
    images[1::2][:300] = images[0::2][:300]  # copies
    labels = data.labels.clone()
    wrong = torch.rand(len(labels), generator=torch.Generator().manual_seed(0)) < 0.3
    labels[wrong] = (labels[wrong] + 1 + torch.arange(int(wrong.sum())) % 9) % 10
    loader = ResidentLoader(Split(images, labels), batch_size=64, std=(0.3,))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    trainer = SparseTrainer(model, policy="adaptive+denoise+deduplicate+balance", lr=1e-2)
    with caplog.at_level(logging.WARNING, logger="sparse_training"):
        log = trainer.fit(loader, epochs=10)
    assert [note.partition(":")[0] for note in log.notes] == ["deduplicate", "denoise", "balance"]
    assert [record.getMessage() for record in caplog.records][:3] == log.notes
