"""ms-swift's trainers, from the real wheel, whose log-probabilities and entropies are ours and TRL's."""

import sys
from types import SimpleNamespace

import host_files
import pytest
import torch

from sparse_training.errors import UserError
from sparse_training.integrations.swift import head

CLASSES = 29


@pytest.fixture
def trainers():
    with host_files.swift():
        from swift.rlhf_trainers import grpo_trainer, rlhf_mixin

        yield SimpleNamespace(grpo=grpo_trainer, mixin=rlhf_mixin)
        head.off()


def logits(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(2, 6, CLASSES, generator=generator)).to(dtype).requires_grad_()


def labels():
    found = torch.randint(0, CLASSES, (2, 6), generator=torch.Generator().manual_seed(1))
    found[0, :2] = -100
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_mixins_log_probabilities_are_the_hosts(trainers, dtype):
    """Its own method: it writes zeros over the results of padded labels, in place and in the graph."""
    mixin = trainers.mixin.RLHFTrainerMixin.__new__(trainers.mixin.RLHFTrainerMixin)
    mixin.is_encoder_decoder, mixin.template = True, SimpleNamespace(sequence_parallel_size=1)
    found = []
    for ours in (False, True):
        x = logits(dtype)
        if ours:
            head.on()
            assert trainers.mixin.selective_log_softmax is trainers.grpo.selective_log_softmax
        scores, _, mask = mixin.get_per_token_logps(x * 1, labels())
        head.off()
        scores.sum().backward()
        assert scores[~mask].count_nonzero() == 0
        found.append((scores.detach(), x.grad))
    tolerance = 3e-2 if dtype is torch.bfloat16 else 1e-5
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_entropies_are_the_hosts(trainers, dtype):
    theirs = trainers.grpo.entropy_from_logits(logits(dtype))
    with head:
        ours = trainers.grpo.entropy_from_logits(logits(dtype))
    torch.testing.assert_close(ours, theirs)


def test_off_restores_trls_functions(trainers):
    theirs = trainers.mixin.selective_log_softmax
    utils = sys.modules["trl.trainer.utils"]
    with head:
        assert trainers.mixin.selective_log_softmax is not theirs
        assert utils.selective_log_softmax is theirs  # TRL keeps its own
    assert trainers.mixin.selective_log_softmax is trainers.grpo.selective_log_softmax is theirs


@pytest.mark.parametrize(
    ("index", "message"),
    [(torch.full((2, 6), CLASSES), "target 29 in row 0"), (torch.zeros(2, 6, 3, dtype=torch.long), r"\(2, 6, 3\)")],
)
def test_bad_labels_are_refused_in_one_line(trainers, index, message):
    with head, pytest.raises(ValueError, match=message) as caught:
        trainers.grpo.selective_log_softmax(logits(), index)
    assert "\n" not in str(caught.value)


def test_another_version_is_refused(trainers):
    sys.modules["swift"].__version__ = "3.9.1"
    with pytest.raises(UserError, match=r"ms-swift from 4\.6 up to, but not including, 4\.7, got 3\.9\.1"):
        head.on()
