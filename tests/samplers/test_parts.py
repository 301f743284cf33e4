"""Small parts of the samplers that mutation testing found untested."""

import pytest
import torch
from torch.utils.data import Dataset

from sparse_training.errors import UserError
from sparse_training.samplers import batch_sampler, infobatch
from sparse_training.samplers.adaptive_weights import SamplingWeights
from sparse_training.samplers.batch_sampler import HistorySampler
from sparse_training.samplers.indexed import Indexed
from sparse_training.samplers.infobatch import InfoBatch
from sparse_training.samplers.score_table import ScoreTable
from sparse_training.samplers.shuffle import Shuffle
from sparse_training.samplers.systematic import draw_systematic
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


def told(weights, probabilities, predicted=None):
    """Weights told a probability for each row's label, the rest of it on the class ``predicted``."""
    rows = torch.arange(weights.rows)
    p = torch.tensor(probabilities)
    logits = torch.full((weights.rows, weights.classes), 1e-9)
    other = (weights.targets.long() + 1) % weights.classes if predicted is None else torch.tensor(predicted)
    logits[rows, other] = 1.0 - p
    logits[rows, weights.targets.long()] = p
    weights.update(rows, -p.log(), logits.log())
    return weights


def test_a_doubted_row_weighs_the_probability_that_its_label_is_right():
    targets = torch.arange(12) % 3
    q = [0.9] * 9 + [0.3, 0.25, 0.2]
    weights = told(SamplingWeights(12, targets, denoise=True), q)
    weights.noise = 0.3  # as a pass would have estimated it
    r = 0.3 / 2
    clean = [(1 - 0.3) * (p - r) / (p * (1 - 0.3 - r)) for p in q[9:]]
    assert all(0.1 < part < 1.0 for part in clean)
    expected = torch.tensor([[1.0] * 3 + [part] for part in clean]).T.reshape(-1)
    expected = expected.view(4, 3) / expected.view(4, 3).sum(0)  # no class loses by it
    torch.testing.assert_close(weights.weights(), 4.0 * expected.reshape(-1))


def test_as_many_rows_as_pairs_of_classes_suffice_for_an_estimate():
    targets = torch.arange(3).repeat_interleave(3)
    weights = SamplingWeights(9, targets, denoise=True)
    told(weights, [0.1] * 9, predicted=[1, 1, 2, 0, 0, 2, 0, 0, 1])
    assert weights.estimate_noise() > 0.3


def test_the_smallest_data_set_and_the_range_of_an_argument():
    assert SamplingWeights(1).draw(3, 0.0).tolist() == [0, 0, 0]
    assert ScoreTable(1).rows == 1
    with pytest.raises(UserError, match=r"`learned` must be in \(0, 1\], got 1.5"):
        SamplingWeights(4, learned=1.5)


def test_passes_are_counted_from_none():
    weights = SamplingWeights(4)
    assert weights.passes == 0
    weights.draw(5, 0.0)
    assert weights.passes == 2


@pytest.mark.parametrize(("logits", "shown"), [(torch.zeros(4), r"\[4\]"), ({}, "dict")])
def test_denoise_says_what_it_got_in_place_of_class_logits(logits, shown):
    weights = SamplingWeights(12, torch.arange(12) % 3, denoise=True)
    with pytest.raises(UserError, match=shown):
        weights.update(torch.arange(4), torch.ones(4), logits)


def test_scores_that_are_not_finite_are_counted_over_all_updates():
    table = ScoreTable(4)
    table.update(torch.tensor([0, 1]), torch.tensor([torch.nan, 1.0]))
    table.update(torch.tensor([2, 3]), torch.tensor([torch.inf, 1.0]))
    assert table.invalid == 2


def test_infobatch_says_how_it_prunes():
    table = ScoreTable(64)
    table.update(torch.arange(64), torch.arange(64.0))
    sampler = InfoBatch(table, prune=0.75)
    sampler.prune(torch.arange(64), 0)
    assert sampler.take_news() == [
        "infobatch: from now on rows whose last loss is below the mean are left out with probability 0.75, and "
        "otherwise weigh 4; the expected gradient stays that of all rows"
    ]
    assert sampler.take_news() == []


def test_the_keys_of_a_shuffle_are_of_32_bits():
    keys = Shuffle(100, 0, 0).keys
    assert 2**24 < max(keys) < 2**32


def test_a_state_of_adaptive_from_before_its_switches_goes_on():
    def made():
        return HistorySampler(12, 4, method="adaptive", denoise=True, targets=torch.arange(12) % 3)

    state = made().state_dict()
    state["settings"]["law"] = "adaptive"
    made().load_state_dict(state)
    state["settings"]["law"] = "infobatch"
    with pytest.raises(UserError, match=r"method infobatch is now adaptive\+denoise"):
        made().load_state_dict(state)


def test_targets_that_no_switch_needs_are_refused_by_name():
    with pytest.raises(UserError, match="`targets` needs denoise or balance switched on, got deduplicate"):
        HistorySampler(
            4, 2, method="adaptive", deduplicate=True, duplicate_counts=[1] * 4, targets=torch.zeros(4).long()
        )


def test_data_without_a_length_are_named():
    with pytest.raises(UserError, match=r"^generator has no length or no rows by number"):
        HistorySampler((row for row in range(3)), 2)


def test_a_systematic_draw_takes_the_rows_in_which_a_whole_number_lies():
    index, weight = draw_systematic(torch.full((4,), 0.5), 0.25)
    assert index.tolist() == [1, 3]
    assert weight.tolist() == [2.0, 2.0]


def test_the_order_of_an_epoch_is_what_saved_positions_in_it_mean():
    assert Shuffle(10, 3, 0).peek().tolist() == [0, 3, 4, 8, 1, 2, 6, 9, 7, 5]
    assert sorted(Shuffle(10, 3, 1).peek().tolist()) == list(range(10))


def test_batches_are_counted_over_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(batch_sampler, "_BLOCK", 16)
    sampler = HistorySampler(100, 8, method="infobatch")
    sampler.update(torch.arange(100), torch.cat([torch.full((50,), 0.1), torch.full((50,), 9.0)]))
    assert len(sampler) == len(list(sampler)) < 13


def test_the_draws_by_score_are_numbered_upwards():
    sampler = HistorySampler(8, 4)
    for _ in range(2):
        for index in sampler:
            sampler.update(torch.tensor(index), torch.ones(len(index)))
    assert sampler.state_dict()["law"]["step"] == 2
