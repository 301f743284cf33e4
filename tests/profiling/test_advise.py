"""The advice differs with what a training is bound by, and keeps its promise when it is followed.

Time is counted, not measured: the models and data here move a clock on by their rows (``slow_parts``).
"""

import json

import pytest
import torch
import torch.nn.functional as F
from slow_parts import Slow, SlowBatch, SlowLinear, SlowRows, classifier, install, mostly_easy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.flop_counter import FlopCounterMode
from trainer_parts import network, resident

from sparse_training import Compact, SparseTrainer, advise

LOSS = nn.CrossEntropyLoss(reduction="none")
LR = 0.03
VOCABULARY, LENGTH = 200, 12


@pytest.fixture
def clock(monkeypatch):
    return install(monkeypatch)


class Stream(IterableDataset):
    def __init__(self, inputs, targets):
        self.rows = list(zip(inputs, targets, strict=True))

    def __iter__(self):
        return iter(self.rows)


class Passes:
    """A stream with a length, as epochs need one."""

    def __init__(self, inputs, targets, batch_size=32):
        self.loader, self.length = DataLoader(Stream(inputs, targets), batch_size), -(-len(targets) // batch_size)

    def __iter__(self):
        return iter(self.loader)

    def __len__(self):
        return self.length


def follow(code, model, loader):
    """Run the line of code that the advice gives."""
    return eval(code, {"SparseTrainer": SparseTrainer, "model": model, "loader": loader, "loss": LOSS})


def seconds(clock, work):
    began = clock.now
    result = work()
    return clock.now - began, result


def keeps_its_promise(promised, saved):
    assert saved == pytest.approx(promised, rel=0.2)


def test_a_model_bound_by_its_loader_leaves_rows_unread(clock):
    x, y = mostly_easy(640)
    loader = DataLoader(SlowRows(clock, 1e-3, x, y), batch_size=32, shuffle=True)
    advice = advise(classifier(Slow(clock, 1e-5, 2e-5)), loader, loss=LOSS, lr=LR, steps=60)
    assert advice.method == "infobatch"
    assert advice.times.load > 0.9 * advice.times.total
    assert "waiting for the loader, and rows left out are not even read" in advice.recommendation
    assert "num_workers" in str(advice)
    dense, _ = seconds(clock, lambda: SparseTrainer(
        classifier(Slow(clock, 1e-5, 2e-5)), loss=LOSS, lr=LR, policy="dense").fit(loader, epochs=10))  # fmt: skip
    sparse, log = seconds(clock, lambda: follow(advice.code, classifier(Slow(clock, 1e-5, 2e-5)), loader))
    keeps_its_promise(advice.saving, 1.0 - sparse / dense)
    (bound,) = [bound for bound in advice.methods if bound.method == advice.method]
    keeps_its_promise(bound.saved_rows, 1.0 - int(log.rows_trained) / int(log.rows_seen))


def test_a_model_bound_by_its_backward_draws_rows_of_each_batch_of_a_stream(clock):
    x, y = mostly_easy(640)
    loader = Passes(x, y)
    advice = advise(classifier(Slow(clock, 1e-4, 2e-3)), loader, loss=LOSS, lr=LR, steps=60)
    assert advice.method == "importance@self"
    assert "95% of a step is backward" in advice.recommendation
    dense, whole = seconds(clock, lambda: SparseTrainer(
        classifier(Slow(clock, 1e-4, 2e-3)), loss=LOSS, lr=LR, policy="dense").fit(loader, epochs=10))  # fmt: skip
    sparse, log = seconds(clock, lambda: follow(advice.code, classifier(Slow(clock, 1e-4, 2e-3)), loader))
    keeps_its_promise(advice.saving, 1.0 - sparse / dense)
    (bound,) = [bound for bound in advice.methods if bound.method == advice.method]
    keeps_its_promise(bound.saved_rows, 1.0 - int(log.rows_trained) / int(log.rows_seen))
    flops = [sum(run.operations.values()) for run in (log, whole)]
    keeps_its_promise(bound.saved_flops, 1.0 - flops[0] / flops[1])


class Language(nn.Module):
    """A model of tokens; its head takes most of the time."""

    def __init__(self, clock):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16), nn.ReLU())
        self.slow, self.head = Slow(clock, 1e-5, 2e-5), SlowLinear(clock, 1e-5, 16, VOCABULARY)

    def forward(self, tokens):
        return self.head(self.slow(self.body(tokens)))


def partly_ignored(ignored, batches=20):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (batches, 16, LENGTH + 1), generator=generator)
    targets = tokens[:, :, 1:].clone()
    targets[:, :, :ignored] = -100
    return list(zip(tokens[:, :, :-1], targets, strict=True))


@pytest.mark.parametrize("ignored", [6, 3])
def test_a_token_task_with_labels_ignored_runs_its_head_on_the_others(clock, ignored):
    batches = partly_ignored(ignored)
    advice = advise(Language(clock), batches, loss=LOSS, steps=20)
    assert advice.method == "head"
    assert advice.facts["ignored"] == ignored / LENGTH
    (bound,) = [bound for bound in advice.methods if bound.method == "head"]
    model = Language(clock)

    def step(tokens, targets, packed):
        hidden = model.slow(model.body(tokens))
        if packed:
            scope = {"Compact": Compact, "hidden": hidden, "targets": targets}
            exec(advice.code, scope)
            hidden, targets = scope["hidden"], scope["targets"]
        logits = model.head(hidden)
        F.cross_entropy(logits.reshape(-1, VOCABULARY), targets.reshape(-1)).backward()

    spent, counted, gradients = {}, {}, {}
    for packed in (False, True):
        model.zero_grad()
        with FlopCounterMode(display=False) as counter:
            spent[packed], _ = seconds(clock, lambda packed=packed: step(*batches[0], packed))
        counted[packed] = counter.get_total_flops()
        gradients[packed] = [parameter.grad.clone() for parameter in model.parameters()]
    torch.testing.assert_close(gradients[True], gradients[False])  # nothing is left out that teaches
    keeps_its_promise(advice.saving, 1.0 - spent[True] / spent[False])
    keeps_its_promise(bound.saved_flops, 1.0 - counted[True] / counted[False])


@pytest.mark.parametrize("kind", ["DataLoader", "stream"])
def test_where_all_rows_are_alike_there_is_nothing_to_gain(clock, kind):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(640, 8, generator=generator), torch.randint(0, 2, (640,), generator=generator)
    model = classifier(Slow(clock, 1e-3, 2e-3))
    loader = DataLoader(SlowRows(clock, 1e-4, x, y), batch_size=32) if kind == "DataLoader" else Passes(x, y)
    advice = advise(model, loader, loss=LOSS, lr=LR, steps=60)
    assert (advice.method, advice.saving) == ("dense", 0.0)
    reason = "rows are too alike" if kind == "DataLoader" else "scoring costs as much as leaving rows out would save"
    assert advice.recommendation.startswith(f"Nothing to gain here: {reason}")
    log = follow(advice.code, model, loader)
    assert int(log.rows_trained) == log.rows_seen


def test_scoring_that_costs_a_forward_pass_is_on_the_bill(clock):
    x, y = mostly_easy(640)
    advice = advise(classifier(Slow(clock, 1e-3, 2e-3)), Passes(x, y), loss=LOSS, lr=LR, steps=60)
    bound = {bound.method: bound for bound in advice.methods}["importance@self"]
    assert bound.scorer_cost == pytest.approx(1.0, rel=1e-3)
    assert bound.bound == pytest.approx(3.0 / (1.0 + 3.0 * bound.rate), rel=1e-2)
    assert bound.saving == pytest.approx(0.825 * (1.0 - 1.0 / bound.speedup))


def test_batches_that_the_user_arranged_get_smaller_in_place_of_fewer(clock):
    x, y = mostly_easy(640)
    batches = [list(range(start, start + 32)) for start in range(0, 640, 32)]
    loader = DataLoader(SlowRows(clock, 1e-5, x, y), batch_sampler=batches)

    def model():
        return classifier(SlowBatch(clock, 0.1), Slow(clock, 1e-5, 2e-5))

    advice = advise(model(), loader, loss=LOSS, lr=LR, steps=60)
    (bound,) = [bound for bound in advice.methods if bound.method == "infobatch"]
    assert bound.saving < 0.02  # the batch's own price stays
    dense, _ = seconds(clock, lambda: SparseTrainer(
        model(), loss=LOSS, lr=LR, policy="dense").fit(loader, epochs=10))  # fmt: skip
    sparse, _ = seconds(clock, lambda: follow(bound.code, model(), loader))
    assert 1.0 - sparse / dense == pytest.approx(bound.saving, abs=0.01)


def test_a_run_of_one_pass_has_no_past_losses_to_prune_by(clock):
    x, y = mostly_easy(640)
    loader = DataLoader(SlowRows(clock, 1e-3, x, y), batch_size=32, shuffle=True)
    advice = advise(classifier(Slow(clock, 1e-5, 2e-5)), loader, loss=LOSS, lr=LR, steps=60, epochs=1)
    assert {bound.method: bound for bound in advice.methods}["infobatch"].saving == 0.0
    assert advice.method != "infobatch"


def test_data_in_memory_and_the_trainer_alone_reach_the_advice(clock):
    advice = advise(network(), resident(), steps=12)
    assert {"infobatch", "importance", "importance@self", "gate"} == {bound.method for bound in advice.methods}


def test_it_is_plain_data_and_plain_text(clock):
    x, y = mostly_easy(320)
    advice = advise(classifier(Slow(clock, 1e-4, 2e-4)), Passes(x, y), loss=LOSS, steps=12)
    again = json.loads(json.dumps(advice.to_dict(), allow_nan=False))
    assert again["recommendation"] == advice.recommendation
    assert again["losses"]["top"].keys() == {"10", "25", "50"}
    assert sum(again["times"][stage] for stage in ("load", "forward", "backward", "optimizer")) == pytest.approx(
        again["times"]["total"]
    )
    text = str(advice)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 120
    for part in ("A step on 32 rows takes 9.6 ms", "importance@self", advice.code, "top 10%"):
        assert part in text
    with pytest.raises(AttributeError):
        advice.method = "gate"
