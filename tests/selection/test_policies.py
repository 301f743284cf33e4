"""Which rows each policy keeps, what it counts, and that its state comes back."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from trainers import NAMES

from sparse_training.criterion import Criterion
from sparse_training.errors import UserError
from sparse_training.gate.gate import Gate
from sparse_training.gate.significance import Significance
from sparse_training.selection.policies.base import Policy
from sparse_training.selection.policies.gate import GatePolicy
from sparse_training.selection.policies.importance import BatchImportancePolicy, ImportancePolicy
from sparse_training.selection.policies.infobatch import BatchInfoBatchPolicy, InfoBatchPolicy
from sparse_training.selection.policies.masked import MaskedPolicy
from sparse_training.selection.policies.random import RandomPolicy
from sparse_training.selection.policies.topk import TopKPolicy
from sparse_training.selection.registry import POLICIES, make_policy
from sparse_training.selection.types import Batch, CandidateIndices, Scores


def batch(rows=64, classes=5):
    generator = torch.Generator().manual_seed(rows)
    inputs = torch.randn(rows, classes, generator=generator) * 3
    targets = torch.randint(0, classes, (rows,), generator=generator)
    return Batch(inputs, targets, torch.arange(rows), rows)


def offer(rows, epoch=0):
    return CandidateIndices(torch.arange(rows), epoch)


def scored(policy, some):
    """What it keeps, of a model that gives its inputs back as logits."""
    policy.scorer.attach(nn.Identity(), Criterion(), device=torch.device("cpu"))
    return policy.select(policy.score(some), some)


def test_dense_keeps_the_batch_as_it_is():
    some = batch()
    kept = scored(make_policy("dense", rate=0.1, seed=0), some)
    assert kept.inputs is some.inputs
    assert (kept.rows, kept.positions, kept.weight) == (64, None, None)


@pytest.mark.parametrize(("rate", "rows", "count"), [(0.1, 512, 51), (0.1, 96, 10), (1.0, 7, 7), (0.3, 5, 2)])
def test_random_draws_exactly_its_share_without_repeats(rate, rows, count):
    policy = RandomPolicy(rate)
    drawn = [policy.choose(offer(rows)).index for _ in range(20)]
    assert all(len(set(rows_.tolist())) == len(rows_) == count for rows_ in drawn)
    assert len({tuple(sorted(rows_.tolist())) for rows_ in drawn}) > 1 or rate == 1.0


def test_random_reaches_its_rate_where_it_rounds_to_nothing():
    policy = RandomPolicy(0.1)
    assert sum(len(policy.choose(offer(1)).index) for _ in range(3000)) == pytest.approx(300, abs=70)


def test_random_goes_on_from_its_state_and_leaves_the_global_generator():
    policy = RandomPolicy(0.1, seed=5)
    rng = torch.get_rng_state()
    policy.choose(offer(100))
    other = RandomPolicy(0.1, seed=6)
    other.load_state_dict(policy.state_dict())
    assert torch.equal(policy.choose(offer(100)).index, other.choose(offer(100)).index)
    assert torch.equal(torch.get_rng_state(), rng)


def test_gate_trains_on_the_rows_above_its_threshold():
    policy, some = GatePolicy(0.25), batch(256)
    for _ in range(60):
        kept = scored(policy, some)
    assert kept.rows == len(kept.targets) == pytest.approx(64, abs=6)
    assert torch.equal(kept.inputs, some.inputs[kept.positions])
    assert torch.equal(kept.targets, some.targets[kept.positions])
    loss = nn.functional.cross_entropy(some.inputs, some.targets, reduction="none")
    assert loss[kept.positions].mean() > loss.mean()
    assert kept.weight is None


def test_a_drawn_selection_is_unbiased():
    policy = GatePolicy(gate=Gate(0.3, temperature=0.5, p_min=0.05))
    some = batch(256)
    loss = nn.functional.cross_entropy(some.inputs, some.targets, reduction="none")
    estimates = []
    for _ in range(400):
        kept = scored(policy, some)
        estimates.append((loss[kept.positions] * kept.weight).sum() / kept.divisor)
    estimates = torch.stack(estimates[50:])
    error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - loss.mean()) < 4 * error
    assert error < 0.05 * loss.mean()


def fraction_of(some, kept, **options):
    """The share of the sum of the rows' gradient norms, label smoothing apart, that the rows kept have, by autograd."""
    logits = some.inputs.double().requires_grad_()
    F.cross_entropy(logits, some.targets, reduction="sum", **options).backward()
    norms = logits.grad.norm(dim=1)
    taken = kept.positions if kept.weight is None else kept.positions[kept.weight > 0]
    return (norms[taken].sum() / norms.sum()).item()


@pytest.mark.parametrize(
    "options",
    [
        {"rate": 0.2},
        {"rate": 0.2, "capacity": 100, "label_smoothing": 0.1, "ignore_index": 3},
        {"rate": 0.3, "temperature": 0.5, "p_min": 0.05},
        {"rate": 0.3, "decision": "topk"},
        {"grad_norm_fraction": 0.6},
    ],
    ids=lambda options: " ".join(options),
)
def test_a_watched_gate_knows_the_grad_norm_fraction_that_it_kept(options):
    policy, some = GatePolicy(gate=Gate(**options)), batch(256)
    ignored = {name: value for name, value in options.items() if name == "ignore_index"}
    for _ in range(30):
        scored(policy, some)
    assert len(policy.trace()) == 2
    policy.watched = True
    kept = scored(policy, some)
    rate, threshold, fraction = policy.trace()
    assert fraction.item() == pytest.approx(fraction_of(some, kept, **ignored), rel=1e-5)
    assert threshold == policy.gate.threshold
    assert rate.item() == pytest.approx(
        kept.rows / 256 if "grad_norm_fraction" in options else policy.gate.rate_observed.item()
    )
    policy.watched = False
    scored(policy, some)
    assert len(policy.trace()) == 2


def test_the_grad_norm_fraction_of_a_batch_that_has_none_or_is_not_finite():
    policy, some = GatePolicy(gate=Gate(0.5)), batch(8)
    policy.watched = True
    nothing = some._replace(targets=torch.full_like(some.targets, -100))
    scored(policy, nothing)
    assert policy.trace()[2].isnan()
    some.inputs[3] = torch.nan
    for _ in range(3):
        scored(policy, some)
    assert 0.0 < policy.trace()[2] < 1.0


def test_watching_a_gate_reads_no_value():
    """Under FakeTensorMode, where there is none to read."""
    policy, some = GatePolicy(gate=Gate(0.2, capacity=16)), batch(64)
    policy.watched = True
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for name, buffer in policy.gate.controller.named_buffers():
            setattr(policy.gate.controller, name, mode.from_tensor(buffer))
        fake = some._replace(inputs=mode.from_tensor(some.inputs), targets=mode.from_tensor(some.targets))
        policy.select(Scores(fake.targets, Criterion(), logits=fake.inputs), fake)
        assert [value.shape for value in policy.trace()] == [()] * 3


def test_a_capacity_pads_with_weight_zero_and_divides_by_the_rows_kept():
    policy = GatePolicy(gate=Gate(0.1, capacity=32))
    kept = scored(policy, batch(64))
    assert len(kept.targets) == 32
    assert int(kept.rows) == int((kept.weight > 0).sum())
    assert int(kept.divisor) == max(1, int(kept.rows))
    assert list(policy.likely_rows(64)) == [32]


def test_padding_repeats_the_first_row_kept():
    some = batch(64)
    some.inputs[0] = torch.nan
    kept = scored(GatePolicy(gate=Gate(0.1, capacity=48, threshold=4.0)), some)
    count = int(kept.rows)
    assert 0 < count < 48
    assert (kept.positions[count:] == kept.positions[0]).all()
    assert kept.positions[0] > 0
    assert torch.equal(kept.inputs, some.inputs[kept.positions])
    assert torch.equal(kept.targets, some.targets[kept.positions])
    assert (kept.weight[count:] == 0).all()


def test_padding_of_a_batch_with_nothing_kept_is_zeros():
    """As a GPU trains on it, which skips the step but not the forward pass."""
    nan = torch.full((8, 3), torch.nan)
    tokens = torch.arange(8)
    some = Batch({"x": nan, "tokens": tokens}, nan[:, 0], None, 8)
    policy = GatePolicy(gate=Gate(0.1, capacity=5, threshold=2.0))
    kept = policy.select(Scores(None, Criterion(), losses=torch.ones(8)), some)
    assert int(kept.rows) == 0
    assert torch.equal(kept.inputs["x"], torch.zeros(5, 3))
    assert torch.equal(kept.targets, torch.zeros(5))
    assert torch.equal(kept.inputs["tokens"], torch.zeros(5, dtype=torch.int64))
    assert nan.isnan().all()  # the batch is as it was


def test_the_gate_sees_the_loss_that_is_trained_on():
    loss = nn.CrossEntropyLoss(reduction="none", ignore_index=2)
    policy, some = make_policy("gate", rate=0.9, seed=0, loss=loss), batch()
    for _ in range(20):
        kept = scored(policy, some)
    assert len(kept.targets)
    assert not (kept.targets == 2).any()


def test_topk_keeps_the_largest_losses_and_none_that_is_not_a_number():
    some = batch(64)
    some.inputs[5] = torch.nan
    losses = nn.functional.cross_entropy(some.inputs, some.targets, reduction="none")
    kept = scored(TopKPolicy(0.25), some)
    assert kept.rows == 16
    assert sorted(losses[kept.positions].tolist()) == sorted(losses.nan_to_num(-1).topk(16).values.tolist())
    assert torch.equal(kept.positions, kept.positions.sort().values)
    assert kept.weight is None


@pytest.mark.parametrize("policy", [BatchImportancePolicy(0.3), BatchInfoBatchPolicy()], ids=lambda policy: policy.name)
def test_rows_drawn_within_a_batch_estimate_its_mean_without_bias(policy):
    some = batch(128)
    loss = nn.functional.cross_entropy(some.inputs, some.targets, reduction="none")
    estimates, counts = [], []
    for _ in range(600):
        kept = scored(policy, some)
        assert len(set(kept.positions.tolist())) == kept.rows
        # Of something other than what they are drawn by, for that has no variance.
        estimates.append((loss.square()[kept.positions] * kept.weight).sum() / kept.divisor)
        counts.append(kept.rows)
    estimates = torch.stack(estimates)
    error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - loss.square().mean()) < 4 * error
    assert 0 < error < 0.05 * loss.square().mean()
    if policy.name == "importance":
        assert max(abs(count - 0.3 * 128) for count in counts) <= 1
    else:
        learned = int((loss < loss.mean()).sum())
        assert max(abs(count - (128 - learned / 2)) for count in counts) <= 1


def test_within_a_batch_as_beyond_it_drawing_goes_on_from_its_state():
    policy, some = BatchImportancePolicy(0.3, seed=1), batch(64)
    scored(policy, some)
    other = BatchImportancePolicy(0.3, seed=2)
    other.load_state_dict(policy.state_dict())
    assert torch.equal(scored(policy, some).positions, scored(other, some).positions)


def test_losses_that_are_all_zero_are_drawn_evenly():
    p = BatchImportancePolicy(0.25).probability(torch.zeros(16))
    assert torch.allclose(p, torch.full((16,), 0.25))


def test_the_masked_step_is_the_originals():
    """By hand: 0.7 CE + 0.3 H above 3, or the top tenth; masked losses over their number; twice a forward, all back."""
    policy, some = MaskedPolicy(0.4), batch(64)
    with FlopCounterMode(display=False) as counter:
        model = nn.Linear(5, 5)
        policy.scorer.attach(model, nn.CrossEntropyLoss(reduction="none"), device=torch.device("cpu"))
        kept = policy.select(policy.score(some), some)
        losses = nn.functional.cross_entropy(model(kept.inputs), kept.targets, reduction="none")
        ((losses * kept.weight).sum() / kept.divisor).backward()
    one = 2 * 64 * 5 * 5
    assert counter.get_total_flops() == 3 * one  # forward twice; the layer's inputs ask for no gradient
    logits = model(some.inputs).detach()
    p = logits.softmax(1)
    significance = 0.7 * nn.functional.cross_entropy(logits, some.targets, reduction="none")
    significance -= 0.3 * (p * (p + 1e-8).log()).sum(1)
    mask = significance > 3.0
    if mask.sum() < 6:
        mask = significance >= significance.topk(6).values[-1]
    assert torch.equal(kept.weight, mask.float())
    assert kept.inputs is some.inputs
    assert (kept.rows, kept.divisor) == (int(mask.sum()), int(mask.sum()))
    rate = 0.1 * kept.rows / 64 + 0.9 * 0.4
    assert float(policy.controller.rate) == pytest.approx(rate)
    assert float(policy.controller.threshold) == pytest.approx(3.0 + 0.0051 * (rate - 0.4))
    assert "for comparison only" in policy.warnings(0.1)[0]
    assert list(policy.likely_rows(64)) == [64]


def test_the_clock_times_what_may_be_kept():
    assert GatePolicy(0.1).likely_rows(512) == range(25, 103)
    assert GatePolicy(0.1).likely_rows(1) == range(1, 2)
    assert GatePolicy(1.0).likely_rows(8) == range(4, 9)
    assert RandomPolicy(0.1).likely_rows(51) == range(51, 52)


def test_without_one_row_of_class_logits_a_sample_the_gate_goes_by_the_loss():
    """Soft targets: the loss is all that there is to rank by."""
    some = batch(256)
    soft = some._replace(targets=some.inputs.roll(1, 1).softmax(1))
    policy = GatePolicy(0.25)
    for _ in range(60):
        kept = scored(policy, soft)
    losses = nn.functional.cross_entropy(soft.inputs, soft.targets, reduction="none")
    assert kept.rows == pytest.approx(64, abs=6)
    assert sorted(kept.positions.tolist()) == sorted(losses.topk(kept.rows).indices.tolist())


def test_a_sample_of_several_targets_counts_by_their_mean_significance():
    """The kernel's statistics where the targets are classes, and those that are ignored left out of the mean."""
    logits, targets = 3 * torch.randn(6, 7, 5), torch.randint(0, 5, (6, 7))
    targets[:, 4:] = -100
    policy = GatePolicy(0.5, significance=Significance(loss=1.0))
    policy.gate.threshold.fill_(2.0)
    kept = scored(policy, Batch(logits, targets, None, 6))
    losses = F.cross_entropy(logits[:, :4].movedim(-1, 1), targets[:, :4], reduction="none").mean(1)
    assert kept.positions.tolist() == (losses > 2.0).nonzero().flatten().tolist()
    torch.testing.assert_close(policy.gate.last.significance, losses)


@pytest.mark.parametrize("ignore_index", [-100, 0])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.1}, {"decision": "topk"}, {"floor": 0.3}, {"capacity": 5}])
def test_a_significance_that_is_given_decides_as_one_that_is_found(options, ignore_index):
    given = torch.rand(9) + 0.5
    given[3] = torch.nan
    gate = Gate(0.3, threshold=1.0, ignore_index=ignore_index, **options)
    other = Gate(0.3, threshold=1.0, **options)
    mine, wanted = gate.by(given), other(torch.zeros(9, 1), torch.zeros(9, dtype=torch.int64), offset=given)
    assert mine.index.tolist() == wanted.index.tolist()
    assert 3 not in mine.index[: int(mine.count)]
    assert int(gate.invalid) == 1
    torch.testing.assert_close(gate.threshold, other.threshold)


def test_a_rate_that_was_not_reached_is_said():
    policy = GatePolicy(0.1)
    scored(policy, batch())
    assert policy.warnings(0.1) == []
    assert "kept 50.0%" in policy.warnings(0.5)[0]
    policy.gate.step.fill_(100)
    policy.gate.saturated.fill_(90)
    assert "saturated in 90 of 100" in policy.warnings(0.1)[0]
    policy.gate.invalid.fill_(3)
    assert any("3 rows were not finite" in text for text in policy.warnings(0.1))


# --- by past losses -----------------------------------------------------------------------------


def trained(policy, losses):
    """The policy when every row has been trained on once, with these losses."""
    policy.prepare(len(losses))
    policy.observe(torch.arange(len(losses)), losses, None)
    return policy


def test_importance_draws_any_rows_of_the_data_by_their_losses():
    losses = torch.ones(1000)
    losses[900:] = 99.0
    policy = trained(ImportancePolicy(0.25, uniform=0.1), losses)
    ids, weight = policy.choose(offer(400))
    assert len(ids) == 100
    hard = ids >= 900  # none of them was offered
    assert int(hard.sum()) == pytest.approx(100 * (0.9 * 9900 / 10800 + 0.1 * 0.1), abs=10)
    assert weight[hard].max() < 1.0 < weight[~hard].min()
    some = Batch(losses[ids, None], torch.zeros(100, dtype=torch.int64), ids, 400, weight)
    kept = scored(policy, some)
    assert (kept.weight is weight, kept.divisor, kept.positions) == (True, 100, None)


def test_losses_of_every_phase_are_kept_and_the_last_one_counts():
    policy = ImportancePolicy()
    policy.prepare(4)
    policy.observe(torch.tensor([0, 1]), torch.tensor([1.0, 2.0]), None)
    policy.observe(torch.tensor([1, 3]), torch.tensor([5.0, torch.nan]), None)
    policy.flush()
    assert policy.table.scores.nan_to_num(-1.0).tolist() == [1.0, 5.0, -1.0, -1.0]
    assert any("2 of 4 rows were never trained on" in text for text in policy.warnings(0.1))
    assert any("1 losses were not finite" in text for text in policy.warnings(0.1))


def test_infobatch_steps_are_whole_batches_in_the_order_offered():
    losses = torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 2
    policy = trained(InfoBatchPolicy(), losses)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    choices = [policy.choose(CandidateIndices(ids, 1)) for ids in order.split(50)]
    assert {len(choice.index) for choice in choices} == {0, 50}
    ids, weight = (torch.cat(parts) for parts in zip(*choices, policy.waiting, strict=True))
    places = torch.empty_like(order)
    places[order] = torch.arange(1000)
    assert (places[ids].diff() > 0).all()
    below = losses < losses.mean()
    dropped = torch.ones(1000, dtype=torch.bool)
    dropped[ids] = False
    assert not (dropped & ~below).any()
    assert int(dropped.sum()) == pytest.approx(int(below.sum()) / 2, abs=50)
    assert torch.equal(weight, torch.where(below[ids], 2.0, 1.0))


@pytest.mark.parametrize("kind", [ImportancePolicy, InfoBatchPolicy])
def test_policies_by_past_losses_want_rows_that_have_numbers(kind):
    policy = kind()
    with pytest.raises(UserError, match=rf"{policy.name} asks for rows by their number; use data held in memory"):
        policy.prepare(None)
    policy.prepare(10)
    state = policy.state_dict()
    policy.prepare(11)  # another run
    assert policy.table.rows == 11
    with pytest.raises(UserError, match="was prepared for 11 rows, got 10"):
        policy.load_state_dict(state)


def test_names_gates_and_policies_are_taken():
    made = [make_policy(name, rate=0.2, seed=0) for name in NAMES]
    assert [policy.name for policy in made] == NAMES
    assert [type(policy) for policy in made] == list(POLICIES.values())
    gate = Gate(0.3)
    assert make_policy(gate, rate=0.1, seed=0).rate == 0.3

    class Mine(Policy):
        pass

    mine = Mine()
    assert make_policy(mine, rate=0.1, seed=0) is mine
    assert mine.name == "mine"  # not "dense": costs and results are filed under it


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
@pytest.mark.parametrize("policy", POLICIES)
def test_rates_out_of_range_are_refused(policy, rate):
    with pytest.raises(UserError, match=r"`rate` must be in \(0, 1\], got"):
        make_policy(policy, rate=rate, seed=0)


def test_an_unknown_name_is_refused_with_the_choices():
    with pytest.raises(
        UserError, match=r"`policy` must be one of dense, random, adaptive, gate, topk, importance.*'best'"
    ):
        make_policy("best", rate=0.1, seed=0)
