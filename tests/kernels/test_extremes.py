"""Numbers at the ends of their type's range: what is finite and legal is exact, what is not is refused in one line."""

import math
import os
import re

import pytest
import torch
from emulated import INSTRUCTION_SETS, each, forced

import sparse_kernels as sk
from sparse_kernels.backends import cpp as cpp_backend
from sparse_kernels.types import WEIGHABLE

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy, on NaN and inf
BUILT = not cpp_backend.unavailable_reason()
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OUTPUTS = (*WEIGHABLE, "argmax")


@pytest.fixture(params=["torch", "triton", *each()])
def backend(request):
    """Each backend that runs on a CPU, C++ with each instruction set."""
    name = request.param
    if name == "triton" and not INTERPRETED:
        pytest.skip("not interpreted")
    if name not in INSTRUCTION_SETS:
        yield name
        return
    with forced(name):
        yield "cpp"


# name: (shape, dim); the classes of "apart" are two elements apart.
LAYOUTS = {
    "few": ((20, 10), -1),
    "two blocks of columns in lanes": ((3, 45), -1),
    "many": ((5, 1000), -1),
    "blocks": ((3, 2500), -1),
    "parts": ((1, 20_000), -1),
    "apart": ((20, 10), -1),
    "many apart": ((3, 70), -1),
    "pixels": ((2, 40, 5, 7), 1),
    "few pixels": ((2, 40, 3), 1),
}


def rows_of(layout, dtype):
    """Rows that all equal the lowest or the greatest number, and others; targets; dim."""
    torch.manual_seed(0)
    shape, dim = LAYOUTS[layout]
    lowest, greatest = torch.finfo(dtype).min, torch.finfo(dtype).max
    logits = torch.randn(shape).to(dtype).movedim(dim, -1)
    rows = logits.reshape(-1, logits.shape[-1]).clone()
    for row, kind in enumerate(("masked", "greatest", "with -inf", "but one", "some", "random")):
        if row >= len(rows):
            break
        if kind in ("masked", "with -inf", "but one"):
            rows[row] = lowest
        if kind == "greatest":
            rows[row] = greatest
        if kind == "with -inf":
            rows[row, 1::2] = -torch.inf
        if kind == "but one":
            rows[row, -1] = 1.0
        if kind == "some":
            rows[row, 1::3] = lowest
    rows[6:] = lowest
    targets = (torch.arange(len(rows)) * 2) % rows.shape[1]
    targets[:: max(3, len(rows) - 1)] = 0
    made = rows.reshape(logits.shape).movedim(-1, dim).contiguous()
    if "apart" in layout:
        made = torch.stack((made, made), -1)[..., 0]
    return made, targets.reshape(logits.shape[:-1]), dim


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_lowest_number_is_a_logit_and_no_mask(backend, layout, dtype):
    if backend == "triton" and (layout == "parts" or dtype is torch.float16):
        pytest.skip("long, and no other way")
    logits, targets, dim = rows_of(layout, dtype)
    ours = sk.row_stats(logits, targets, outputs=OUTPUTS, dim=dim, backend=backend)
    exact = sk.row_stats(logits.double(), targets, outputs=OUTPUTS, dim=dim, backend="torch")
    assert torch.equal(ours.argmax, exact.argmax)
    for name in WEIGHABLE:
        found, wanted = getattr(ours, name), getattr(exact, name)
        # A loss of 2 * 3.4e38 is infinite in float32.
        torch.testing.assert_close(found, wanted.to(found.dtype), rtol=1e-5, atol=1e-5)
    classes = logits.shape[dim]
    first = ours.loss.flatten()[0]
    assert first == pytest.approx(math.log(classes), rel=1e-6)
    assert ours.entropy.flatten()[0] == pytest.approx(math.log(classes), rel=1e-5)
    assert ours.max_prob.flatten()[0] == pytest.approx(1 / classes, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_rows_of_the_lowest_number(backend, layout, dtype):
    if backend == "triton" and (layout == "parts" or dtype is torch.float16):
        pytest.skip("long, and no other way")
    logits, targets, dim = rows_of(layout, dtype)
    gradients = []
    for name, given in ((backend, logits), ("torch", logits.double())):
        given = given.detach().requires_grad_()
        stats = sk.row_stats(given, targets, dim=dim, backend=name)
        (gradient,) = torch.autograd.grad(stats.loss.sum() + 0.5 * stats.entropy.sum(), given)
        gradients.append(gradient)
    rtol = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["few", "many", "blocks", "apart", "pixels"])
def test_label_smoothing_of_equal_logits(backend, layout, dtype):
    shape, dim = LAYOUTS[layout]
    for value in (torch.finfo(dtype).min, torch.finfo(dtype).max, 1e-3):
        logits = torch.full(shape, value, dtype=dtype)
        targets = torch.zeros(logits.select(dim, 0).shape, dtype=torch.int64)
        loss = sk.row_stats(logits, targets, outputs=["loss"], dim=dim, label_smoothing=0.1, backend=backend).loss
        torch.testing.assert_close(loss, torch.full_like(loss, math.log(shape[dim])), rtol=1e-6, atol=0)


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6, 1e30])
@pytest.mark.parametrize("classes", [5, 20, 70, 1001])
def test_no_temperature_adds_padding_to_a_row(backend, temperature, classes):
    torch.manual_seed(0)
    logits, targets = torch.randn(4, classes) * min(1.0, temperature), torch.zeros(4, dtype=torch.int64)
    logits[:, 2::2] = -torch.inf
    ours = sk.row_stats(logits, targets, temperature=temperature, backend=backend)
    exact = sk.row_stats(logits.double(), targets, temperature=temperature, backend="torch")
    for found, wanted in zip(ours[:2], exact[:2], strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": 1e38}, "`temperature` must be above 0, from 1e-30 to 1e+30, got 1e+38"),
        ({"temperature": math.inf}, "`temperature` must be above 0, from 1e-30 to 1e+30, got inf"),
        ({"temperature": math.nan}, "`temperature` must be above 0, got nan"),
        ({"temperature": 1e-40}, "`temperature` must be above 0, from 1e-30 to 1e+30, got 1e-40"),
        ({"softcap": math.inf}, "`softcap` must be 0 (none) or above, from 1e-30 to 1e+30, got inf"),
        ({"softcap": math.nan}, "`softcap` must be 0 (none) or above, got nan"),
        ({"softcap": 1e-40}, "`softcap` must be 0 (none) or above, from 1e-30 to 1e+30, got 1e-40"),
        ({"label_smoothing": math.nan}, "`label_smoothing` must be in [0, 1], got nan"),
        ({"gate_temperature": math.inf}, "`gate_temperature` must be 0 (a threshold) or above, from 1e-30 to 1e+30,"),
        ({"gate_temperature": math.nan}, "`gate_temperature` must be 0 (a threshold) or above, got nan"),
        ({"p_min": math.nan}, "`p_min` must be a probability in [0, 1], got nan"),
        ({"weights": {"loss": math.nan}}, "`weights` must be numbers from -1e+30 to 1e+30, got loss=nan"),
        ({"weights": {"entropy": math.inf}}, "`weights` must be numbers from -1e+30 to 1e+30, got entropy=inf"),
        ({"weights": {"loss": 1.0, "margin": -1e300}}, "`weights` must be numbers from -1e+30 to 1e+30, got margin="),
    ],
    ids=str,
)
@pytest.mark.parametrize("call", [sk.gate_rows, sk.select])
@pytest.mark.parametrize("name", [None, "torch"])
def test_what_is_not_finite_is_refused_in_one_line(call, name, setting, message):
    arguments = {"weights": {"loss": 1.0}, "backend": name, **setting}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call(torch.randn(8, 3), torch.zeros(8, dtype=torch.int64), torch.tensor(0.5), **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("classes", [6, 40, 1001])
def test_a_softcap_caps_infinities(backend, classes):
    torch.manual_seed(0)
    logits, targets = torch.randn(6, classes), torch.zeros(6, dtype=torch.int64)
    logits[0, 1:] = -torch.inf
    logits[1, 3] = torch.inf
    logits[2, :] = -torch.inf
    logits[3, 0] = torch.inf
    logits[4, 0] = -torch.inf
    outputs, results = ("loss", "entropy", "grad_norm", "max_prob", "logsumexp"), []
    for name, given in ((backend, logits), ("torch", logits.double().clamp(-1e30, 1e30))):
        given = given.clone().requires_grad_()
        stats = sk.row_stats(given, targets, outputs=outputs, softcap=5.0, backend=name)
        (gradient,) = torch.autograd.grad(stats.loss.sum() + stats.entropy.sum(), given)
        results.append([*(getattr(stats, output).detach() for output in outputs), gradient])
    for found, wanted in zip(*results, strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [1e-30, 1e-3, 1e20, 1e30])
def test_every_softcap_that_is_taken_gives_numbers(backend, softcap):
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 40), torch.arange(5)
    ours = sk.row_stats(logits, targets, softcap=softcap, backend=backend)
    exact = sk.row_stats(logits.double(), targets, softcap=softcap, backend="torch")
    for found, wanted in zip(ours[:2], exact[:2], strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("classes", [6, 40, 1001])
def test_a_weight_of_0_leaves_an_infinite_statistic_out(backend, classes):
    torch.manual_seed(0)
    logits, targets = torch.randn(6, classes), torch.zeros(6, dtype=torch.int64)
    logits[1, 0] = -torch.inf  # the target: an infinite loss
    logits[2, 4] = torch.nan
    logits[3, 4] = torch.nan
    targets[3] = -100
    call = {"outputs": ("loss", "entropy"), "backend": backend}
    gated = sk.gate_rows(logits, targets, torch.tensor(-1.0), weights={"loss": 0.0, "entropy": 1.0}, **call)
    assert gated.stats.loss[1] == torch.inf
    torch.testing.assert_close(gated.significance, gated.stats.entropy, rtol=0, atol=0, equal_nan=True)
    assert gated.mask.tolist() == [True, True, False, False, True, True]
    for outputs in (call["outputs"], ()):
        gated = sk.gate_rows(
            logits, targets, torch.tensor(-1.0), weights={"loss": 0.0}, backend=backend, outputs=outputs
        )
        assert gated.significance.isnan().tolist() == [False, False, True, False, False, False]
        assert gated.significance.nan_to_num().eq(0).all()
        assert gated.mask.tolist() == [True, True, False, False, True, True]
        assert gated.invalid == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_offset_that_is_not_finite_is_counted_or_decides(backend, value):
    offset = torch.zeros(4)
    offset[1] = offset[3] = value
    targets = torch.tensor([0, 0, 0, -100])
    gated = sk.gate_rows(
        torch.zeros(4, 3), targets, torch.tensor(1.0), weights={"loss": 1.0}, offset=offset, backend=backend
    )
    assert gated.mask.tolist() == [True, value == torch.inf, True, False]
    assert gated.invalid == int(math.isnan(value))
    assert gated.significance[3] == 0
