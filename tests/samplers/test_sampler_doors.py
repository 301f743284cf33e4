"""What a newcomer gives HistorySampler, Indexed and ResidentLoader: served right, or refused in one line."""

import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sparse_training import HistorySampler, Indexed, ResidentLoader, UserError, load_data

ROWS = 32


def sampler(**options):
    return HistorySampler(**{"dataset": ROWS, "batch_size": 8, **options})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 2.5}, "`batch_size` must be a whole number, at least 1, got 2.5"),
        ({"batch_size": "8"}, "`batch_size` must be a whole number"),
        ({"seed": "a"}, "`seed` must be an integer"),
        ({"rate": "0.5"}, "`rate` must be in (0, 1], got '0.5'"),
        ({"method": "infobatch", "epochs": 2.5}, "`epochs` must be a whole number"),
        ({"method": "infobatch", "delta": 2.0}, "`delta` must be in [0, 1]"),
        ({"method": "infobatch", "rate": 0.5}, "`rate` is of the method importance or adaptive, got 0.5"),
        ({"method": "infobatch", "uniform": 0.5}, "`uniform` is of the method importance"),
        ({"prune": 0.2}, "`prune` is of the method infobatch"),
        ({"delta": 0.5}, "`delta` is of the method infobatch"),
        ({"method": "adaptive", "denoise": True, "targets": ["cat"] * ROWS}, "`targets` must be numbers"),
        ({"method": "adaptive", "deduplicate": True, "duplicate_counts": [0] * ROWS}, "at least 1, got 0"),
    ],
)
def test_settings_of_a_sampler(options, said):
    with pytest.raises(UserError, match=re.escape(said)):
        sampler(**options)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_row_numbers_and_losses_of_any_kind(kind):
    drawn, twin = sampler(rate=0.5), sampler(rate=0.5)
    for batch, same in zip(drawn, twin, strict=True):
        losses = torch.rand(len(batch))
        assert torch.equal(drawn.weights(kind(batch)), twin.weights(torch.tensor(same)))
        drawn.update(kind(batch), losses.tolist() if kind is list else losses)
        twin.update(torch.tensor(same), losses)
    assert torch.equal(drawn.table.scores.nan_to_num(-1.0), twin.table.scores.nan_to_num(-1.0))


@pytest.mark.parametrize("index", [torch.rand(8), torch.zeros(8, 1, dtype=torch.int64), None, torch.zeros(8) > 0])
def test_row_numbers_that_are_none(index):
    """As of a loader whose data set is not Indexed."""
    for call in (lambda drawn: drawn.update(index, torch.rand(8)), lambda drawn: drawn.weights(index)):
        with pytest.raises(UserError, match="`index` must be row numbers, int64"):
            call(sampler())


def test_a_batch_sampler_in_the_place_of_a_sampler():
    dataset = TensorDataset(torch.rand(ROWS, 2))
    with pytest.raises(UserError, match="as `batch_sampler`"):
        next(iter(DataLoader(Indexed(dataset), sampler=sampler())))


def test_a_state_of_something_else():
    with pytest.raises(UserError, match="one of a HistorySampler's state_dict"):
        sampler().load_state_dict({"epoch": 1})


@pytest.mark.parametrize("method", ["importance", "infobatch", "adaptive"])
@pytest.mark.parametrize("default", ["float64", "meta"])
def test_tables_are_on_the_cpu_in_float32_whatever_the_default_is(method, default):
    def drawn():
        generator = torch.Generator().manual_seed(3)
        losses = torch.rand(ROWS, generator=generator, dtype=torch.float32, device="cpu")
        labels = torch.arange(ROWS, device="cpu") % 3
        options = {"denoise": True, "targets": labels} if method == "adaptive" else {}
        history, batches = sampler(method=method, seed=5, **options), []
        for _ in range(2):
            for batch in history:
                logits = torch.zeros(len(batch), 3, device="cpu", dtype=torch.float32)
                history.update(torch.tensor(batch, device="cpu"), losses[batch], logits)
                batches.append(batch)
        return batches

    expected = drawn()
    try:
        torch.set_default_dtype(torch.float64) if default == "float64" else torch.set_default_device("meta")
        assert drawn() == expected
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"split": TensorDataset(torch.rand(ROWS, 2))}, "`split` must have tensors `images` and `labels`"),
        ({"batch_size": 1.5}, "`batch_size` must be an integer"),
        ({"seed": "a"}, "`seed` must be an integer"),
        ({"mean": (0.1, 0.2, 0.3)}, "`mean` must have one value, or one for each of 1 channels"),
        ({"std": (0.0,)}, "`std` must be above 0"),
        ({"std": 0.5}, "`std` must have one value"),
        ({"device": "gpu"}, "device 'gpu' cannot be used"),
    ],
)
def test_arguments_of_a_resident_loader(options, said):
    with pytest.raises(UserError, match=re.escape(said)):
        ResidentLoader(**{"split": load_data("digits").train, "batch_size": 8, **options})
