"""A run goes on with the loss and the policy that it began with, or says which differs."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_training import Gate, Significance, SparseTrainer
from sparse_training.errors import UserError
from sparse_training.selection.policies.infobatch import InfoBatchPolicy


def loader():
    generator = torch.Generator().manual_seed(0)
    inputs, classes = torch.randn(64, 8, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    return DataLoader(TensorDataset(inputs, classes), batch_size=16)


def stopped(folder, **options):
    torch.manual_seed(0)
    steps = iter((False, True))
    trainer = SparseTrainer(nn.Linear(8, 3), **options)
    assert trainer.fit(loader(), epochs=2, checkpoint=folder, stop=lambda: next(steps)).interrupted
    return trainer


def resumed(folder, **options):
    torch.manual_seed(0)
    return SparseTrainer(nn.Linear(8, 3), **options).fit(loader(), epochs=2, checkpoint=folder, resume=True)


def smoothed(logits, targets, smoothing):
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)


WEIGHTS = torch.tensor([1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("began", "now", "name"),
    [
        ({"policy": InfoBatchPolicy(prune=0.5)}, {"policy": InfoBatchPolicy(prune=0.3)}, "policy_options.*0.5.*0.3"),
        ({"policy": Gate(0.5)}, {"policy": Gate(0.5, floor=0.25)}, "policy_options.*floor"),
        (
            {"policy": Gate(0.5)},
            {"policy": Gate(0.5, significance=Significance(loss=1.0, entropy=0.0))},
            "policy_options.*significance",
        ),
        (
            {"loss": nn.CrossEntropyLoss(reduction="none")},
            {"loss": nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)},
            "label_smoothing': 0.0.*label_smoothing': 0.1",
        ),
        (
            {"loss": nn.CrossEntropyLoss(reduction="none", weight=WEIGHTS)},
            {"loss": nn.CrossEntropyLoss(reduction="none", weight=WEIGHTS + 1)},
            "'weight'",
        ),
        (
            {"loss": functools.partial(smoothed, smoothing=0.0)},
            {"loss": functools.partial(smoothed, smoothing=0.1)},
            "smoothed.*0.0.*smoothed.*0.1",
        ),
    ],
)
def test_another_loss_or_option_is_refused(tmp_path, began, now, name):
    stopped(tmp_path, **began)
    with pytest.raises(UserError, match=rf"other settings: .*{name}"):
        resumed(tmp_path, **now)
    assert not resumed(tmp_path, **began).interrupted


def test_a_loss_that_counts_its_calls_goes_on_in_one_process(tmp_path):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, logits, targets):
            self.calls += 1
            return F.cross_entropy(logits, targets, reduction="none")

    trainer = stopped(tmp_path, loss=Counting())
    assert trainer.criterion.loss.calls
    assert not trainer.fit(loader(), epochs=2, checkpoint=tmp_path, resume=True).interrupted
