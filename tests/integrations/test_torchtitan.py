"""torchtitan's log-probabilities and its DAPO loss, from the real wheel, with ours and without."""

import sys

import host_files
import pytest
import torch
from torch.distributed.tensor import DTensor

from sparse_training.errors import UserError
from sparse_training.integrations.torchtitan import head

CLASSES = 19


@pytest.fixture
def loss():
    with host_files.torchtitan():
        from torchtitan.components import loss

        yield loss
        head.off()


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 5, CLASSES, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, CLASSES, (2, 5), generator=generator)
    labels[0, :2] = -100
    return logits, labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy", [True, False])
def test_log_probabilities_and_entropies_are_the_hosts(loss, dtype, entropy):
    """Ignored positions have the log-probability 0 and their true entropy, which has no gradient; all is float32."""
    found = []
    for ours in (False, True):
        logits, labels = data(dtype)
        if ours:
            head.on()
        result = loss.compute_logprobs(logits, labels, return_entropy=entropy)
        head.off()
        parts = result if entropy else (result,)
        assert [part.requires_grad for part in parts] == [True, False][: len(parts)]
        gradient = torch.autograd.grad((parts[0] * torch.arange(10.0).view(2, 5)).sum(), logits)[0]
        found.append((*(part.detach() for part in parts), gradient))
    for one, other in zip(*found, strict=True):
        tolerance = 2e-2 if one.dtype is torch.bfloat16 else 2e-5
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_the_dapo_loss_is_the_hosts(loss):
    from torchtitan.experiments.rl.losses import dapo

    found = []
    for ours in (False, True):
        logits, labels = data()
        given = {
            "generator_logprobs": torch.linspace(-4, -1, 10).view(2, 5),
            "advantages": torch.tensor([[1.0], [0.0]]).expand(2, 5),
            "loss_mask": labels != -100,
        }
        if ours:
            head.on()
            assert dapo.compute_logprobs is loss.compute_logprobs
        value, metrics = dapo.DAPOLoss(dapo.DAPOLoss.Config())(logits, labels, 8.0, **given)
        head.off()
        value.backward()
        found.append((value.detach(), logits.grad, *(metrics[name] for name in sorted(metrics))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert found[0][1][1].count_nonzero() == 0  # an advantage of 0


def test_a_shard_of_the_vocabulary_goes_to_the_hosts_own_function(loss):
    """Wrapped tensors, and plain ones that are this rank's part; ours takes whole rows alone."""
    logits, labels = data()
    head.on()
    calls = []
    head._originals["torchtitan.components.loss:compute_logprobs"] = lambda *given, **options: calls.append(
        (given, options)
    )
    shard = torch.Tensor._make_wrapper_subclass(DTensor, (2, 5, CLASSES))
    loss.compute_logprobs(shard, labels, return_entropy=True)
    assert calls[0][0][0] is shard
    assert calls[0][1] == {"return_entropy": True}
    loss.get_spmd_backend.return_value, loss.spmd_mesh_size.return_value = "spmd_types", 2
    loss.compute_logprobs(logits, labels)
    assert calls[1][0][0] is logits
    loss.spmd_mesh_size.return_value = 1
    assert loss.compute_logprobs(logits, labels).shape == (2, 5)
    assert len(calls) == 2


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((2, 5), CLASSES), rf"target {CLASSES} in row 0.*out of range"),
        (torch.zeros(2, 4, dtype=torch.long), r"targets.*\(2, 5\).*\(2, 4\)"),
        (torch.zeros(2, 5, dtype=torch.long, device="meta"), "targets.*meta"),
    ],
)
def test_bad_labels_are_refused_in_one_line(loss, labels, message, entropy):
    logits, _ = data()
    with head, pytest.raises(ValueError, match=message) as caught:
        loss.compute_logprobs(logits, labels, return_entropy=entropy)
    assert "\n" not in str(caught.value)


def test_another_version_is_refused(loss):
    sys.modules["torchtitan"].__version__ = "0.2.2"
    with pytest.raises(UserError, match=r"torchtitan from 0\.3 up to, but not including, 0\.4, got 0\.2\.2"):
        head.on()
