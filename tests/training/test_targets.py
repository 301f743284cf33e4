"""Targets are what the loss says: integers are not classes by themselves, and ignored ones are known to the loss."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_training import Criterion, ResidentLoader, SparseTrainer
from sparse_training.errors import UserError

POLICIES = ["adaptive+deduplicate", "dense", "random", "gate", "topk", "importance", "infobatch"]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


class Column(nn.Module):
    """Takes the one output of each row."""

    def forward(self, inputs):
        return inputs.squeeze(1)


def images(labels):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (len(labels), 1, 4, 4), dtype=torch.uint8, generator=generator)
    return ResidentLoader(SimpleNamespace(images=pixels, labels=labels), batch_size=32, std=(0.25,))


# --- integers that are no classes ---------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_counts_are_no_classes(policy):
    """Ages by a Poisson loss: trained on as the same numbers in floating point are."""
    ages = torch.poisson(torch.full((256,), 30.0), generator=torch.Generator().manual_seed(1)).long()
    found = []
    for labels in (ages, ages.float()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1), Column())
        trainer = SparseTrainer(model, loss=nn.PoissonNLLLoss(reduction="none"), policy=policy)
        log = trainer.fit(images(labels), epochs=10, evaluate=images(labels), evaluations=1)
        assert "accuracy" not in log.evals[-1]
        assert log.evals[-1]["loss"] < 0.0
        found.append(weights(model))
    same(*found)


def ordinal_loss(logits, targets):
    """Cumulative logits: K - 1 outputs say whether the rank is above each of K - 1 others."""
    above = (targets[:, None] > torch.arange(logits.shape[1])).float()
    return F.binary_cross_entropy_with_logits(logits, above, reduction="none").sum(1)


@pytest.mark.parametrize("policy", POLICIES)
def test_ranks_are_no_classes(policy):
    ranks = torch.randint(0, 5, (256,), generator=torch.Generator().manual_seed(1))  # 5 ranks, 4 outputs
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    trainer = SparseTrainer(model, loss=ordinal_loss, policy=policy)
    before = trainer.evaluate(images(ranks))
    log = trainer.fit(images(ranks), epochs=8, evaluate=images(ranks), evaluations=1)
    assert set(before) == {"loss"}
    assert log.evals[-1]["loss"] < before["loss"]


class Recogniser(nn.Module):
    """[B, 12, 6] of the log-probabilities of 5 letters and a blank, in 12 steps."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 6)

    def forward(self, inputs):
        return self.layer(inputs).log_softmax(-1)


def ctc(log_probabilities, targets):
    rows, steps, _ = log_probabilities.shape
    return F.ctc_loss(
        log_probabilities.transpose(0, 1), targets.clamp(min=0), torch.full((rows,), steps), (targets > 0).sum(1),
        reduction="none", zero_infinity=True,
    )  # fmt: skip


@pytest.mark.parametrize("policy", [None, "dense", "random", "gate", "topk"])
@pytest.mark.parametrize("length", [4, 12])
def test_sequences_of_ctc_are_no_classes(policy, length):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(1, 6, (64, length), generator=generator)
    targets[:, 3:] = 0  # padding
    data = DataLoader(TensorDataset(torch.randn(64, 12, 8, generator=generator), targets), batch_size=16)
    torch.manual_seed(0)
    trainer = SparseTrainer(Recogniser(), loss=ctc, policy=policy, lr=1e-2)
    before = trainer.evaluate(data)
    log = trainer.fit(data, epochs=10, evaluate=data, evaluations=1)
    assert set(before) == {"loss"}
    assert log.evals[-1]["loss"] < before["loss"]


def test_a_gate_ranks_counts_by_their_loss():
    torch.manual_seed(0)
    inputs, counts = torch.randn(64, 6), torch.randint(0, 3, (64,))
    model = nn.Sequential(nn.Linear(6, 3))

    def loss(outputs, targets):
        return (outputs.sum(1) - targets).square()

    hardest = loss(model(inputs), counts).topk(16).indices.sort().values
    trainer = SparseTrainer(model, loss=loss, policy="gate", rate=0.25, dense_start=0, dense_end=0)
    trainer.policy.gate.threshold.fill_(0.999 * loss(model(inputs), counts)[hardest].min().item())
    trainer.check(trainer.loader([(inputs, counts)]).load((inputs, counts)))
    batch = trainer.loader([(inputs, counts)]).load((inputs, counts))
    kept = trainer.policy.select(trainer.policy.score(batch), batch)
    assert torch.equal(kept.positions, hardest)


# --- classes where the user says so -------------------------------------------------------------


def focal(logits, targets):
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (1.0 - (-losses).exp()).square() * losses


CLASS_LOSSES = {
    "default": None,
    "module": nn.CrossEntropyLoss(reduction="none"),
    "likelihood": nn.NLLLoss(reduction="none"),
    "partial": partial(F.cross_entropy, reduction="none"),
    "partial of a partial": partial(partial(F.cross_entropy, reduction="none"), label_smoothing=0.1),
    "partial likelihood": partial(F.nll_loss, reduction="none"),
    "said": Criterion(focal, targets="classes"),
}


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_losses_of_classes_have_an_accuracy(name):
    labels = torch.randint(0, 3, (64,), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.LogSoftmax(1))
    trainer = SparseTrainer(model, loss=CLASS_LOSSES[name], policy="adaptive+deduplicate")
    found = trainer.evaluate(images(labels))
    x, y = images(labels).fetch(torch.arange(64))
    assert found["accuracy"] == pytest.approx((model(x).argmax(1) == y).float().mean().item())
    trainer.fit(images(labels), epochs=2)
    assert trainer.policy.sampler.classes == 3


@pytest.mark.parametrize("loss", [focal, Criterion(targets="values"), Criterion(focal, targets="values")])
def test_losses_that_nobody_knows_have_none(loss):
    labels = torch.randint(0, 3, (64,), generator=torch.Generator().manual_seed(1))
    trainer = SparseTrainer(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), loss=loss, policy="adaptive+deduplicate")
    assert set(trainer.evaluate(images(labels))) == {"loss"}
    trainer.fit(images(labels), epochs=2)
    assert trainer.policy.sampler.classes == 0


# --- what is ignored ----------------------------------------------------------------------------


def segmentation(ignored):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(24, 1, 6, 6, generator=generator)
    labels = (inputs[:, 0] > 0).long() + (inputs[:, 0] > 1).long()
    labels[torch.rand(labels.shape, generator=generator) < 0.4] = ignored
    return DataLoader(TensorDataset(inputs, labels), batch_size=8)


def defaults(logits, targets, ignore_index=255, reduction="none"):
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)


WAYS = {
    "partial": partial(F.cross_entropy, ignore_index=255, reduction="none"),
    "partial of a partial": partial(partial(F.cross_entropy, ignore_index=7, reduction="none"), ignore_index=255),
    "function's default": Criterion(defaults, targets="classes"),
    "argument": Criterion(lambda z, y: defaults(z, y, 255), targets="classes", ignore_index=255),
    "argument and partial": Criterion(partial(F.cross_entropy, ignore_index=255, reduction="none"), ignore_index=255),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("policy", "granularity"), [("dense", "sample"), ("gate", "sample"), ("gate", "token")])
def test_what_is_ignored_is_read_wherever_it_is(way, policy, granularity):
    """Each way of saying it is that of the module's attribute."""
    found = []
    for loss in (nn.CrossEntropyLoss(ignore_index=255, reduction="none"), WAYS[way]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
        if isinstance(loss, Criterion):
            loss = Criterion(loss.loss, granularity=granularity, targets="classes", ignore_index=loss.ignore_index)
        trainer = SparseTrainer(model, loss=loss, policy=policy, lr=1e-2, granularity=granularity)
        before = trainer.evaluate(segmentation(255))
        trainer.fit(segmentation(255), epochs=3)
        found.append((before, weights(model)))
    same(*found)
    inputs, labels = next(iter(DataLoader(segmentation(255).dataset, batch_size=24)))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    counts = labels != 255
    losses = F.cross_entropy(model(inputs), labels, ignore_index=255, reduction="none")
    per_sample = losses.flatten(1).sum(1) / counts.flatten(1).sum(1)
    mean = losses.sum() / counts.sum() if granularity == "token" else per_sample.mean()
    assert before["loss"] == pytest.approx(mean.item(), rel=1e-5)
    accuracy = ((model(inputs).argmax(1) == labels) & counts).sum() / counts.sum()
    assert before["accuracy"] == pytest.approx(accuracy.item())


# --- refusals -----------------------------------------------------------------------------------


def test_contradictions_are_refused():
    with pytest.raises(UserError, match="`ignore_index` must be the loss's own, 255, got 0"):
        Criterion(partial(F.cross_entropy, ignore_index=255, reduction="none"), ignore_index=0)
    with pytest.raises(UserError, match="`targets` must be one of classes, values, or None, got 'ranks'"):
        Criterion(targets="ranks")


def test_outputs_that_are_compared_with_every_target_are_refused():
    """[B, 1] beside [B] broadcasts to [B, B]: every output with every target."""
    trainer = SparseTrainer(nn.Linear(6, 1), loss=nn.MSELoss(reduction="none"))
    with (
        pytest.warns(UserWarning, match="target size"),
        pytest.raises(UserError, match=r"outputs are \[8, 1\] and targets \[8\]"),
    ):
        trainer.fit([(torch.randn(8, 6), torch.randn(8))], steps=1)
