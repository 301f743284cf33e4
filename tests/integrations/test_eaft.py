"""The EAFT losses of axolotl and LLaMA-Factory, from the real wheels: exact where theirs takes the top 20 logits."""

import sys
from types import SimpleNamespace

import host_files
import pytest
import torch

from sparse_training.errors import UserError
from sparse_training.integrations.eaft import axolotl_loss, llamafactory_loss

ALPHAS = (0.0, 0.5, 1.0, 2.0)


@pytest.fixture
def axolotl():
    with host_files.axolotl():
        from axolotl.monkeypatch.loss import eaft

        yield lambda logits, labels, items, alpha: eaft.eaft_loss(
            SimpleNamespace(logits=logits), labels, num_items_in_batch=items, alpha=alpha, k=20
        )
        axolotl_loss.off()


@pytest.fixture
def llamafactory():
    with host_files.llamafactory():
        from llamafactory.train import trainer_utils

        yield lambda logits, labels, items, alpha: trainer_utils.eaft_loss_func(
            {"logits": logits}, labels, items, alpha
        )
        llamafactory_loss.off()


HOSTS = {"axolotl": (axolotl_loss, 1.0), "llamafactory": (llamafactory_loss, 3.0)}


@pytest.fixture(params=HOSTS)
def host(request):
    """The call, the rebinding, and the entropy that has the weight 1."""
    return request.getfixturevalue(request.param), *HOSTS[request.param]


def data(classes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(2, 7, classes, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, classes, (2, 7), generator=generator)
    labels[0, :3] = -100
    return logits, labels


def exact(logits, labels, items, alpha, unit):
    """The definition, dense."""
    x, y = logits[:, :-1].double(), labels[:, 1:]
    log_p = x.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).detach()
    losses = torch.nn.functional.cross_entropy(x.transpose(1, 2), y, reduction="none", ignore_index=-100)
    weighted = (losses * (entropy / unit) ** alpha)[y != -100]
    return weighted.sum() / items if items is not None else weighted.mean()


@pytest.mark.parametrize("items", [None, 5, torch.tensor(5)])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_where_the_vocabulary_is_the_top_20_it_is_the_hosts_loss(host, alpha, items):
    call, rebinding, _ = host
    logits, labels = data(20)
    theirs = call(logits, labels, items, alpha)
    with rebinding:
        ours = call(logits, labels, items, alpha)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("items", [None, 5])
def test_beyond_20_classes_the_entropy_is_the_exact_one(host, items, dtype):
    call, rebinding, unit = host
    logits, labels = data(500, dtype)
    theirs = call(logits, labels, items, 1.0)
    with rebinding:
        ours = call(logits, labels, items, 1.0)
    expected = exact(logits, labels, items, 1.0, unit)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    assert ours.dtype is torch.float32
    assert abs(theirs - expected) > 0.1 * expected  # what the top 20 leave out
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        torch.autograd.grad(ours, logits)[0], torch.autograd.grad(expected, logits)[0], rtol=tolerance, atol=tolerance
    )


def test_a_batch_without_a_token_that_counts_has_loss_0_and_zero_gradients(host):
    call, rebinding, _ = host
    logits, labels = data(30)
    with rebinding:
        loss = call(logits, torch.full_like(labels, -100), None, 1.0)
    loss.backward()
    assert loss == 0.0
    assert logits.grad.count_nonzero() == 0


def test_llamafactory_without_logits_returns_the_models_loss(llamafactory):
    from llamafactory.train import trainer_utils

    for outputs in ({"loss": torch.tensor(2.5)}, {}):
        theirs = trainer_utils.eaft_loss_func(outputs, torch.zeros(1, 2))
        with llamafactory_loss:
            assert trainer_utils.eaft_loss_func(outputs, torch.zeros(1, 2)) == theirs


@pytest.mark.parametrize(
    ("labels", "message"),
    [(torch.zeros(2, 6, dtype=torch.long), r"`labels`.*\(2, "), (torch.full((2, 7), 30), "target 30 in row 0")],
)
def test_bad_labels_are_refused_in_one_line(host, labels, message):
    call, rebinding, _ = host
    logits, _ = data(30)
    with rebinding, pytest.raises(ValueError, match=message) as caught:
        call(logits, labels, None, 1.0)
    assert "\n" not in str(caught.value)


def test_other_versions_are_refused(axolotl, llamafactory):
    sys.modules["axolotl"].__version__, sys.modules["llamafactory"].__version__ = "0.16.1", "0.9.4"
    with pytest.raises(UserError, match=r"axolotl from 0\.19 up to, but not including, 0\.20, got 0\.16\.1"):
        axolotl_loss.on()
    with pytest.raises(UserError, match=r"llamafactory from 0\.9\.5 up to, but not including, 0\.10, got 0\.9\.4"):
        llamafactory_loss.on()
