"""OpenRLHF's functions, its actor and its own test, from the real wheel, with ours and without."""

import importlib.util
import sys

import host_files
import pytest
import torch

from sparse_training.errors import UserError
from sparse_training.integrations.openrlhf import head

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.fixture
def utils(monkeypatch):
    # Its entropy is compiled when the file is imported; eager is the same function.
    monkeypatch.setattr(torch, "compile", lambda function=None, **_: function or (lambda inner: inner))
    with host_files.openrlhf():
        from openrlhf.models import utils

        yield utils
        head.off()


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 6, 23, generator=generator)).to(dtype).requires_grad_()
    return logits, torch.randint(0, 23, (2, 6), generator=generator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_the_hosts_and_the_logits_stay(utils, dtype, temperature):
    found = []
    for ours in (False, True):
        leaf, labels = data(dtype)
        logits = leaf * 1  # theirs writes into it
        before = logits.detach().clone()
        if ours:
            head.on()
        log_probs = utils.log_probs_from_logits(logits, labels, temperature)
        head.off()
        (log_probs * torch.arange(12.0).view(2, 6)).sum().backward()
        found.append((log_probs.detach(), leaf.grad))
        assert torch.equal(logits, before) is (ours or temperature == 1.0)
    tolerance = 3e-2 if dtype is torch.bfloat16 else 2e-5
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_entropy_is_the_hosts(utils, dtype):
    found = []
    for ours in (False, True):
        logits, _ = data(dtype)
        if ours:
            head.on()
        entropy = utils.compute_entropy(logits)
        head.off()
        found.append((entropy.detach(), torch.autograd.grad(entropy.sum(), logits)[0]))
    tolerance = 3e-2 if dtype is torch.bfloat16 else 2e-5
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_an_entropy_with_impossible_tokens_is_finite(utils):
    logits, _ = data()
    logits = logits.detach()
    logits[..., :20] = -torch.inf
    assert utils.compute_entropy(logits).isnan().all()
    with head:
        ours = utils.compute_entropy(logits)
    torch.testing.assert_close(ours, torch.distributions.Categorical(logits=logits[..., 20:]).entropy())


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_openrlhfs_own_test_of_its_actor_passes(utils, temperature):
    """The test file of the wheel makes an actor of its own from the wheel's files; ours take its two names there."""
    file = host_files.WHEELS / "openrlhf" / "tests" / "test_actor_entropy_temperature.py"
    spec = importlib.util.spec_from_file_location("openrlhf_own_test", file)
    own = importlib.util.module_from_spec(spec)
    calls = []
    try:
        spec.loader.exec_module(own)
        actor = sys.modules["_openrlhf_actor_test.actor"]
        for place, ours in head.replacements.items():
            name = place.rpartition(":")[2]
            assert hasattr(actor, name)
            setattr(actor, name, lambda *given, ours=ours, name=name: calls.append(name) or ours(*given))
        own.test_entropy_matches_temperature_scaled_policy(temperature)
    finally:
        for name in [name for name in sys.modules if name.startswith("_openrlhf_actor_test")]:
            del sys.modules[name]
    assert sorted(calls) == ["compute_entropy", "log_probs_from_logits"]


BAD = {
    "a label out of range": (torch.full((2, 6), 23), 1.0, r"target 23 in row 0.*\[0, 22\]"),
    "labels of another shape": (torch.zeros(2, 5, dtype=torch.long), 1.0, r"targets.*\(2, 6\).*\(2, 5\)"),
    "labels elsewhere": (torch.zeros(2, 6, dtype=torch.long, device="meta"), 1.0, "targets.*meta"),
    "a temperature of 0": (torch.zeros(2, 6, dtype=torch.long), 0.0, "`temperature` must be above 0"),
}


@pytest.mark.parametrize(("labels", "temperature", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_one_line(utils, labels, temperature, message):
    logits, _ = data()
    with head, pytest.raises(ValueError, match=message) as caught:
        utils.log_probs_from_logits(logits, labels, temperature)
    assert "\n" not in str(caught.value)


def test_every_module_that_took_the_names_is_served_and_restored(utils):
    stubs = {name: host_files.stub(name) for name in ("peft", "peft.tuners", "peft.tuners.lora")}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stubs.items():
            patch.setitem(sys.modules, name, module)
        for name in ("openrlhf.models.ring_attn_utils", "flash_attn", "flash_attn.bert_padding"):
            patch.setitem(sys.modules, name, host_files.stub(name))
        from openrlhf.models import actor
    theirs = actor.log_probs_from_logits, actor.compute_entropy
    with head:
        assert actor.log_probs_from_logits is utils.log_probs_from_logits is not theirs[0]
        assert actor.compute_entropy is not theirs[1]
    assert (actor.log_probs_from_logits, actor.compute_entropy) == theirs


def test_another_version_is_refused(utils):
    sys.modules["openrlhf"].__version__ = "0.10.4"
    with pytest.raises(UserError, match=r"openrlhf from 0\.11 up to, but not including, 0\.12, got 0\.10\.4"):
        head.on()
