"""Loaders: what they yield, what they touch, and that they go on where they stopped."""

from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sparse_training.data.resident import ResidentLoader
from sparse_training.data.stream import StreamLoader
from sparse_training.errors import UserError
from sparse_training.selection.types import WeightedIndices


def split(rows=10, channels=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (rows, channels, 4, 4), dtype=torch.uint8, generator=generator)
    return SimpleNamespace(images=images, labels=torch.arange(rows))


def resident(rows=10, batch_size=4, **options):
    return ResidentLoader(split(rows), batch_size=batch_size, **options)


def test_an_epoch_holds_every_row_once_in_an_order_of_its_own():
    loader = resident(seed=3)
    first, second = ([item.tolist() for item in loader] for _ in range(2))
    assert [len(item) for item in first] == [4, 4, 2]
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(10))
    assert first != second
    again = resident(seed=3)
    assert [item.tolist() for item in again] == first
    assert [item.tolist() for item in resident(seed=4)] != first


def test_drop_last_leaves_out_the_short_batch():
    loader = resident(drop_last=True)
    assert len(loader) == 2
    assert [len(item) for item in loader] == [4, 4]


def test_images_are_normalised_and_labels_belong_to_them():
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    data = split()
    loader = ResidentLoader(data, batch_size=4, mean=mean, std=std)
    index = torch.tensor([7, 0, 3])
    images, labels = loader.fetch(index)
    channel = (1, 3, 1, 1)
    expected = data.images[index].double() / 255
    expected = (expected - torch.tensor(mean).double().reshape(channel)) / torch.tensor(std).double().reshape(channel)
    torch.testing.assert_close(images, expected.float(), rtol=1e-5, atol=1e-6)
    assert images.dtype == torch.float32
    assert labels.tolist() == [7, 0, 3]


def test_rows_not_chosen_are_never_loaded(monkeypatch):
    loader = resident()
    loaded = []
    fetch = loader.fetch
    monkeypatch.setattr(loader, "fetch", lambda index: loaded.append(index.tolist()) or fetch(index))
    batch = loader.load(torch.tensor([5, 6, 7, 8]), WeightedIndices(torch.tensor([8, 6])))
    assert loaded == [[8, 6]]
    assert batch.targets.tolist() == batch.ids.tolist() == [8, 6]
    assert (batch.rows, batch.offered) == (2, 4)


@pytest.mark.parametrize("stop", range(7))
def test_resident_goes_on_where_it_stopped(stop):
    def endless(loader):
        while True:
            yield from loader

    loader = resident(seed=1)
    items = endless(loader)
    for _ in range(stop):
        next(items)
    other = resident(seed=1)
    other.load_state_dict(loader.state_dict())
    resumed = endless(other)
    for _ in range(5):
        assert torch.equal(next(items), next(resumed))


def test_probe_gives_full_and_short_batches_and_leaves_the_position():
    loader = resident()
    next(iter(loader))
    before = loader.state_dict()
    items = loader.probe()
    assert [len(next(items)) for _ in range(4)] == [4, 2, 4, 2]
    assert loader.state_dict() == before


@pytest.mark.parametrize("batch_size", [0, -1, 11])
def test_batch_size_must_fit_the_data(batch_size):
    with pytest.raises(UserError, match=rf"`batch_size` must be 1 to 10, the rows of the data set, got {batch_size}"):
        resident(batch_size=batch_size)


# --- streams ------------------------------------------------------------------------------------


def dataloader(**options):
    return DataLoader(TensorDataset(torch.arange(10.0)[:, None], torch.arange(10)), batch_size=4, **options)


def test_batches_may_be_pairs_tuples_mappings_or_anything_with_extractors():
    x, y, z = torch.ones(2, 1), torch.tensor([1, 2]), torch.zeros(2)
    assert StreamLoader([]).load((x, y)).inputs is x
    assert StreamLoader([]).load([x, z, y]).inputs == (x, z)
    batch = StreamLoader([]).load({"x": x, "labels": y})
    assert list(batch.inputs) == ["x"]
    assert batch.targets is y
    odd = SimpleNamespace(x=x, y=y)
    batch = StreamLoader([], inputs=lambda b: b.x, targets=lambda b: b.y).load(odd)
    assert batch.inputs is x
    with pytest.raises(UserError, match="must have one of the keys labels"):
        StreamLoader([]).load({"x": x})
    with pytest.raises(UserError, match="SimpleNamespace"):
        StreamLoader([]).load(odd)


def test_a_stream_chooses_after_loading():
    batch = StreamLoader([]).load((torch.arange(4.0), torch.arange(4)), WeightedIndices(torch.tensor([2, 0])))
    assert batch.inputs.tolist() == [2.0, 0.0]
    assert (batch.rows, batch.offered) == (2, 4)


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_a_shuffled_dataloader_goes_on_where_it_stopped(stop):
    torch.manual_seed(0)
    loader = StreamLoader(dataloader(shuffle=True))

    def take(count, loader, items):
        return [next(items)[1].tolist() for _ in range(count)]

    def endless(loader):
        while True:
            yield from loader

    items = endless(loader)
    take(stop, loader, items)
    state, rng = loader.state_dict(), torch.get_rng_state()
    expected = take(5, loader, items)

    torch.manual_seed(99)
    other = StreamLoader(dataloader(shuffle=True))
    other.load_state_dict(state)
    torch.set_rng_state(rng)
    assert take(5, other, endless(other)) == expected


def test_the_sampler_is_told_the_epoch():
    told = []
    source = dataloader()
    source.sampler.set_epoch = told.append
    loader = StreamLoader(source)
    for _ in range(3):
        list(loader)
    assert told == [0, 1, 2]


def test_data_without_a_batch_is_refused():
    loader = StreamLoader(iter([]))
    with pytest.raises(UserError, match="no batch"):
        list(loader)


def test_a_one_shot_iterator_cannot_be_probed():
    with pytest.raises(UserError, match="one-shot"):
        next(StreamLoader(iter([1])).probe())
