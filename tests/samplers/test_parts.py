"""Small parts of the samplers that mutation testing found untested."""

import pytest
import torch
from torch.utils.data import Dataset

from sparse_training.samplers import infobatch
from sparse_training.samplers.indexed import Indexed
from sparse_training.selection.types import WeightedIndices


class Batches(Dataset):
    """Fetches whole batches, and loses rows of them on demand."""

    def __init__(self, lost=0):
        self.lost = lost

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return 10 * index

    def __getitems__(self, indices):
        return [10 * index for index in indices][: len(indices) - self.lost]


def test_items_fetched_together_come_with_their_numbers_and_none_is_lost_in_silence():
    assert Indexed(Batches()).__getitems__([3, 1]) == [(3, 30), (1, 10)]
    with pytest.raises(ValueError, match="shorter"):
        Indexed(Batches(lost=1)).__getitems__([3, 1])


def kept(count, weight=1.0):
    return WeightedIndices(torch.arange(count), torch.full((count,), weight))


@pytest.mark.parametrize(("counts", "sizes"), [((10, 12), (8, 8)), ((6, 11), (8, 8))])
def test_the_batch_of_two_processes_is_divided_by_that_of_whole_ones(monkeypatch, counts, sizes):
    numbers = iter([torch.tensor(list(counts)), torch.tensor(list(sizes))])
    monkeypatch.setattr(infobatch, "gather_numbers", lambda *own: torch.stack([next(numbers), next(numbers)], 1))
    batch, waiting = infobatch.common_batch(infobatch.no_rows(), kept(counts[0]), sizes[0])
    assert batch.index.tolist() == list(range(counts[0]))
    assert batch.weight.tolist() == pytest.approx([sum(counts) / sum(sizes)] * counts[0])
    assert len(waiting.index) == 0


@pytest.mark.parametrize("counts", [(10, 0), (7, 8)])
def test_two_processes_wait_until_both_have_rows_and_enough_of_them(monkeypatch, counts):
    numbers = iter([torch.tensor(list(counts)), torch.tensor([8, 8])])
    monkeypatch.setattr(infobatch, "gather_numbers", lambda *own: torch.stack([next(numbers), next(numbers)], 1))
    batch, waiting = infobatch.common_batch(infobatch.no_rows(), kept(counts[0], 2.0), 8)
    assert len(batch.index) == 0
    assert waiting.index.tolist() == list(range(counts[0]))
    assert waiting.weight.tolist() == [2.0] * counts[0]
