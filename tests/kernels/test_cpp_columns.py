"""Long rows, read block by block and, at 16 bits, by pairs of vectors: every number must count, wherever it is."""

import pytest
import torch
from test_cpp import DTYPES

import sparse_kernels as sk
from sparse_kernels.backends import cpp as cpp_backend

if cpp_backend.unavailable_reason() is not None:
    pytest.skip(f"the C++ backend is {cpp_backend.unavailable_reason()}", allow_module_level=True)

# Around a vector, a pair, a block of 1,024 or 2,048 classes, and a part of 8,192.
LENGTHS = (33, 47, 64, 1023, 1024, 1040, 1056, 2047, 2048, 2049, 2063, 2064, 2080, 2095, 2096, 4128, 16_384, 18_464)
LONG = 2112 + 5  # a block of any dtype, then whole pairs and a rest


PLACES = torch.arange(0, LONG, 3)  # every lane of every vector, in one block or another


def spikes(dtype, value):
    """Rows of noise in which one logit, of another place in each row, is ``value``; the targets are beside it."""
    torch.manual_seed(3)
    logits = torch.randn(1, LONG).to(dtype).repeat(len(PLACES), 1)
    logits.scatter_(1, PLACES[:, None], value)
    return logits, (PLACES + 1) % LONG


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length_and_place_of_the_target(instruction_set, dtype):
    for classes in LENGTHS:
        torch.manual_seed(classes)
        places = [j for j in (0, 1, 15, 16, 31, 1023, 1024, 2047, 2048, classes - 2, classes - 1) if 0 <= j < classes]
        logits = (3 * torch.randn(len(places), classes)).to(dtype)
        targets = torch.tensor(places)
        ours = sk.row_stats(logits, targets, outputs=sk.STATISTICS, backend="cpp")
        exact = sk.row_stats(logits.double(), targets, outputs=sk.STATISTICS, backend="torch")
        for name in sk.STATISTICS:
            found, wanted = getattr(ours, name), getattr(exact, name)
            torch.testing.assert_close(
                found, wanted.to(found.dtype), rtol=2e-5, atol=1e-6, msg=lambda m, n=name, c=classes: f"{n}, {c}: {m}"
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_logit_is_found_anywhere(instruction_set, dtype):
    logits, targets = spikes(dtype, 30.0)
    stats = sk.row_stats(logits, targets, outputs=("max_prob", "argmax", "loss"), backend="cpp")
    assert (stats.argmax == PLACES).all()
    assert (stats.max_prob > 0.999).all()
    torch.testing.assert_close(
        stats.loss.double(), 30.0 - logits.double().gather(1, targets[:, None])[:, 0], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_bad_logit_is_lost(instruction_set, dtype, bad):
    logits, targets = spikes(dtype, bad)
    for column in (targets, PLACES):  # beside the target, and the target itself
        gated = sk.gate_rows(logits, column, torch.tensor([0.0]), weights={"loss": 1.0}, backend="cpp")
        assert gated.significance.isnan().all()
        assert not gated.mask.any()
        assert int(gated.invalid) == len(PLACES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_every_length(instruction_set, dtype):
    eps = torch.finfo(dtype).eps
    for classes in (*LENGTHS, 129, 143, 160, 191, 192):
        torch.manual_seed(classes)
        base = (2 * torch.randn(3, classes)).to(dtype)
        base[1, ::3] = -torch.inf
        targets = torch.tensor([0, 1, classes - 1])
        found = []
        for backend, logits in (("cpp", base.clone()), ("torch", base.double())):
            stats = sk.row_stats(logits.requires_grad_(), targets, backend=backend)
            (stats.loss * torch.tensor([1.0, 0.5, -2.0]) + 0.3 * stats.entropy).sum().backward()
            found.append(logits.grad)
        ours, exact = found
        assert (ours[1, ::3] == 0).all()
        torch.testing.assert_close(ours.double(), exact, rtol=2 * eps + 1e-4, atol=2e-7)
