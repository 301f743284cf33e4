"""Sampling weights of rows: what changes them, what does not, and that draws follow them."""

import re
from types import SimpleNamespace

import pytest
import torch

from sparse_training.data.resident import ResidentLoader
from sparse_training.errors import UserError
from sparse_training.samplers.adaptive_weights import NOISE, SamplingWeights
from sparse_training.selection.policies.adaptive import AdaptivePolicy
from sparse_training.selection.registry import make_policy
from sparse_training.selection.types import CandidateIndices

CLASSES = 10


def labels(rows=20_000, seed=0):
    return torch.randint(0, CLASSES, (rows,), generator=torch.Generator().manual_seed(seed))


def logits_for(targets, probability):
    """Logits that give the targets this probability, the rest of it shared by the other classes."""
    p = probability[:, None].expand(-1, CLASSES)
    others = ((1.0 - p) / (CLASSES - 1)).clone()
    return others.scatter(1, targets[:, None], p[:, :1]).log()


def updated(weights, logits, targets):
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    weights.update(torch.arange(weights.rows), losses, logits)
    return weights


def one_pass(weights, progress=0.1):
    """How often each row comes in the next pass."""
    parts = [weights.draw(1, progress)]
    parts.append(weights.draw(len(weights.order), progress))
    return torch.bincount(torch.cat(parts), minlength=weights.rows)


def noisy(rate, rows=20_000):
    """Sampling weights and the rows whose labels were replaced; the model confuses two classes."""
    right = labels(rows)
    generator = torch.Generator().manual_seed(1)
    wrong = torch.rand(rows, generator=generator) < rate
    given = torch.where(wrong, (right + torch.randint(1, CLASSES, (rows,), generator=generator)) % CLASSES, right)
    believed = right.clone()
    confused = (right == 6) & (torch.rand(rows, generator=generator) < 0.3)
    believed[confused] = 0
    weights = SamplingWeights(rows, given, denoise=True)
    one_pass(weights)
    return updated(weights, logits_for(believed, torch.full((rows,), min(0.95, 1.0 - rate))), given), wrong, confused


def test_the_first_pass_has_every_row_once_in_an_order_of_its_seed():
    weights, same, other = (SamplingWeights(1000, labels(1000), seed=seed) for seed in (3, 3, 4))
    first = torch.cat([weights.draw(7, 0.0) for _ in range(142)])
    assert torch.equal(first.sort().values.unique(), first.sort().values)
    assert torch.equal(first, same.draw(994, 0.0))
    assert not torch.equal(first, other.draw(994, 0.0))


@pytest.mark.parametrize("progress", [0.1, 0.9])
def test_nothing_that_sets_rows_apart_makes_passes_epochs(progress):
    targets = torch.arange(2000) % CLASSES
    weights = SamplingWeights(2000, targets, torch.ones(2000), denoise=True, balance_from=0.6)
    one_pass(weights)
    updated(weights, logits_for(targets, torch.full((2000,), 0.5)), targets)
    for _ in range(3):
        assert (one_pass(weights, progress) == 1).all()


def test_well_learned_rows_come_a_third_as_often_over_the_passes():
    rows = 6000
    weights = SamplingWeights(rows, learned=1.0 / 3.0)
    one_pass(weights)
    sure = torch.arange(rows) < rows // 2
    weights.update(torch.arange(rows), torch.where(sure, 0.0, 1.0))
    counts = sum(one_pass(weights) for _ in range(10))
    assert int(counts.sum()) == pytest.approx(10 * rows, rel=0.01)
    assert float(counts[~sure].float().mean() / counts[sure].float().mean()) == pytest.approx(3.0, rel=0.02)
    assert counts[sure].max() - counts[sure].min() <= 1  # to within one: what is left over is not lost


@pytest.mark.parametrize("targets", [None, torch.arange(3000) % CLASSES])
def test_copies_share_the_draws_of_one_row_from_the_first_pass_on(targets):
    copies = torch.where(torch.arange(3000) < 2000, 10, 1)
    weights = SamplingWeights(3000, targets, copies)
    counts = sum(one_pass(weights) for _ in range(10)).float()
    assert float(counts.sum()) == pytest.approx(30_000, rel=0.01)
    assert float(counts[2000:].mean() / counts[:2000].mean()) == pytest.approx(10.0, rel=0.03)
    assert counts[2000:].max() - counts[2000:].min() <= 1


def test_every_batch_has_its_share_of_each_class():
    targets = torch.cat((torch.zeros(3000), torch.ones(600), torch.full((37,), 2.0))).long()
    weights = SamplingWeights(len(targets), targets)
    orders = []
    for _ in range(2):
        orders.append(weights.draw(len(targets), 0.1))
        for batch in orders[-1].split(100)[:-1]:
            found = torch.bincount(targets[batch], minlength=3)
            assert (found - 100 * torch.bincount(targets) / len(targets)).abs().max() < 2
    assert not torch.equal(*orders)
    common = [order[targets[order] == 0] for order in orders]
    assert not torch.equal(*common)  # the rows of a class come in another order each time


def test_the_loader_finds_copies():
    images = torch.randint(0, 256, (9, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[[3, 5, 8]] = images[0].clone()
    images[7] = images[1].clone()
    images[7, 0, 3, 3] ^= 1
    loader = ResidentLoader(SimpleNamespace(images=images, labels=torch.arange(9)), batch_size=3)
    assert loader.duplicate_counts().tolist() == [4, 1, 1, 4, 1, 4, 1, 1, 4]


def test_no_class_gains_by_being_hard():
    targets = labels(5000)
    weights = SamplingWeights(5000, targets, learned=1.0 / 3.0)
    one_pass(weights)
    updated(weights, logits_for(targets, torch.where(targets < 3, 0.3, 0.999)), targets)
    counts = torch.bincount(targets, weights=one_pass(weights).double())
    torch.testing.assert_close(counts, torch.bincount(targets).double(), rtol=0.05, atol=5.0)


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.4])
def test_wrong_labels_are_counted_and_seldom_drawn(rate):
    weights, wrong, confused = noisy(rate)
    counts = one_pass(weights).float()
    assert weights.noise == pytest.approx(rate, abs=0.03)
    assert counts[wrong & ~confused].mean() == pytest.approx(0.1 / (1.0 - 0.9 * rate), abs=0.02)
    again = counts + sum(one_pass(weights) for _ in range(9))
    assert again.min() >= 1  # judged again within ten passes
    assert counts[~wrong & ~confused].mean() > 0.9


def test_genuine_confusion_between_two_classes_is_not_noise():
    weights, _, confused = noisy(0.0)
    counts = one_pass(weights).float()
    assert weights.noise < NOISE
    assert counts[confused].mean() > 0.9


def test_a_model_that_is_not_sure_rejects_nothing():
    weights, wrong, _ = noisy(0.2)
    targets = weights.targets.long()
    updated(weights, torch.randn(weights.rows, CLASSES, generator=torch.Generator().manual_seed(0)) * 0.1, targets)
    assert weights.estimate_noise() == 0.0
    weights.noise = 0.2
    assert weights.weights()[wrong].mean() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("balance_from", [0.6, None])
def test_classes_are_balanced_late_in_the_run_and_the_pass_is_cut_for_it(balance_from):
    targets = torch.cat((torch.zeros(2000), torch.ones(400), torch.full((200,), 2.0))).long()
    weights = SamplingWeights(len(targets), targets, balance_from=balance_from)
    updated(weights, torch.zeros(len(targets), 3), targets)
    before = weights.draw(1000, 0.59)
    assert torch.bincount(targets[before]).tolist() == pytest.approx([769, 154, 77], abs=40)
    after = torch.bincount(targets[weights.draw(7800, 0.6)], minlength=3)
    if balance_from is None:
        assert after[0] > 5500
    else:
        assert after.tolist() == pytest.approx([2600, 2600, 2600], rel=0.05)


def test_a_balanced_set_is_not_cut_short():
    weights = SamplingWeights(100, torch.arange(100) % CLASSES, balance_from=0.6)
    first = torch.cat((weights.draw(50, 0.5), weights.draw(50, 0.7)))
    assert len(first.unique()) == 100


@pytest.mark.parametrize(
    "targets",
    [
        None,
        torch.zeros(50, 3),
        torch.rand(50),
        torch.zeros(50, 4, 4, dtype=torch.int64),
        torch.arange(50) - 1,
        torch.zeros(50, dtype=torch.int64),
    ],
    ids=["none", "soft", "regression", "pixels", "ignored", "one class"],
)
def test_targets_of_any_kind(targets):
    weights = SamplingWeights(50, targets)
    for progress in (0.0, 0.3, 0.7, 0.9):
        index = weights.draw(32, progress)
        assert len(index) == 32
        weights.update(index, torch.rand(32), torch.zeros(32, 3))
    assert weights.noise == 0.0


def test_a_model_may_have_classes_that_no_row_is_of():
    """As where the data are a part of what it can tell apart."""
    given = noisy(0.2)[0].targets.long()
    weights, wider = (SamplingWeights(len(given), given, denoise=True) for _ in range(2))
    logits = logits_for(given, torch.full(given.shape, 0.9))
    elsewhere = torch.arange(len(given)) % 50 == 0
    believed = torch.where(elsewhere, CLASSES + 3, (given + 1) % CLASSES)
    updated(weights, logits, given)
    updated(wider, torch.nn.functional.pad(logits, (0, 5), value=-30.0), given)
    assert wider.estimate_noise() == weights.estimate_noise()
    updated(wider, 9.0 * torch.nn.functional.one_hot(believed, CLASSES + 5).float(), given)
    assert 0.0 <= wider.estimate_noise() < 1.0
    assert len(wider.draw(100, 0.9)) == 100


def test_what_is_not_finite_is_counted_and_a_repeated_row_keeps_its_last():
    weights = SamplingWeights(4)
    weights.update(torch.tensor([0, 1, 1, 2]), torch.tensor([torch.nan, 1.0, 2.0, torch.inf]))
    assert weights.invalid == 2
    expected = torch.tensor([torch.nan, torch.nan, torch.nan, torch.nan])
    expected[1] = torch.exp(torch.tensor(-2.0))
    torch.testing.assert_close(weights.probability, expected, equal_nan=True)


def test_arguments_and_states_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"`learned` must be in \(0, 1\], got 0"):
        SamplingWeights(5, learned=0)
    with pytest.raises(UserError, match="`rows` must be an integer of at least 1, got 0"):
        SamplingWeights(0)
    with pytest.raises(UserError, match="must be of 6 rows, got 5"):
        SamplingWeights(6).load_state_dict(SamplingWeights(5).state_dict())


def test_the_policy_goes_on_from_its_state_bit_for_bit():
    targets = labels(300)
    generator = torch.Generator().manual_seed(2)
    made = [(torch.rand(64, generator=generator), torch.randn(64, CLASSES, generator=generator)) for _ in range(30)]

    def steps(policy, begin, end):
        drawn = []
        for step in range(begin, end):
            policy.set_progress(step / 30)
            drawn.append(policy.choose(CandidateIndices(torch.arange(64), 0)).index)
            policy.observe(drawn[-1], *made[step])
        return torch.stack(drawn)

    whole, first, later = (AdaptivePolicy(seed=5, denoise=True, balance=True) for _ in range(3))
    for policy in (whole, first):
        policy.prepare(300, targets)
    expected = steps(whole, 0, 30)[17:]
    steps(first, 0, 17)
    later.load_state_dict(first.state_dict())  # before it knows the data
    later.prepare(300, targets)
    assert torch.equal(steps(later, 17, 30), expected)
    later.prepare(299, targets[:299])  # another run
    assert later.sampler.rows == 299
    assert later.sampler.probability.isnan().all()


def test_the_policy_says_what_it_assumed():
    weights = noisy(0.2)[0]
    policy = AdaptivePolicy(denoise=True)
    policy.prepare(weights.rows, weights.targets)
    assert "20000 of 20000 rows were never trained on" in policy.warnings(None)[0]
    assert policy.take_news() == []
    weights.draw(weights.rows, 0.1)
    policy.sampler = weights
    assert any("of the labels seem wrong" in text for text in policy.warnings(None))
    (sentence,) = policy.take_news()
    assert re.match(r"denoise: (19|20|21)% of the labels seem wrong; .* at least once in 10 passes", sentence)
    weights.draw(weights.rows, 0.1)
    assert policy.take_news() == []  # once


def test_a_rare_class_is_drawn_ten_times_a_pass_and_no_more():
    """One row of a class among 9,001: an equal share for its class would be 906 draws of one row."""
    targets = torch.cat((torch.arange(9000) % 9, torch.tensor([9])))
    weights = SamplingWeights(len(targets), targets, balance_from=0.0)
    counts = sum(one_pass(weights, 0.9) for _ in range(5))
    assert counts[-1] in (49, 50, 51)
    assert counts[:-1].min() >= 4
    assert counts[:-1].max() <= 6
    assert float(weights.weights().max()) == 10.0
    assert float(weights.weights().mean()) == pytest.approx(1.0, abs=1e-4)
    (sentence,) = weights.take_news()
    assert sentence == "balance: every class is drawn equally often from now on, a row at most 10 times a pass"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adaptive", "at least one of its switches denoise, deduplicate, balance, each once, got none; name it as"),
        ("adaptive+", "each once, got none"),
        ("adaptive+balance+balance", r"each once, got balance\+balance"),
        ("adaptive+balanced", "each once, got balanced; name it as adaptive.denoise"),
        ("random+balance", "`policy` must be one of"),
    ],
)
def test_names_of_switches(name, words):
    with pytest.raises(UserError, match=words):
        make_policy(name, rate=None, seed=0)


def test_switches_in_any_order_have_one_name():
    policy = make_policy("adaptive+balance+denoise", rate=None, seed=0)
    assert (policy.denoise, policy.deduplicate, policy.balance) == (True, False, True)
    assert policy.name == AdaptivePolicy(denoise=True, balance=True).name == "adaptive+denoise+balance"
    with pytest.raises(UserError, match="at least one of its switches"):
        AdaptivePolicy()


@pytest.mark.parametrize(
    ("switch", "words"),
    [
        ("denoise", "`denoise` needs the class of each of the 40 rows, .* got none"),
        ("balance", "`balance` needs the class of each of the 40 rows, .* got none"),
        ("deduplicate", "`deduplicate` needs to know the copies of each row"),
    ],
)
def test_a_switch_that_the_data_cannot_serve_is_refused(switch, words):
    policy = AdaptivePolicy(**{switch: True})
    with pytest.raises(UserError, match=words):
        policy.prepare(40)
