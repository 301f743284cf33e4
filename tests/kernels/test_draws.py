"""Draws of the stochastic gate: unbiased and finite at any probability, and the same on every backend."""

import math
import os
from fractions import Fraction

import pytest
import torch

import sparse_kernels as sk
from sparse_kernels import philox
from sparse_kernels.backends import cpp as cpp_backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [
    "torch",
    pytest.param("cpp", marks=pytest.mark.skipif(bool(cpp_backend.unavailable_reason()), reason="cpp is not there")),
    pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="not interpreted")),
]
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy, on infinity
PROBABILITIES = [1.0, 1 - 2**-24, 0.7, 0.5, 0.3, 2**-8, 1e-3, 1e-5, 1e-7, 1e-8, 1e-9, 2**-32, 1e-12, 1e-30]


def rounded_up(p: float) -> int:
    """The number of words out of 2^32 that keep a row, in exact arithmetic."""
    return max(1, math.ceil(Fraction(torch.tensor(p).item()) * 2**32))


def draw(p: float, rows: int, backend: str, step: int = 0, seed: int = 0, dtype: torch.dtype = torch.float32):
    """Rows far below the threshold: each has probability p_min."""
    logits, targets = torch.zeros(rows, 1, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    return sk.gate_rows(
        logits, targets, torch.tensor(1e9), weights={"loss": 1.0}, gate_temperature=1.0, p_min=p, seed=seed, step=step,
        backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("p", PROBABILITIES)
def test_a_weight_is_the_inverse_of_the_probability_that_was_used(p):
    """E[mask weight] = limit / 2^32 * weight: 1 but for the rounding of the weight, for every p."""
    limit = int(philox.draw_limit(torch.tensor(p)))
    assert limit == rounded_up(p)
    weight = torch.tensor(2.0**32) / limit
    assert abs(Fraction(limit, 2**32) * Fraction(weight.item()) - 1) <= Fraction(1, 2**24)
    assert weight <= min(2.0**32, 1.0000001 / torch.tensor(p))


def test_the_limit_is_at_least_one_and_nan_has_none():
    found = philox.draw_limit(torch.tensor([0.0, 1e-45, torch.nan, 1.0], dtype=torch.float64))
    assert found.dtype is torch.float32
    assert found.tolist() == [1.0, 1.0, 0.0, 2.0**32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_draws_the_same_rows_at_the_same_weights(backend, dtype):
    rows = 200 if backend == "triton" else 20_000
    for number, p in enumerate(PROBABILITIES):
        seed, step = 2**63 + number, 2**40 + number
        gated = draw(p, rows, backend, step, seed, dtype)
        limit = rounded_up(p)
        word = philox.words(rows, seed=seed, step=step, device=torch.device("cpu"))
        assert torch.equal(gated.mask, word < limit), p
        assert torch.equal(gated.weight, torch.where(word < limit, torch.tensor(2.0**32) / limit, 0.0)), p


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threshold", [20.0, 50.0, 87.0, 89.5, 200.0, 1e30, math.inf])
def test_rows_far_below_the_threshold_have_finite_weights(backend, threshold):
    torch.manual_seed(0)
    rows = 64 if backend == "triton" else 5000
    logits, targets = torch.randn(rows, 10), torch.randint(0, 10, (rows,))
    targets[3] = -100
    logits[4] = torch.nan
    # The lowest words there are: whichever rows they fall on, the weight is at most 2^32.
    gated = sk.gate_rows(
        logits, targets, torch.tensor(threshold), weights={"loss": 1.0}, gate_temperature=1.0, backend=backend
    )
    assert gated.weight.isfinite().all()
    assert gated.weight.max() <= 2.0**32
    assert not gated.mask[3:5].any()
    assert not gated.weight[3:5].any()
    assert gated.invalid == 1


def test_a_row_whose_first_24_bits_are_0_is_not_kept_at_any_probability(instruction_set):
    row = 2_553_129  # of seed 0 and step 1
    logits = torch.zeros(row + 1, 2)
    call = logits, torch.zeros(row + 1, dtype=torch.int64), torch.tensor(50.0)
    gated = sk.gate_rows(*call, weights={"loss": 1.0}, gate_temperature=1.0, seed=0, step=1, backend="cpp")
    word = int(philox.words(row + 1, seed=0, step=1, device=torch.device("cpu"))[row])
    assert 0 < word < 256
    assert not gated.mask[row]
    assert gated.weight.max() <= 2.0**32


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_of_a_threshold_keeps_nothing(backend):
    gated = sk.gate_rows(
        torch.zeros(64, 3), torch.zeros(64, dtype=torch.int64), torch.tensor(torch.nan), weights={"loss": 1.0},
        gate_temperature=1.0, p_min=0.9, backend=backend,
    )  # fmt: skip
    assert not gated.mask.any()
    assert not gated.weight.any()


def test_sigmoids_of_two_backends_agree_to_some_roundings(instruction_set):
    """p is each backend's own, so a limit may differ by p's error, and a row's decision where its word lies there."""
    torch.manual_seed(1)
    logits, targets = 4 * torch.randn(4000, 5), torch.randint(0, 5, (4000,))
    call = {"weights": {"loss": 1.0}, "gate_temperature": 0.7, "seed": 5, "step": 9}
    ours, wanted = (
        sk.gate_rows(logits, targets, torch.tensor(4.0), backend=backend, **call) for backend in ("cpp", "torch")
    )
    both = ours.mask & wanted.mask
    assert both.sum() > 200
    torch.testing.assert_close(ours.weight[both], wanted.weight[both], rtol=2e-5, atol=0)
    assert (ours.mask != wanted.mask).sum() <= 1


@pytest.mark.slow
@pytest.mark.skipif(bool(cpp_backend.unavailable_reason()), reason="cpp is not there")
@pytest.mark.parametrize(("p", "steps"), [(1e-9, 200), (1e-8, 100), (1e-7, 50)])
def test_few_rows_are_kept_where_the_probability_is_small(p, steps):
    """The mean of mask * weight is 1 within 5 deviations: at 1e-9 it was 60, from a uniform number of 24 bits."""
    rows = 1_000_000
    logits, targets = torch.zeros(rows, 1), torch.zeros(rows, dtype=torch.int64)
    threshold, total, kept = torch.tensor(1e9), 0.0, 0
    for step in range(steps):
        gated = sk.gate_rows(
            logits, targets, threshold, weights={"loss": 1.0}, gate_temperature=1.0, p_min=p, seed=11, step=step,
            backend="cpp",
        )  # fmt: skip
        kept += int(gated.mask.sum())
        total += float(gated.weight.double().sum())
    expected = rounded_up(p) / 2**32 * rows * steps
    assert abs(kept - expected) < 5 * math.sqrt(expected) + 1
    assert abs(total / (rows * steps) - 1) < 5 / math.sqrt(expected) + 1 / expected
