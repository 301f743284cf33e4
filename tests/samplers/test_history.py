"""The table of past scores and the draws by it: unbiased, as published, and exact from a saved state."""

import pytest
import torch

from sparse_kernels.backends import cpp as cpp_backend
from sparse_training.errors import UserError
from sparse_training.samplers.importance import Importance
from sparse_training.samplers.infobatch import InfoBatch, no_rows, whole_batch
from sparse_training.samplers.score_table import ScoreTable
from sparse_training.samplers.shuffle import Shuffle
from sparse_training.selection.types import WeightedIndices

ROWS = 500


def scores(rows=ROWS, seed=0):
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed)) ** 4


def full_table(rows=ROWS, **options):
    table = ScoreTable(rows, **options)
    table.update(torch.arange(rows), scores(rows))
    return table


def after_the_first_pass(table, **options):
    sampler = Importance(table, **options)
    sampler.first.position = table.rows
    return sampler


# --- the table ----------------------------------------------------------------------------------


def test_the_last_score_of_a_row_counts():
    table = ScoreTable(5)
    assert (table.seen, table.mean) == (0, 0.0)
    table.update(torch.tensor([3, 1, 3]), torch.tensor([5.0, 1.0, 2.0]))
    table.update(torch.tensor([1]), torch.tensor([4.0], dtype=torch.bfloat16))
    assert torch.equal(table.scores.nan_to_num(-1.0), torch.tensor([-1.0, 4.0, -1.0, 2.0, -1.0]))
    assert (table.seen, table.mean, table.total) == (2, 3.0, 6.0)


def test_scores_that_are_not_finite_are_counted_and_left_out():
    table = ScoreTable(4)
    table.update(torch.tensor([0, 1]), torch.tensor([1.0, 2.0]))
    table.update(torch.tensor([0, 1, 2, 3]), torch.tensor([torch.nan, torch.inf, -torch.inf, -3.0]))
    assert table.scores[[0, 1, 3]].tolist() == [1.0, 2.0, 0.0]  # a negative one is 0
    assert (table.invalid, table.seen) == (2, 4)  # -inf is negative, and so 0


def test_ageing_moves_scores_to_the_mean_and_keeps_it():
    table = full_table()
    mean, before = table.mean, table.scores.clone()
    table.age(0.25)
    torch.testing.assert_close(table.scores, mean + 0.25 * (before - mean))
    assert table.mean == pytest.approx(mean, rel=1e-6)
    assert table.find(torch.tensor([0.999999], dtype=torch.float64)).item() == ROWS - 1


def test_a_signed_table_keeps_negative_scores():
    table = ScoreTable(4, signed=True)
    table.update(torch.tensor([0, 1, 2]), torch.tensor([-2.0, 3.0, -torch.inf]))
    assert table.scores.nan_to_num(9.0).tolist() == [-2.0, 3.0, 9.0, 9.0]
    assert (table.seen, table.invalid) == (2, 1)


@pytest.mark.parametrize(
    ("index", "values", "error", "words"),
    [
        ([0, 5], [1.0, 1.0], IndexError, "must be in 0 to 4, got 0 to 5"),
        ([-1], [1.0], IndexError, "got -1"),
        ([0, 1], [1.0], UserError, "1 scores for 2 rows"),
        ([0.0, 1.0], [1.0, 1.0], UserError, "`index` must be row numbers, int64 or int32, got torch.float32"),
        ([True, False], [1.0, 1.0], UserError, "got torch.bool"),
        ([0, 1], [1j, 1.0], UserError, "`scores` must be real numbers, got torch.complex64"),
    ],
)
def test_what_does_not_fit_the_table_is_refused_and_leaves_it(index, values, error, words):
    table = ScoreTable(5)
    with pytest.raises(error, match=words):
        table.update(torch.tensor(index), torch.tensor(values))
    assert (table.seen, table.total) == (0, 0.0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ScoreTable("5"), "`rows` must be an integer of at least 1, got '5'"),
        (lambda: InfoBatch(ScoreTable(3), prune="0.5"), r"`prune` must be in \[0, 1\), got '0.5'"),
        (lambda: ScoreTable(0), "`rows` must be an integer of at least 1, got 0"),
        (lambda: Importance(ScoreTable(3), uniform=0.0), r"`uniform` must be in \(0, 1\], got 0.0"),
        (lambda: Importance(ScoreTable(3), uniform=1.5), r"`uniform` must be in \(0, 1\], got 1.5"),
        (lambda: InfoBatch(ScoreTable(3), prune=1.0), r"`prune` must be in \[0, 1\), got 1.0"),
        (lambda: ScoreTable(3).age(2.0), r"`keep` must be in \[0, 1\], got 2.0"),
        (lambda: ScoreTable(3).load_state_dict(ScoreTable(4).state_dict()), "of a table of 3 rows, got 4"),
    ],
)
def test_settings_out_of_range_are_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


# --- importance ---------------------------------------------------------------------------------


def test_every_row_is_drawn_once_before_any_is_twice():
    table = ScoreTable(ROWS)
    table.update(torch.arange(0, ROWS, 3), torch.ones(len(range(0, ROWS, 3))))  # a warm-up saw these
    sampler, first = Importance(table, seed=4), []
    unseen = ROWS - table.seen
    for _ in range(unseen // 32 + 1):
        drawn = sampler.draw(32)
        table.update(drawn.index, torch.ones(32))
        first.append(drawn)
    index, weight = (torch.cat(parts)[:unseen] for parts in zip(*first, strict=True))
    assert sorted(index.tolist()) == [row for row in range(ROWS) if row % 3]
    assert (weight == 1.0).all()
    assert not torch.equal(index, index.sort().values)
    assert table.seen == ROWS


@pytest.mark.parametrize("uniform", [0.1, 0.5, 1.0])
def test_rows_are_drawn_as_often_as_their_probability_says(uniform):
    table = full_table()
    sampler, draws, batches = after_the_first_pass(table, uniform=uniform), 256, 500
    counts = torch.zeros(ROWS)
    for _ in range(batches):
        counts += torch.bincount(sampler.draw(draws).index, minlength=ROWS)
    probability = (1 - uniform) * scores() / scores().sum() + uniform / ROWS
    expected = draws * batches * probability
    # Stratified draws vary less than independent ones, whose deviation is sqrt(expected).
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all()
    torch.testing.assert_close(sampler.weight(torch.arange(ROWS)), 1 / (ROWS * probability))
    assert sampler.weight(torch.arange(ROWS)).max() <= 1 / uniform + 1e-5


def test_the_weighted_mean_of_a_batch_is_unbiased_and_varies_less_than_a_uniform_one():
    table = full_table()
    value = scores() + 0.05 * scores(seed=1)  # what is estimated: nearly what the score says
    sampler = after_the_first_pass(table, uniform=0.1)
    drawn = [sampler.draw(32) for _ in range(1000)]
    means = torch.stack([(weight * value[index]).mean() for index, weight in drawn]).double()
    error = means.std() / len(means) ** 0.5
    assert abs(means.mean() - value.mean()) < 4 * error
    assert error < 0.01 * value.mean()
    uniform = torch.stack([value[torch.randperm(ROWS)[:32]].mean() for _ in range(1000)])
    assert means.std() < 0.5 * uniform.std()


def test_the_weights_are_what_makes_it_unbiased():
    """Without them the mean is off by far more than its error: what the test above would miss."""
    sampler = after_the_first_pass(full_table())
    means = torch.stack([scores()[sampler.draw(32).index].mean() for _ in range(200)])
    assert means.mean() > 1.5 * scores().mean()


def test_draws_hang_on_seed_step_and_slot_alone():
    sampler, same, other = (after_the_first_pass(full_table(), seed=seed) for seed in (1, 1, 2))
    torch.manual_seed(5)
    first, second = sampler.draw(64), sampler.draw(64)
    torch.manual_seed(6)
    torch.rand(3)
    assert torch.equal(same.draw(64).index, first.index)
    assert torch.equal(same.draw(64).index, second.index)
    assert not torch.equal(first.index, second.index)
    assert not torch.equal(other.draw(64).index, first.index)


@pytest.mark.skipif(cpp_backend.unavailable_reason() is not None, reason="no C++")
def test_draws_are_the_same_without_cpp_and_on_any_number_of_threads():
    samplers = [after_the_first_pass(full_table(200_000, cpp=cpp), seed=3) for cpp in (False, True)]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            expected, found = (sampler.draw(20_000) for sampler in samplers)
            assert torch.equal(found.index, expected.index)
            assert torch.equal(found.weight, expected.weight)
            for sampler in samplers:
                sampler.table.update(expected.index, expected.weight)
    finally:
        torch.set_num_threads(threads)


def test_a_table_of_zeros_is_drawn_from_uniformly():
    table = ScoreTable(ROWS)
    table.update(torch.arange(ROWS), torch.zeros(ROWS))
    drawn = after_the_first_pass(table).draw(ROWS)
    assert (drawn.weight == 1.0).all()
    assert len(drawn.index.unique()) > 0.9 * ROWS  # stratified: one in each row's part


@pytest.mark.parametrize("stop", [1, 7, 15, 16, 40])  # within the first pass, at its end, after it
def test_draws_go_on_from_their_state_bit_for_bit(stop):
    def step(sampler):
        drawn = sampler.draw(33)
        sampler.table.update(drawn.index, scores()[drawn.index] / (1 + sampler.step))
        return drawn

    sampler = Importance(ScoreTable(ROWS), seed=1)
    for _ in range(stop):
        step(sampler)
    table = ScoreTable(ROWS)
    table.load_state_dict(sampler.table.state_dict())
    other = Importance(table, seed=1)
    other.load_state_dict(sampler.state_dict())
    for _ in range(20):
        expected, found = step(sampler), step(other)
        assert torch.equal(found.index, expected.index)
        assert torch.equal(found.weight, expected.weight)
    assert (table.seen, table.total) == (sampler.table.seen, sampler.table.total)


# --- InfoBatch ----------------------------------------------------------------------------------


def test_infobatch_drops_half_of_the_rows_below_the_mean_and_doubles_the_rest_of_them():
    table = full_table(20_000)
    index, weight = InfoBatch(table, seed=2).prune(torch.arange(20_000), 0)
    below = table.scores < table.scores.mean()
    kept = torch.zeros(20_000, dtype=torch.bool)
    kept[index] = True
    assert kept[~below].all()
    rows = int(below.sum())
    assert int(kept[below].sum()) == pytest.approx(rows / 2, abs=4 * (rows / 4) ** 0.5)
    assert torch.equal(weight, torch.where(below[index], 2.0, 1.0))


def test_infobatch_is_unbiased_over_epochs():
    table = full_table()
    sampler = InfoBatch(table, prune=0.3)
    epochs = [sampler.prune(torch.arange(ROWS), epoch) for epoch in range(400)]
    sums = torch.stack([(weight * table.scores[index]).sum() for index, weight in epochs]).double()
    assert abs(sums.mean() - table.total) < 4 * sums.std() / len(sums) ** 0.5
    assert sums.std() > 0.0


def test_infobatch_keeps_rows_without_a_score_and_its_threshold_for_an_epoch():
    table = ScoreTable(ROWS)
    sampler = InfoBatch(table)
    assert len(sampler.prune(torch.arange(ROWS), 0).index) == ROWS
    table.update(torch.arange(ROWS), scores())
    assert len(sampler.prune(torch.arange(ROWS), 0).index) == ROWS  # the epoch began without scores
    kept = sampler.prune(torch.arange(ROWS), 1)
    assert len(kept.index) < ROWS
    table.update(torch.arange(250), torch.full((250,), 9.0))  # the mean rises above every other score
    later = torch.arange(250, ROWS)
    assert torch.equal(sampler.prune(later, 1).index, kept.index[kept.index >= 250])
    other = InfoBatch(table)
    other.load_state_dict(sampler.state_dict())
    assert torch.equal(other.prune(later, 1).index, sampler.prune(later, 1).index)
    assert set(sampler.prune(later, 1).weight.tolist()) == {1.0, 2.0}
    assert set(sampler.prune(later, 2).weight.tolist()) == {2.0}


def test_whole_batches_are_filled_in_order():
    batch, waiting, found = no_rows(), no_rows(), []
    for rows in torch.arange(20).split([3, 6, 0, 9, 2]):
        batch, waiting = whole_batch(waiting, WeightedIndices(rows, rows.float()), 6)
        found.append(batch.index.tolist())
    assert found == [[], [0, 1, 2, 3, 4, 5], [], [6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17]]
    assert waiting.index.tolist() == waiting.weights().tolist() == [18, 19]


# --- order --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 10, 63, 64, 65, 1000, 40_001])
def test_a_shuffle_holds_every_row_once(rows):
    order = Shuffle(rows, seed=1)
    found = []
    while len(part := order.peek()):
        found.append(part[:300])
        order.position += len(found[-1])
    found = torch.cat(found)
    assert torch.equal(found.sort().values, torch.arange(rows))
    assert torch.equal(order.at(torch.arange(rows)), found)
    if rows >= 63:
        assert not torch.equal(Shuffle(rows, seed=1, epoch=1).at(torch.arange(rows)), found)
        assert not torch.equal(Shuffle(rows, seed=2).at(torch.arange(rows)), found)


def test_a_shuffle_puts_any_row_anywhere_and_neighbours_apart():
    rows, orders = 40, 1000
    found = torch.stack([Shuffle(rows, seed=seed).at(torch.arange(rows)) for seed in range(orders)])
    expected = orders / rows
    for place in (0, 1, 17, 39):  # each row about as often at each place
        counts = torch.bincount(found[:, place], minlength=rows)
        chi_squared = float(((counts - expected) ** 2 / expected).sum())
        assert chi_squared < 85  # 39 degrees of freedom: passed once in 20,000
    pairs = torch.bincount((found[:, 1] - found[:, 0]) % rows, minlength=rows)[1:]
    assert float(((pairs - orders / (rows - 1)) ** 2 / (orders / (rows - 1))).sum()) < 84


# --- size ---------------------------------------------------------------------------------------


def test_ten_million_rows():
    """Few enough for a suite; benchmarks/test_history.py has ten times as many."""
    rows = 10_000_000
    table = ScoreTable(rows)
    generator = torch.Generator().manual_seed(0)
    table.update(torch.arange(rows), torch.rand(rows, generator=generator))
    assert table.seen == rows
    assert table.mean == pytest.approx(float(table.scores.double().mean()), rel=1e-12)
    sampler = after_the_first_pass(table)
    index, weight = sampler.draw(1_000_000)
    assert float((weight.double() * table.scores[index]).mean()) == pytest.approx(table.mean, rel=1e-3)
    assert float(table.scores[index].double().mean()) == pytest.approx(0.1 * 0.5 + 0.9 * 2 / 3, rel=5e-3)
    assert len(index.unique()) > 900_000
    heavy = torch.tensor([rows - 1])
    table.update(heavy, torch.tensor([1e7]))  # now two thirds of the whole
    assert int((sampler.draw(1000).index == heavy).sum()) == pytest.approx(0.9 * 1000 * 2 / 3, abs=40)
