"""Edges of policies that mutation testing found untested: capacities, counts to be timed, seeds and names."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_training.criterion import Criterion
from sparse_training.errors import UserError
from sparse_training.gate.gate import Gate
from sparse_training.gate.significance import Significance
from sparse_training.gate.terms import Constant, Uncertainty
from sparse_training.selection.policies.adaptive import AdaptivePolicy
from sparse_training.selection.policies.base import Policy
from sparse_training.selection.policies.gate import GatePolicy
from sparse_training.selection.policies.importance import BatchImportancePolicy, ImportancePolicy
from sparse_training.selection.policies.infobatch import BatchInfoBatchPolicy, InfoBatchPolicy
from sparse_training.selection.policies.masked import MaskedPolicy, OriginalController
from sparse_training.selection.policies.random import RandomPolicy
from sparse_training.selection.policies.topk import TopKPolicy
from sparse_training.selection.registry import POLICIES, make_policy
from sparse_training.selection.scorers.history import HistoryScorer
from sparse_training.selection.types import Batch, CandidateIndices, Scores

CPU = torch.device("cpu")


def by_history(gate, losses):
    """A gate that decides before loading, by these last losses."""
    policy = GatePolicy(gate=gate)
    policy.scorer = HistoryScorer()
    policy.scorer.attach(nn.Identity(), F.cross_entropy, device=CPU)
    policy.prepare(len(losses))
    policy.observe(torch.arange(len(losses)), losses, None)
    return policy


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_gate_with_a_capacity_chooses_rows_to_load_and_no_padding(temperature):
    losses = torch.tensor([5.0, 0.1, 6.0, 0.2, 0.3, 0.4])
    options = {"temperature": temperature, "p_min": 0.05} if temperature else {}
    gate = Gate(0.5, capacity=4, threshold=3.0, significance=Significance(loss=1.0), **options)
    ids, weight = by_history(gate, losses).choose(CandidateIndices(torch.arange(6), 0))
    assert len(ids) == len(set(ids.tolist()))
    if temperature:
        assert len(weight) == len(ids)
        assert weight.min() > 0
    else:
        assert sorted(ids.tolist()) == [0, 2]
        assert weight is None


def test_counts_that_the_calibration_times():
    assert TopKPolicy(0.25).likely_rows(64) == range(16, 17)
    assert TopKPolicy(0.01).likely_rows(8) == range(1, 2)
    assert Policy().likely_rows(64) == range(64, 65)
    assert BatchImportancePolicy(0.25).likely_rows(64) == range(15, 18)
    assert BatchImportancePolicy(0.01).likely_rows(8) == range(1, 3)
    assert BatchImportancePolicy(1.0).likely_rows(8) == range(7, 9)
    assert BatchInfoBatchPolicy().likely_rows(64) == range(32, 65)
    assert BatchInfoBatchPolicy().likely_rows(1) == range(1, 2)
    assert BatchInfoBatchPolicy().likely_rows(3) == range(1, 4)
    assert GatePolicy(gate=Gate(0.25, capacity=20)).likely_rows(64) == range(20, 21)
    assert GatePolicy(gate=Gate(0.25, capacity=20)).likely_rows(8) == range(8, 9)
    assert by_history(Gate(0.25), torch.ones(8)).likely_rows(8) == range(4, 9)
    loaded = BatchImportancePolicy(0.25)
    loaded.scorer = HistoryScorer()  # its rows are chosen before they are loaded
    assert loaded.likely_rows(8) == range(8, 9)


def scored(policy, some):
    policy.scorer.attach(nn.Identity(), Criterion(), device=CPU)
    return policy.select(policy.score(some), some)


def batch(rows=64, classes=5):
    generator = torch.Generator().manual_seed(rows)
    inputs = torch.randn(rows, classes, generator=generator) * 3
    return Batch(inputs, torch.randint(0, classes, (rows,), generator=generator), torch.arange(rows), rows)


@pytest.mark.parametrize("name", ["importance@self", "infobatch@self"])
def test_draws_within_a_batch_follow_the_seed(name):
    some = batch()
    first, same, other = (scored(make_policy(name, rate=0.3, seed=seed), some).positions.tolist() for seed in (1, 1, 2))
    assert first == same != other


@pytest.mark.parametrize("name", ["random", "importance", "infobatch"])
def test_draws_from_the_data_follow_the_seed(name):
    losses = torch.rand(200, generator=torch.Generator().manual_seed(0))

    def drawn(seed):
        policy = make_policy(name, rate=0.3, seed=seed)
        policy.prepare(200)
        policy.observe(torch.arange(200), losses, None)
        ids = [policy.choose(CandidateIndices(part, 1)).index for part in torch.arange(200).split(50)]
        return torch.cat(ids).tolist()

    assert drawn(1) == drawn(1) != drawn(2)


def test_uniform_draws_reach_rows_without_a_loss_as_often_as_they_are_told():
    losses = torch.zeros(200)
    losses[:100] = 1.0

    def share(uniform):
        policy = make_policy("importance", rate=1.0, seed=0, options={"uniform": uniform})
        policy.prepare(200)
        policy.observe(torch.arange(200), losses, None)
        ids = torch.cat([policy.choose(CandidateIndices(torch.arange(200), 1)).index for _ in range(20)])
        return float((ids >= 100).float().mean())

    assert share(0.1) == pytest.approx(0.05, abs=0.02)
    assert share(0.9) == pytest.approx(0.45, abs=0.02)
    probability = [BatchImportancePolicy(0.2, uniform=uniform).probability(losses) for uniform in (0.1, 0.9)]
    assert [float(part[-1]) for part in probability] == pytest.approx([0.02, 0.18])


def test_every_policy_draws_by_seed_zero_unless_told():
    made = (kind() for kind in POLICIES.values() if kind is not AdaptivePolicy)
    assert {policy.seed for policy in made} == {0}
    assert {AdaptivePolicy.from_name("adaptive+denoise").seed, AdaptivePolicy(denoise=True).seed} == {0}
    assert {BatchImportancePolicy().seed, BatchInfoBatchPolicy().seed} == {0}


def test_policies_made_without_a_rate_have_the_documented_one():
    assert BatchImportancePolicy().rate == 0.1
    assert make_policy("random", rate=None, seed=0).rate == 0.1


def test_a_subclass_has_its_own_name_or_its_class():
    class Named(Policy):
        name = "mine"

    class HardHalf(Policy):
        pass

    assert (Named.name, HardHalf.name, Policy.name) == ("mine", "hardhalf", "dense")


def test_the_masked_step_counts_the_steps_at_its_clamp():
    policy, some = MaskedPolicy(0.4), batch()
    scored(policy, some)
    assert len(policy.warnings(None)) == 1
    for _ in range(3):
        policy.controller.threshold = 100.0
        scored(policy, some)
    assert policy.warnings(None)[1] == "masked's threshold was at its clamp in 3 of 4 steps"


@pytest.mark.parametrize(("rows", "least"), [(5, 2), (20, 2), (29, 2), (30, 3), (64, 6)])
def test_the_masked_step_keeps_a_tenth_and_at_least_two(rows, least):
    policy = MaskedPolicy(0.4)
    policy.controller.threshold = 100.0  # above every significance
    kept = scored(policy, batch(rows))
    assert (kept.rows, int(kept.weight.sum()), len(kept.weight)) == (least, least, rows)


@pytest.mark.parametrize(("threshold", "integral"), [(0.5, 0.9), (10.0, 0.9), (3.0, 1.1)])
def test_the_masked_integral_leaks_at_either_clamp(threshold, integral):
    controller = OriginalController(0.2, threshold=threshold, integral=1.0, rate=0.3)
    controller.observe(0.3)
    assert controller.integral == pytest.approx(integral)
    expected = min(10.0, max(0.5, threshold + 0.005 * 0.1 + 0.0001 * integral))
    assert controller.threshold == pytest.approx(expected)


def test_the_default_policy_ignores_labels_and_copies():
    """Its draws depend on rows, losses and the seed: nothing is assumed of classes or duplicates."""
    losses = torch.rand(200, generator=torch.Generator().manual_seed(0))
    drawn = []
    for targets, copies in ((None, None), (torch.arange(200) % 7, lambda: torch.full((200,), 2))):
        policy = make_policy("infobatch", rate=None, seed=3)
        policy.prepare(200, targets, copies)
        policy.observe(torch.arange(200), losses, None)
        drawn.append(policy.choose(CandidateIndices(torch.arange(200), 1, together=True)).index.tolist())
    assert drawn[0] == drawn[1]


def test_the_batch_size_of_waiting_rows_is_kept_in_the_state_and_was_not_in_version_0_1_0():
    policy, later, old = (InfoBatchPolicy() for _ in range(3))
    for each in (policy, later, old):
        each.prepare(20)
    policy.batch_size = 8
    state = policy.get_extra_state()
    assert state["batch size"] == 8
    later.set_extra_state(state)
    assert later.batch_size == 8
    del state["batch size"]
    old.set_extra_state(state)
    assert old.batch_size == 0


def test_random_draws_single_rows_by_its_own_generator():
    state = torch.get_rng_state()
    drawn = []
    for seed in (1, 1, 2):
        policy = RandomPolicy(0.3, seed=seed)
        drawn.append([len(policy.choose(CandidateIndices(torch.arange(1), 0)).index) for _ in range(60)])
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_random_keeps_its_share_where_it_rounds_to_nothing(rows):
    policy = RandomPolicy(0.1, seed=7)
    assert policy.seed == 7
    assert sum(policy.count(rows) for _ in range(3000)) == pytest.approx(300 * rows, rel=0.1)


@pytest.mark.parametrize("kind", [ImportancePolicy, InfoBatchPolicy])
def test_past_losses_of_a_loaded_state_outlive_the_start_of_its_run(kind):
    policy, later = kind(), kind()
    policy.prepare(6)
    policy.observe(torch.arange(6), torch.arange(6.0), None)
    later.set_extra_state(policy.get_extra_state())
    later.prepare(6)
    assert later.table.scores.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    later.set_extra_state(policy.get_extra_state())
    later.prepare(6)
    assert later.table.scores.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_gate_takes_the_smoothing_and_the_ignored_index_of_the_loss():
    loss = nn.CrossEntropyLoss(reduction="none", label_smoothing=0.25, ignore_index=3)
    gate = make_policy("gate", rate=0.5, seed=0, loss=loss).gate
    assert (gate.label_smoothing, gate.ignore_index) == (0.25, 3)


def test_a_gate_is_named_with_its_significance():
    policy = make_policy("gate:vision", rate=0.5, seed=0)
    assert isinstance(policy, GatePolicy)
    assert policy.name == "gate:vision"
    with pytest.raises(UserError, match="vision:more"):
        make_policy("gate:vision:more", rate=0.5, seed=0)


def test_a_policy_without_options_says_so():
    with pytest.raises(UserError, match="the policy dense has the options none, got 'prune'"):
        make_policy("dense", rate=None, seed=0, options={"prune": 0.5})


def test_top_k_keeps_a_row_and_ranks_what_is_not_a_number_last():
    losses = torch.tensor([-2.0, torch.nan, -1.0, -3.0, torch.nan, -4.0])
    policy = TopKPolicy(0.5)
    assert policy.decide(Scores(torch.zeros(6).long(), F.cross_entropy, losses=losses)).index.tolist() == [0, 2, 3]
    one = TopKPolicy(0.01).decide(Scores(torch.zeros(6).long(), F.cross_entropy, losses=losses))
    assert one.index.tolist() == [2]


def prepared(**options):
    policy = InfoBatchPolicy(**options)
    policy.prepare(200)
    policy.observe(torch.arange(200), torch.arange(200.0), None)
    return policy


def test_infobatch_prunes_with_its_own_probability():
    index, weight = prepared(prune=0.9).sampler.prune(torch.arange(200), 0)
    assert len(index) == 200  # nothing is known before the losses are entered
    policy = prepared(prune=0.9)
    policy.flush()
    index, weight = policy.sampler.prune(torch.arange(200), 1)
    assert 100 < len(index) < 125
    assert sorted(set(weight.tolist())) == pytest.approx([1.0, 10.0])


def test_batches_that_the_user_arranged_are_pruned_each_by_itself():
    index, weight = prepared().choose(CandidateIndices(torch.arange(200), 1, together=True))
    assert 120 < len(index) < 180
    assert sorted(set(weight.tolist())) == pytest.approx([len(index) / 200, 2 * len(index) / 200])


def test_a_history_policy_before_and_after_it_knows_its_rows():
    policy = ImportancePolicy()
    assert policy.get_extra_state() == {}
    with pytest.raises(
        UserError, match=r"use data held in memory \(ResidentLoader\), or for a DataLoader HistorySampler$"
    ):
        policy.prepare(None)
    policy.prepare(3)
    assert policy.warnings(None) == [
        "3 of 3 rows were never trained on: the run was too short for past losses to matter"
    ]


def test_a_loss_that_is_not_finite_does_not_raise_the_mean_of_the_others():
    losses = torch.tensor([0.5] * 63 + [torch.nan])
    index, weight = BatchInfoBatchPolicy(prune=0.9).decide(
        Scores(torch.zeros(64).long(), F.cross_entropy, losses=losses)
    )
    assert index.tolist() == list(range(63))
    assert set(weight.tolist()) == {1.0}


def test_a_term_of_samples_with_several_targets_is_their_mean():
    generator = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(16, 5, 3, generator=generator)
    targets = torch.randint(0, 5, (16, 3), generator=generator)
    policy = GatePolicy(gate=Gate(0.25, significance=Significance(terms=(Uncertainty(),))))
    policy.gated(Scores(targets, Criterion(nn.CrossEntropyLoss(reduction="none")), logits=logits))
    p = logits.softmax(1)
    entropy = -(p * p.log()).sum(1).mean(1)
    assert policy.gate.last.significance.argsort().tolist() == entropy.argsort().tolist()


@pytest.mark.parametrize("kind", [BatchImportancePolicy, BatchInfoBatchPolicy])
def test_rows_drawn_by_their_losses_follow_the_seed(kind):
    losses = torch.arange(64.0) + 1

    def drawn(seed):
        policy = kind(0.25, seed)
        return policy.decide(Scores(torch.zeros(64).long(), F.cross_entropy, losses=losses)).index.tolist()

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_the_loss_counts_beside_terms_where_rows_have_losses_alone():
    losses = torch.tensor([3.0, 1.0, 4.0, 2.0])
    rows = Scores(None, F.cross_entropy, losses=losses)
    policy = GatePolicy(gate=Gate(0.5, significance=Significance(loss=2.0, terms=(Constant(),))))
    policy.gated(rows)
    assert policy.gate.last.significance.argsort().tolist() == [1, 3, 0, 2]
    with pytest.raises(UserError, match="entropy"):
        GatePolicy(gate=Gate(0.5, significance=Significance(terms=(Uncertainty(),)))).gated(rows)
