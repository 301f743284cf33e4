"""The scorers: what they say, what they cost, that they leave the model alone, and that a run with one goes on."""

import math

import pytest
import torch
import torch.nn.functional as F
from scorer_parts import CLASSES, ROWS, network, resident, same, weights
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from trainers import make_trainer

from sparse_training.errors import UserError
from sparse_training.gate.gate import Gate
from sparse_training.gate.significance import Significance
from sparse_training.models.build import ModelFactory
from sparse_training.selection.policies.gate import GatePolicy
from sparse_training.selection.registry import make_policy, make_scorer
from sparse_training.selection.scorers.early import EarlyScorer, pooled
from sparse_training.selection.scorers.history import HistoryScorer
from sparse_training.selection.scorers.model import SelfScorer
from sparse_training.selection.scorers.proxy import ProxyScorer
from sparse_training.selection.scorers.reference import ReferenceScorer
from sparse_training.selection.types import Batch, SelectedBatch
from sparse_training.trainer import SparseTrainer
from sparse_training.training.settings import TrainerSettings

SPECS = ("self", "self:0.5", "early:2", "early:5", "proxy", "proxy:resnet", "history")


def trainer_of(scorer, policy="topk", rate=0.25, model=None, **options):
    options = {"dense_start": 0.0, "dense_end": 0.0, "scoring_precision": "float32", **options}
    return make_trainer(model or network(), policy=policy, scorer=scorer, rate=rate, **options)


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def first_step(trainer, loader=None):
    """Everything is built; the batch."""
    loader = loader or resident(shuffle=False)
    trainer.policy.prepare(loader.size)
    trainer.step(trainer.policy, loader, torch.arange(16))
    return loader.load(torch.arange(16))


# --- what they all keep to ------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS[:-1])
def test_scoring_leaves_everything_as_it_was(spec):
    trainer = trainer_of(spec)
    batch = first_step(trainer)
    before, rng = weights(trainer.model), torch.get_rng_state()
    flags = [module.training for module in trainer.model.modules()]
    hooks = [len(module._forward_hooks) for module in trainer.model.modules()]
    scores = trainer.scorer(batch)
    assert not scores.logits.requires_grad
    assert scores.losses.shape == (16,)
    same(weights(trainer.model), before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in trainer.model.modules()] == flags
    assert [len(module._forward_hooks) for module in trainer.model.modules()] == hooks


@pytest.mark.parametrize("policy", ["gate", "topk", "importance", "infobatch"])
@pytest.mark.parametrize("spec", SPECS)
def test_every_policy_takes_every_scorer(spec, policy):
    trainer = trainer_of(None, f"{policy}@{spec}", rate=0.5, dense_start=0.2, dense_end=0.2)
    assert trainer.policy.name == f"{policy}@{spec}"
    history = trainer.fit(resident(), steps=15, evaluate=resident(shuffle=False), evaluations=1)
    assert history.phases == {"warmup": 3, "sparse": 9, "anneal": 3}
    if policy == "topk":
        assert history.rate == pytest.approx(0.5, abs=0.05)
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())


@pytest.mark.parametrize("policy", ["gate", "topk", "importance", "infobatch"])
@pytest.mark.parametrize("spec", ["self:0.5", "early:2", "proxy", "history", "reference"])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, spec, policy):
    torch.save(network(seed=9).state_dict(), tmp_path / "reference.pt")
    spec = f"reference:{tmp_path / 'reference.pt'}" if spec == "reference" else spec

    def run(folder, stop_at=None, resume=False):
        torch.manual_seed(5 + resume)
        trainer = trainer_of(spec, policy, rate=0.3, dense_start=0.2, dense_end=0.2, lr=1e-2)
        stop = iter(range(1, 100))
        trainer.fit(
            resident(), steps=14, checkpoint=tmp_path / folder, resume=resume, stop=lambda: next(stop) == stop_at
        )
        scorer = trainer.policy.state_dict()
        return weights(trainer.model), trainer.optimizer.state_dict(), scorer

    whole = run("whole")
    run("part", stop_at=7)
    same(run("part", resume=True), whole)


def test_a_run_is_not_gone_on_with_another_scorer(tmp_path):
    trainer_of("early:2").fit(resident(), steps=2, checkpoint=tmp_path)
    with pytest.raises(UserError, match=r"scorer EarlyScorer\(layer=2\) is now EarlyScorer\(layer=5\)"):
        trainer_of("early:5").fit(resident(), steps=2, checkpoint=tmp_path, resume=True)


# --- early ----------------------------------------------------------------------------------------


def test_layers_behind_the_early_one_run_on_the_kept_rows_alone():
    trainer = trainer_of("early:2")
    first_step(trainer)
    rows = {name: [] for name in ("0", "3", "9")}
    for name, seen in rows.items():
        trainer.model.get_submodule(name).register_forward_hook(
            lambda module, arguments, output, seen=seen: seen.append(len(output))
        )
    trainer.step(trainer.policy, resident(shuffle=False), torch.arange(16))
    assert rows == {"0": [16, 4], "3": [4], "9": [4]}


def test_an_early_step_costs_the_early_layers_once_and_the_kept_rows_wholly():
    """Counted: nothing else is multiplied but the head, [16 or 4, 64] by [64, 4]."""
    trainer, loader = trainer_of("early:2"), resident(shuffle=False)
    first_step(trainer)
    step = flops(lambda: trainer.step(trainer.policy, loader, torch.arange(16)))
    plain = SparseTrainer(network(), policy="dense")
    x, y = loader.fetch(torch.arange(4))
    train = flops(lambda: plain.learn(SelectedBatch(x, y, 4)))
    early = 16 * 2 * 9 * 4 * 64  # the first convolution: 1 x 3 x 3 to 4 channels of 8 x 8
    head = (16 + 2 * 4) * 2 * 64 * CLASSES  # scoring; forward, and the weights' gradient
    assert step == early + train + head
    whole = trainer_of("self")
    first_step(whole)
    assert flops(lambda: whole.step(whole.policy, loader, torch.arange(16))) == train + 16 * flops(
        lambda: plain.model(x)
    ) / len(x)


def test_features_are_means_over_a_grid_of_evaluation_statistics():
    trainer = trainer_of("early:2")
    batch = first_step(trainer)
    found = trainer.scorer.features(batch.inputs)
    layer = trainer.model[:3].eval()(batch.inputs)
    torch.testing.assert_close(found, layer.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5)).flatten(1))
    assert pooled(torch.ones(2, 3, 7, 9)).shape == (2, 3 * 4 * 3)
    assert torch.equal(pooled(torch.arange(12.0).view(1, 3, 4)), torch.tensor([[4.0, 5, 6, 7]]))
    assert pooled(torch.ones(2, 5)).shape == (2, 5)


def test_the_head_learns_and_nothing_of_it_reaches_the_model():
    trainer = trainer_of("early:5", rate=0.5, dense_start=0.5, dense_end=0.5, lr=1e-2)
    trainer.scorer.lr = 1e-2
    plain = SparseTrainer(
        network(),
        policy="dense",
        dense_start=0.5,
        dense_end=0.5,
        lr=1e-2,
        settings=TrainerSettings(scoring_precision="float32"),
    )
    for either in (trainer, plain):
        torch.manual_seed(3)
        either.fit(resident(), steps=90)
    same(weights(trainer.model), weights(plain.model))
    batch = resident(shuffle=False).load(torch.arange(ROWS))
    assert trainer.scorer(batch).losses.mean() < 0.5 * math.log(CLASSES)  # of a head that knows nothing


def test_the_head_learns_too_where_hooks_do_not_run():
    trainer = trainer_of("early:2")
    batch = first_step(trainer)
    trainer.scorer._seen = []
    before = weights(trainer.scorer.require_auxiliary().net)
    trainer.scorer.learn(trainer.head(batch, 4))
    after = weights(trainer.scorer.require_auxiliary().net)
    assert not torch.equal(before["1.weight"], after["1.weight"])


@pytest.mark.parametrize(
    ("layer", "words"),
    [("other", r"no layer 'other'; use one of pair, spare"), ("spare", "'spare' is not run"), ("pair", "got a tuple")],
)
def test_layers_that_do_not_do_are_refused(layer, words):
    with pytest.raises(UserError, match=words):
        first_step(trainer_of(EarlyScorer(layer), model=Spare()))


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Spare(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair, self.spare, self.out = Pair(), nn.Identity(), nn.Linear(64, CLASSES)

    def forward(self, x):
        return self.out(self.pair(x)[0].flatten(1))


# --- self, proxy, reference, history ----------------------------------------------------------------


def test_a_lower_resolution_scores_the_pooled_images_for_less():
    trainer = trainer_of("self:0.5")
    batch = first_step(trainer)
    full = trainer_of("self")
    full.model.load_state_dict(trainer.model.state_dict())
    small = batch._replace(inputs=F.avg_pool2d(batch.inputs, 2))
    same(trainer.scorer(batch).logits, full.scorer(small).logits)
    assert flops(lambda: trainer.scorer(batch)) == pytest.approx(flops(lambda: full.scorer(batch)) / 4, rel=0.05)


def test_what_cannot_be_scored_at_a_lower_resolution_is_refused():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
    with pytest.raises(UserError, match=r"resolution 0.5: the model takes no images of \[4, 4\] pixels"):
        first_step(SparseTrainer(flat, policy="topk", scorer="self:0.5", dense_start=0))
    vectors = SparseTrainer(nn.Linear(3, CLASSES), policy="topk", scorer="self:0.5", dense_start=0)
    with pytest.raises(UserError, match=r"needs images, float \[B, C, H, W\], got inputs of shape \[4, 3\]"):
        vectors.check(Batch(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), None, 4))
    with pytest.raises(UserError, match=r"`resolution` must be .*, got 1\.5"):
        SelfScorer(resolution=1.5)


def test_the_proxy_alone_sees_the_rows_that_are_scored():
    proxy = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
    trainer = trainer_of(ProxyScorer(proxy, lr=1e-2))
    before = weights(proxy)
    batch = first_step(trainer)
    net = trainer.scorer.require_auxiliary().net
    same(weights(proxy), before)  # a copy is trained
    assert not torch.equal(net[1].weight, proxy[1].weight)
    seen = []
    trainer.model[0].register_forward_hook(lambda module, arguments, output: seen.append(len(output)))
    scores = trainer.scorer(batch)
    assert not seen
    same(scores.logits, net(batch.inputs).detach())
    with pytest.raises(UserError, match=r"the proxy cnn-tiny is for images, \[B, C, H, W\]"):
        SparseTrainer(nn.Linear(3, 2), policy="topk", scorer="proxy").check(
            Batch(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), None, 4)
        )


def test_a_reference_is_taken_away_and_run_once_a_row():
    reference, loader = network(seed=3), resident(shuffle=False)
    trainer = trainer_of(ReferenceScorer(reference))
    batch = first_step(trainer, loader)
    runs = []
    reference.register_forward_hook(lambda module, arguments, output: runs.append(len(output)))
    trainer.scorer.table.fill_(torch.nan)
    index = torch.tensor([3, 5, 20, 4])
    found = [trainer.scorer(loader.load(rows)).losses for rows in (index, torch.arange(16), index)]
    assert runs == [4, 13]
    own = F.cross_entropy(trainer.model.eval()(batch.inputs), batch.targets, reduction="none")
    theirs = F.cross_entropy(reference(batch.inputs), batch.targets, reduction="none")
    torch.testing.assert_close(found[1], own - theirs)
    assert torch.equal(found[0], found[2])
    assert not reference.training
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    no_numbers = batch._replace(ids=None)
    torch.testing.assert_close(trainer.scorer(no_numbers).losses, own - theirs)


def test_a_reference_counts_in_a_significance_as_the_loss_does():
    gate = Gate(0.25, significance=Significance(loss=0.5, entropy=0.5))
    trainer = trainer_of(ReferenceScorer(network(seed=3)), gate)
    batch = first_step(trainer)
    scores = trainer.scorer(batch)
    trainer.policy.select(scores, batch)
    p = scores.logits.softmax(1)
    loss = F.cross_entropy(scores.logits, batch.targets, reduction="none")
    wanted = 0.5 * (loss + scores.offset) - 0.5 * (p * p.log()).sum(1)
    torch.testing.assert_close(gate.last.significance, wanted)
    trainer = trainer_of(ReferenceScorer(network(seed=3)), Gate(grad_norm_fraction=0.9))
    with pytest.raises(UserError, match="use a significance with a term of the loss"):
        first_step(trainer)


def test_a_reference_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        trainer_of(f"reference:{tmp_path / 'none.pt'}")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt is no state of the model"):
        trainer_of(f"reference:{tmp_path / 'other.pt'}")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match=r"text\.pt holds nothing that torch.save writes"):
        trainer_of(f"reference:{tmp_path / 'text.pt'}")


def test_by_history_what_is_left_out_is_neither_loaded_nor_run():
    trainer, loader = trainer_of("history"), resident(shuffle=False)
    assert trainer.policy.before_loading
    trainer.policy.prepare(loader.size)
    trainer.policy.observe(torch.arange(16), torch.arange(16.0), None)
    seen = []
    trainer.model[0].register_forward_hook(lambda module, arguments, output: seen.append(len(output)))
    trainer._checked = True
    batch, kept = trainer.step(trainer.policy, loader, torch.arange(16))
    assert batch.ids.tolist() == [12, 13, 14, 15]
    assert seen == [4]
    assert (kept.rows, batch.offered) == (4, 16)


def test_by_history_rows_that_were_never_trained_on_come_first_and_losses_without_a_value_are_left_out():
    scorer = HistoryScorer()
    scorer.attach(network(), F.cross_entropy, device=torch.device("cpu"))
    scorer.prepare(6)
    scorer.observe(torch.tensor([0, 1]), torch.tensor([3.0, 1.0]))
    scorer.observe(torch.tensor([0, 2]), torch.tensor([torch.nan, 2.0]))
    assert scorer.recall(torch.tensor([0, 1, 2, 5])).losses.tolist() == [3.0, 1.0, 2.0, 3.0]
    loaded = HistoryScorer()
    loaded.load_state_dict(scorer.state_dict())
    with pytest.raises(UserError, match="a table of 6 rows, got 7"):
        loaded.prepare(7)
    scorer.prepare(7)  # another run
    assert scorer.table.scores.isnan().all()
    with pytest.raises(UserError, match="asks for rows by their number"):
        HistoryScorer().prepare(None)


def test_a_state_of_the_history_scorer_is_its_losses():
    """As saved before the table had a type of its own."""
    scorer = HistoryScorer()
    scorer.attach(network(), F.cross_entropy, device=torch.device("cpu"))
    scorer.set_extra_state({"table": torch.tensor([1.0, torch.nan, -2.0])})
    scorer.prepare(3)
    assert scorer.recall(torch.arange(3)).losses.tolist() == [1.0, 1.0, -2.0]
    assert list(scorer.get_extra_state()) == ["table"]
    assert scorer.get_extra_state()["table"].nan_to_num(9.0).tolist() == [1.0, 9.0, -2.0]


def test_rows_drawn_by_history_estimate_the_mean_of_those_offered():
    policy = GatePolicy(gate=Gate(0.3, temperature=0.5, p_min=0.05))
    policy.scorer = HistoryScorer()
    policy.scorer.attach(network(), F.cross_entropy, device=torch.device("cpu"))
    losses = torch.rand(256, generator=torch.Generator().manual_seed(0)) * 4
    policy.prepare(256)
    policy.observe(torch.arange(256), losses, None)
    loader = resident(256, batch_size=256)
    estimates = []
    for _ in range(300):
        choice = policy.choose(loader.offer(torch.arange(256)))
        kept = policy.select(policy.score(None), loader.load(torch.arange(256), choice))
        estimates.append((losses[choice.index] * kept.weight).sum() / kept.divisor)
    estimates = torch.stack(estimates[50:])
    assert abs(estimates.mean() - losses.mean()) < 4 * estimates.std() / len(estimates) ** 0.5


# --- by name --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", ["best", "self:", "early", "early:", "reference", "history:3", "self:big", "", "self:0", "proxy:"]
)
def test_names_that_there_are_not_are_refused(wrong):
    with pytest.raises(UserError, match=r"(`scorer`|`resolution`) .*must"):
        make_scorer(wrong)


def test_names_and_their_arguments():
    assert make_scorer("self:0.5").resolution == 0.5
    assert make_scorer("early:layer.1").layer == "layer.1"
    assert make_scorer("proxy")._given == (ModelFactory("cnn-tiny"),)
    assert make_scorer("proxy:module:factory")._given == (ModelFactory("module:factory"),)
    assert make_scorer("reference:/a/b.pt")._reference == "/a/b.pt"


def test_a_scorer_for_who_asks_none_is_refused():
    for name in ("dense", "random", "masked"):
        with pytest.raises(UserError, match=f"for the policy {name}, which takes none"):
            make_policy(name, rate=0.1, seed=0, scorer="early:2")
    with pytest.raises(UserError, match="give one scorer"):
        make_policy("gate@self", rate=0.1, seed=0, scorer="early:2")
