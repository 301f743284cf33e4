"""Edges of scorers that mutation testing found untested: states, tables and auxiliary scorers."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from scorer_parts import network, resident
from torch import nn

from sparse_training.errors import UserError
from sparse_training.selection.registry import make_scorer
from sparse_training.selection.scorers.history import HistoryScorer
from sparse_training.selection.scorers.model import SelfScorer
from sparse_training.selection.scorers.proxy import ProxyScorer
from sparse_training.selection.scorers.reference import ReferenceScorer
from sparse_training.selection.types import Batch
from sparse_training.trainer import SparseTrainer

CPU = torch.device("cpu")


def history(rows=None):
    scorer = HistoryScorer()
    scorer.attach(nn.Identity(), F.cross_entropy, device=CPU)
    if rows is not None:
        scorer.prepare(rows)
    return scorer


def test_a_history_that_was_not_prepared_has_an_empty_state():
    assert history().get_extra_state() == {}
    history().load_state_dict(history().state_dict())


def test_a_history_is_prepared_again_for_other_rows_though_none_was_trained_on():
    scorer = history(6)
    scorer.prepare(7)
    assert len(scorer.recall(torch.arange(7)).losses) == 7


def test_losses_below_zero_are_kept_by_a_history_that_came_from_a_state():
    scorer = history()
    scorer.set_extra_state({"table": torch.tensor([1.0, -2.0])})
    scorer.prepare(2)
    scorer.observe(torch.tensor([0]), torch.tensor([-3.0]))
    assert scorer.recall(torch.arange(2)).losses.tolist() == [-3.0, -2.0]


def test_no_loss_of_a_loaded_history_counts_as_not_finite():
    scorer = history()
    scorer.set_extra_state({"table": torch.tensor([1.0, torch.nan])})
    assert scorer.table.invalid == 0


def test_a_row_never_trained_on_ranks_with_the_largest_known_loss():
    scorer = history(3)
    scorer.observe(torch.tensor([0, 1]), torch.tensor([0.5, 0.25]))
    assert scorer.recall(torch.tensor([0, 1, 2])).losses.tolist() == [0.5, 0.25, 0.5]
    assert scorer.recall(torch.empty(0, dtype=torch.int64)).losses.tolist() == []


def reference_trainer(reference, **options):
    scorer = ReferenceScorer(reference, **options)
    return SparseTrainer(network(), policy="topk", scorer=scorer, rate=0.25, dense_start=0, dense_end=0, lr=1e-3)


def test_a_reference_that_goes_on_from_a_state_runs_on_no_row_again():
    loader, reference = resident(shuffle=False), network(seed=3)
    first, second = (reference_trainer(model) for model in (network(seed=3), reference))
    first.fit(loader, steps=3)
    state = first.scorer.get_extra_state()
    assert len(state["table"]) == loader.size
    assert not state["table"].isnan().any()
    runs = []
    reference.register_forward_hook(lambda module, arguments, output: runs.append(len(output)))
    second.scorer.set_extra_state(state)
    second.fit(loader, steps=3)
    assert runs == []


def test_a_reference_without_a_table_has_an_empty_state():
    assert ReferenceScorer(network()).get_extra_state() == {}


def test_the_proxy_that_a_reference_is_subtracted_from_learns():
    loader = resident(shuffle=False)
    proxy = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    trainer = reference_trainer(network(seed=3), of=ProxyScorer(proxy, lr=1e-2))
    trainer.fit(loader, steps=1)
    net = trainer.scorer.of.require_auxiliary().net
    assert not torch.equal(net[1].weight, proxy[1].weight)


def test_a_reference_file_may_hold_the_state_under_model(tmp_path):
    reference = network(seed=3)
    torch.save({"model": reference.state_dict()}, tmp_path / "a.pt")
    torch.save(reference.state_dict(), tmp_path / "b.pt")
    tables = []
    for name in ("a.pt", "b.pt"):
        trainer = reference_trainer(tmp_path / name)
        trainer.fit(resident(shuffle=False), steps=3)
        tables.append(trainer.scorer.table)
    assert torch.equal(*tables)
    assert not tables[0].isnan().any()
    direct = reference_trainer(reference)
    direct.fit(resident(shuffle=False), steps=3)
    torch.testing.assert_close(direct.scorer.table, tables[0])


def test_a_scorer_that_chooses_before_loading_is_no_part_of_a_reference():
    with pytest.raises(ValueError, match="`of` must be a scorer that scores batches, got history"):
        ReferenceScorer(network(), of=HistoryScorer())


def test_inputs_that_have_no_resolution_are_named_by_their_type():
    scorer = SelfScorer(resolution=0.5)
    scorer.attach(nn.Identity(), F.cross_entropy, device=CPU)
    with pytest.raises(UserError, match="got inputs of type SimpleNamespace"):
        scorer(Batch(SimpleNamespace(), torch.zeros(4, dtype=torch.int64), None, 4))


def test_what_a_history_recalls_is_scored_by_the_loss_it_was_attached_with():
    scorer = history(2)
    assert scorer.recall(torch.arange(2)).criterion is F.cross_entropy


def test_a_proxy_names_its_model():
    assert repr(ProxyScorer(nn.Linear(2, 2))) == "ProxyScorer(model=Linear)"
    assert "model=cnn-tiny" in repr(make_scorer("proxy"))


def test_a_proxy_learns_at_the_rate_that_it_was_given():
    moved = []
    for lr in (1e-4, 1e-1):
        proxy = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
        trainer = SparseTrainer(
            network(), policy="topk", scorer=ProxyScorer(proxy, lr=lr), rate=0.5, dense_start=0, dense_end=0, lr=1e-3
        )
        trainer.fit(resident(shuffle=False), steps=1)
        moved.append(float((trainer.scorer.require_auxiliary().net[1].weight - proxy[1].weight).abs().max()))
    assert moved[0] < 0.01 < moved[1]


def test_the_learning_rate_of_a_proxy_follows_the_trainers():
    with pytest.raises(UserError, match=r"`lr` must be above 0 and finite, got 0$"):
        ProxyScorer(nn.Linear(2, 2), lr=0)
    proxy = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    trainer = SparseTrainer(
        network(), policy="topk", scorer=ProxyScorer(proxy, lr=0.02), rate=0.5, dense_start=0, dense_end=0
    )
    trainer.fit(resident(), steps=1, progress=False)
    trainer.set_learning_rate(0.5)
    assert [group["lr"] for group in trainer.scorer.auxiliary.optimizer.param_groups] == [0.01]


def test_a_scorer_shows_the_settings_that_it_has():
    assert "resolution" not in repr(SelfScorer())
    assert "resolution=0.5" in repr(SelfScorer(resolution=0.5))
