"""The trainer: what a step does, what it refuses, and that a run goes on bit for bit."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainer_parts import CLASSES, ROWS, Fixed, network, resident, same, shuffled_stream, weights
from trainers import NAMES, make_trainer

from sparse_training.errors import UserError
from sparse_training.gate.gate import Gate
from sparse_training.selection.policies.base import Policy
from sparse_training.selection.scorers.base import Scorer
from sparse_training.selection.types import Scores, SelectedBatch
from sparse_training.trainer import SparseTrainer
from sparse_training.training.schedule import Schedule
from sparse_training.training.settings import TrainerSettings

# --- a step -------------------------------------------------------------------------------------


def test_dense_training_equals_a_plain_loop():
    model, plain = network(), network()
    torch.manual_seed(5)
    SparseTrainer(
        model,
        policy="dense",
        schedule="constant",
        dense_start=0,
        dense_end=0,
        settings=TrainerSettings(channels_last=False),
    ).fit(resident(), steps=6)
    torch.manual_seed(5)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, fused=True)
    loader, step = resident(), 0
    for _ in range(2):
        for index in loader:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (0.1 if step == 0 else 1.0)
            x, y = loader.fetch(index)
            optimizer.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            optimizer.step()
            step += 1
    same(weights(model), weights(plain))


def test_only_the_kept_rows_are_seen_by_the_model():
    model, plain = network(), network()
    trainer = SparseTrainer(
        model, policy=Fixed([1, 5]), dense_start=0, dense_end=0, settings=TrainerSettings(channels_last=False)
    )
    loader = resident(shuffle=False)
    torch.manual_seed(5)
    trainer.step(trainer.policy, loader, torch.arange(16))
    torch.manual_seed(5)
    x, y = loader.fetch(torch.tensor([1, 5]))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, fused=True)
    F.cross_entropy(plain(x), y).backward()
    optimizer.step()
    same(weights(model), weights(plain))


class Watching(Fixed):
    """Notes what it is told."""

    phased = False

    def __init__(self, positions):
        super().__init__(positions)
        self.told, self.progress = [], []

    def prepare(self, rows, targets=None, duplicate_counts=None):
        self.rows, self.targets, self.copies = rows, targets, duplicate_counts

    def set_progress(self, progress):
        self.progress.append(progress)

    def observe(self, ids, losses, logits):
        self.told.append((ids, losses, logits))


def test_a_policy_is_told_of_the_data_and_what_the_model_made_of_its_rows_before_the_step():
    model, policy = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)), Watching([3, 0])
    before, loader = copy.deepcopy(model), resident(shuffle=False)
    SparseTrainer(model, policy=policy, settings=TrainerSettings(channels_last=False)).fit(loader, steps=1)
    assert policy.rows == ROWS
    assert policy.targets is loader.labels
    assert torch.equal(policy.copies(), loader.duplicate_counts())
    ((ids, losses, logits),) = policy.told
    x, y = loader.fetch(torch.tensor([3, 0]))
    same(ids, torch.tensor([3, 0]))
    same(logits, before(x).detach())
    same(losses, F.cross_entropy(logits, y, reduction="none"))
    assert not logits.requires_grad


def test_a_policy_without_phases_chooses_from_the_first_step_to_the_last():
    policy = Watching([0, 1])
    history = SparseTrainer(network(), policy=policy, dense_start=0.3, dense_end=0.3).fit(resident(), steps=10)
    assert policy.progress == [step / 10 for step in range(10)]
    assert all(len(ids) == 2 for ids, _, _ in policy.told)
    assert history.phases == {"warmup": 0, "sparse": 10, "anneal": 0}


def test_a_batch_with_nothing_selected_takes_no_step():
    model = network()
    trainer = SparseTrainer(model, policy=Fixed([]), dense_start=0.5, dense_end=0)
    loader = resident()
    trainer.fit(loader, steps=4)
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {2}
    before = weights(model)
    trainer.step(trainer.policy, loader, torch.arange(16))
    same(weights(model), before)


def test_a_padded_batch_with_nothing_selected_takes_no_step():
    class Padded(Policy):
        def select(self, scores, batch):
            none = torch.tensor(0)
            index, weight = torch.zeros(4, dtype=torch.int64), torch.zeros(4)
            return SelectedBatch(batch.inputs[index], batch.targets[index], none, index, weight, none.clamp(min=1))

    model = network()
    trainer = SparseTrainer(model, policy=Padded(), dense_start=0.5, dense_end=0)
    history = trainer.fit(resident(), steps=4)
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {2}
    assert int(history.kept) == 0


class Told(Scorer):
    """A loss for each row of a batch, that of the first one not a number; whatever the batch holds."""

    name = "told"

    def forward(self, batch):
        losses = torch.linspace(0.0, 2.0, batch.rows)
        losses[0] = torch.nan
        return Scores(batch.targets, self.criterion, losses=losses)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_first_row_that_is_not_finite_is_no_part_of_a_padded_step(temperature):
    """Padding stands for no row; a weight of 0 would not keep a NaN out of the loss and of BatchNorm."""
    found = []
    for value in (torch.nan, 0.0):
        data = [batch[:2] for batch in map(resident().load, resident(shuffle=False))]
        for images, _ in data:
            images[0] = value
        model = network()
        gate = Gate(0.4, capacity=14, threshold=1.0, temperature=temperature)
        trainer = SparseTrainer(
            model, policy=gate, scorer=Told(), dense_start=0, dense_end=0, settings=TrainerSettings(channels_last=False)
        )
        torch.manual_seed(5)
        history = trainer.fit(data, steps=6)
        assert 6 < int(history.rows_trained) < 6 * 12  # padding in every step
        found.append(weights(model))
    assert all(value.isfinite().all() for value in found[0].values())
    same(*found)


def test_weighted_rows_give_the_weighted_gradient():
    trainer = SparseTrainer(nn.Linear(3, 2), optimizer=torch.optim.SGD, lr=1.0)
    plain = copy.deepcopy(trainer.model)
    x, y, weight = torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), torch.tensor([1.0, 4.0, 2.0, 0.0])
    trainer.learn(SelectedBatch(x, y, 3, None, weight, 16))
    ((F.cross_entropy(plain(x), y, reduction="none") * weight).sum() / 16).backward()
    for new, old in zip(trainer.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(new, old - old.grad)


def test_one_row_trains_with_batchnorm_over_a_vector():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    statistics = model[2].running_mean.clone()
    history = SparseTrainer(model, policy="dense").fit(resident(batch_size=1), steps=3)
    assert int(history.rows_trained) == 3
    assert torch.equal(model[2].running_mean, statistics)
    assert model[2].training


@pytest.mark.parametrize("policy", NAMES)
@pytest.mark.parametrize(("rate", "batch_size"), [(1.0, 16), (0.1, 1), (0.3, 44), (0.5, 43)])
def test_rates_and_batch_sizes_at_their_ends(policy, rate, batch_size):
    trainer = make_trainer(network(), policy=policy, rate=rate, dense_start=0, dense_end=0)
    history = trainer.fit(resident(batch_size=batch_size), epochs=2)
    assert history.rows_seen == 2 * ROWS
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    if rate == 1.0 and policy not in ("gate", "infobatch", "masked"):
        assert int(history.rows_trained) == history.rows_seen


def test_gradients_are_clipped():
    trainer = SparseTrainer(
        nn.Linear(3, 2), optimizer=torch.optim.SGD, lr=1.0, settings=TrainerSettings(clip_norm=0.01)
    )
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.learn(SelectedBatch(torch.randn(4, 3) * 100, torch.tensor([0, 1, 1, 0]), 4))
    moved = torch.cat([(new - old).flatten() for new, old in zip(trainer.model.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_reduced_precision_training_learns(amp):
    torch.manual_seed(0)
    trainer = SparseTrainer(network(), policy="dense", lr=1e-2, settings=TrainerSettings(amp=amp))
    assert trainer.update.scaler.is_enabled() == (amp == "float16")
    before = trainer.evaluate(resident())["loss"]
    trainer.fit(resident(), steps=40)
    assert trainer.evaluate(resident())["loss"] < before


# --- a run --------------------------------------------------------------------------------------


def test_phases_and_counts():
    trainer = SparseTrainer(network(), policy="random", rate=0.25, dense_start=0.1, dense_end=0.25)
    history = trainer.fit(resident(batch_size=11), steps=20)
    assert history.phases == {"warmup": 2, "sparse": 13, "anneal": 5}
    assert history.rows_seen == 220
    assert int(history.rows_trained) == 7 * 11 + 13 * round(0.25 * 11)
    assert history.rate == pytest.approx(3 / 11)


def test_the_gate_is_reported_as_it_chose():
    trainer = SparseTrainer(network(), policy="gate", rate=0.3, dense_start=0.2, dense_end=0.2)
    kept = []
    select = trainer.policy.select
    trainer.policy.select = lambda scores, batch: kept.append(select(scores, batch)) or kept[-1]
    history = trainer.fit(resident(), steps=60)
    total = sum(len(rows.targets) for rows in kept)
    assert int(history.kept) == total == int(history.selected.sum())
    assert history.offered == int(history.seen.sum())
    assert history.rate == total / history.offered
    assert int(history.rows_trained) == total + history.rows_seen - history.offered
    trace = history.to_dict()["trace"]
    assert 0 < len(trace) <= 500
    assert {"step", "rate", "threshold", "mass"} == set(trace[0])
    assert [point["step"] for point in trace] == list(range(13, 49))  # every one of so few
    for point, rows in zip(trace, kept, strict=True):
        assert 0.0 < point["mass"] <= 1.0 if len(rows.targets) else point["mass"] == 0.0
    history.trace = [point[:3] for point in history.trace]  # of a checkpoint that is older than the mass
    assert [{**point, "mass": trace[i]["mass"]} for i, point in enumerate(history.to_dict()["trace"])] == trace


def test_selected_rows_are_counted_by_their_number_in_the_data_set():
    trainer = SparseTrainer(network(), policy=Fixed([0, 2]), dense_start=0, dense_end=0)
    loader = resident()
    order = loader.order(0)
    history = trainer.fit(loader, steps=1)
    assert sorted(history.selected.nonzero().flatten().tolist()) == sorted([order[0].item(), order[2].item()])
    assert sorted(history.seen.nonzero().flatten().tolist()) == sorted(order[:16].tolist())


def test_learning_rate_follows_progress():
    schedule = Schedule(shape="cosine", lr_warmup=0.1)
    assert schedule.factor(0.0) == pytest.approx(0.1)
    assert schedule.factor(0.5) == pytest.approx(0.5)
    assert schedule.factor(1.0) == pytest.approx(0.0)
    assert Schedule(shape="constant").factor(0.9) == 1.0
    trainer = SparseTrainer(network(), lr=0.4)
    seen = []
    trainer.fit(resident(), steps=10, progress=lambda status: seen.append(trainer.optimizer.param_groups[0]["lr"]))
    assert seen == [0.4 * trainer.schedule.factor(step / 10) for step in range(10)]


def test_evaluations_are_spaced_and_change_nothing():
    runs = []
    for evaluate in (None, resident(shuffle=False), shuffled_stream(), lambda model: {"accuracy": 0.5}):
        model = network()
        torch.manual_seed(1)
        trainer = SparseTrainer(model, policy="gate", rate=0.3)
        history = trainer.fit(resident(), steps=20, evaluate=evaluate, evaluations=5)
        assert [found["step"] for found in history.evals] == ([4, 8, 12, 16, 20] if evaluate else [])
        runs.append(weights(model))
    for other in runs[1:]:
        same(runs[0], other)


def test_evaluation_is_right():
    model = network()
    found = SparseTrainer(model, settings=TrainerSettings(channels_last=False)).evaluate(resident(shuffle=False))
    x, y = resident().fetch(torch.arange(ROWS))
    logits = model.eval()(x)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == y).float().mean().item())
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)


def test_any_batch_structure():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, a, b):
            return SimpleNamespace(logits=self.layer(a) * b)

    batches = [{"a": torch.randn(6, 3), "b": torch.ones(6, 1), "labels": torch.randint(0, 2, (6,))} for _ in range(3)]
    for policy in ("dense", "random", "gate"):
        history = make_trainer(Model(), policy=policy, rate=0.5).fit(batches, epochs=3)
        assert history.steps == 9
    pairs = DataLoader(TensorDataset(torch.randn(10, 3), torch.randint(0, 2, (10,))), batch_size=4)
    assert SparseTrainer(nn.Linear(3, 2)).fit(pairs, epochs=2, evaluate=pairs).rows_seen == 20
    with pytest.raises(UserError, match="`epochs` needs training data with a length"):
        SparseTrainer(nn.Linear(3, 2)).fit((pair for pair in pairs), epochs=1)


def test_a_missed_rate_is_a_warning():
    class Loose(Gate):
        def forward(self, logits, targets, *, index=None, offset=None):
            self.threshold.zero_()
            return super().forward(logits, targets, index=index, offset=offset)

    trainer = SparseTrainer(network(), policy=Loose(0.1), dense_start=0, dense_end=0)
    history = trainer.fit(resident(), steps=10)
    said = "the target was 10.0%; its threshold settles in 50 batches, and there were 10"
    assert any(text.endswith(said) for text in history.warnings)
    trainer = SparseTrainer(network(), policy=Loose(0.1), dense_start=0, dense_end=0)
    assert any(text.endswith("the target was 10.0%") for text in trainer.fit(resident(), steps=60).warnings)
