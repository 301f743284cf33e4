"""Gradients of the C++ backend against the reference, for every instruction set that this processor runs."""

import pytest
import torch
from emulated import each
from test_cpp import DTYPES, LAYOUTS, SHAPES

import sparse_kernels as sk
from sparse_kernels import reference
from sparse_kernels._arguments import Settings, StatsCall
from sparse_kernels.backends import cpp as cpp_backend

if cpp_backend.unavailable_reason() is not None:
    pytest.skip(f"the C++ backend is {cpp_backend.unavailable_reason()}", allow_module_level=True)


@pytest.mark.parametrize("classes", [9, 1200])
def test_gradient_is_the_reference_gradient(classes):
    torch.manual_seed(5)
    base = torch.randn(11, classes)
    base[2, 3:5] = -torch.inf
    targets = torch.randint(5, classes, (11,))
    targets[4] = -100
    base[4] = torch.nan
    gradients = []
    for backend in ("cpp", "torch"):
        logits = base.clone().requires_grad_()
        stats = sk.row_stats(
            logits, targets, outputs=["entropy", "loss", "grad_norm"], temperature=1.5, backend=backend
        )
        assert not stats.grad_norm.requires_grad
        (stats.loss * torch.arange(11.0) + 0.3 * stats.entropy).sum().backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert (gradients[0][4] == 0).all()


def check_gradient(logits, targets, dim=-1, tiny=1e-6, **settings):
    """The gradient's error against float64 is a few roundings of the reference's own at the same precision."""
    gradients = []
    torch.manual_seed(10)
    weights = torch.randn(2, *targets.shape)
    for backend, base in (("cpp", logits), ("torch", logits.double()), ("torch", logits)):
        leaf = base.detach().requires_grad_()
        stats = sk.row_stats(leaf, targets, outputs=["loss", "entropy"], dim=dim, backend=backend, **settings)
        total = (weights[0] * stats.loss).nan_to_num(0, 0, 0) + (weights[1] * stats.entropy).nan_to_num(0, 0, 0)
        gradients.append(torch.autograd.grad(total.sum(), leaf)[0])
    ours, exact, same = gradients
    assert ours.dtype == logits.dtype
    half_step = 0.5 * torch.finfo(logits.dtype).eps * exact.abs() + 2**-25 * (logits.dtype is torch.float16)
    allowed = half_step + (same.double() - exact).abs() + tiny * (1 + exact.abs())
    error = (ours.double() - exact).abs()
    assert (error <= allowed).all(), f"{error.max():.3g}"
    return ours


@pytest.mark.parametrize("settings", [{}, {"softcap": 6.0, "temperature": 0.7, "label_smoothing": 0.2}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_in_every_layout(instruction_set, dtype, settings):
    torch.manual_seed(9)
    for shape in SHAPES:
        targets = torch.randint(0, shape[1], shape[:1])
        targets[::4] = -100
        logits = (3 * torch.randn(shape)).to(dtype)
        if not settings:  # the reference's softcap lets an ignored row's NaN into its gradient
            logits[::4] = torch.nan
        ours = check_gradient(logits, targets, **settings)
        assert (ours[::4] == 0).all()
        check_gradient(torch.randn(shape).add(1000).to(dtype), targets.int(), **settings)
    for shape, order, dim in LAYOUTS:
        memory = (3 * torch.randn([shape[d] for d in order])).to(dtype)
        logits = memory.permute([order.index(d) for d in range(len(shape))])
        targets = torch.randint(0, shape[dim], shape[:dim] + shape[dim + 1 :])
        targets.view(-1)[::5] = -100
        check_gradient(logits, targets, dim, **settings)
        if dim != len(shape) - 1:
            check_gradient(logits[..., ::2], targets[..., ::2], dim, **settings)
        else:
            check_gradient(logits[::2], targets[::2], dim, **settings)


@pytest.mark.parametrize("outputs", [["loss"], ["entropy"]])
def test_gradient_of_one_output(instruction_set, outputs):
    logits, targets = torch.randn(9, 100), torch.randint(0, 100, (9,))
    logits[3, ::2] = -torch.inf
    gradients = []
    for backend in ("cpp", "torch"):
        leaf = logits.clone().requires_grad_()
        stats = sk.row_stats(leaf, targets, outputs=["loss", "entropy"], backend=backend)
        getattr(stats, outputs[0]).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_is_rounded_to_the_nearest(instruction_set, dtype):
    torch.manual_seed(11)
    logits, targets = (2 * torch.randn(64, 200)).to(dtype), torch.randint(0, 200, (64,))
    full = logits.float().requires_grad_()
    half = logits.clone().requires_grad_()
    scale = torch.logspace(-6, 9, 64)  # subnormal to infinite in float16
    for leaf in (full, half):
        (sk.row_stats(leaf, targets, backend="cpp", outputs=["loss"]).loss * scale).sum().backward()
    assert torch.equal(half.grad, full.grad.to(dtype))


def test_second_derivative_is_the_reference_second_derivative():
    torch.manual_seed(6)
    base, targets, direction = torch.randn(5, 7), torch.tensor([0, 6, 2, -100, 1]), torch.randn(5, 7)
    results = []
    for backend in ("cpp", "torch"):
        logits = base.clone().requires_grad_()
        stats = sk.row_stats(logits, targets, backend=backend)
        (gradient,) = torch.autograd.grad((stats.loss + stats.entropy).sum(), logits, create_graph=True)
        (gradient * direction).sum().backward()
        results.append(logits.grad)
    torch.testing.assert_close(*results)
    assert results[0].abs().sum() > 0


def test_float64_gradients_by_finite_differences(instruction_set):
    torch.manual_seed(15)
    for shape, dim in (((3, 7), -1), ((2, 70), -1), ((2, 5, 9), 1)):
        logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        targets = torch.randint(0, shape[dim], logits.select(dim, 0).shape)

        def both(x, targets=targets, dim=dim):
            stats = sk.row_stats(x, targets, dim=dim, temperature=1.3, softcap=4.0, label_smoothing=0.1, backend="cpp")
            return stats.loss, stats.entropy

        assert torch.autograd.gradcheck(both, (logits,))


def test_rounding_of_the_stored_lse_does_not_reach_the_gradient_of_shifted_rows():
    logits = (torch.randn(4, 50) + 1e4).requires_grad_()
    targets = torch.tensor([1, 2, 3, 4])
    sk.row_stats(logits, targets, outputs=["loss"], backend="cpp").loss.sum().backward()
    exact = torch.autograd.functional.jacobian(
        lambda z: reference.row_stats(StatsCall(z, targets, ["loss"], -1, Settings())).loss.sum(),
        logits.detach().double(),
    )
    torch.testing.assert_close(logits.grad.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("classes", [10, 200])
def test_a_nan_of_any_bits_stays_nan(instruction_set, dtype, classes):
    """Rounded as a number, a NaN of nothing but set bits would become -0."""
    logits, targets = torch.randn(20, classes).to(dtype).requires_grad_(), torch.arange(20) % classes
    upstream = torch.ones(20)
    upstream.view(torch.int32)[3] = 0x7FFFFFFF
    upstream.view(torch.int32)[4] = -1
    (gradient,) = torch.autograd.grad(sk.row_stats(logits, targets, backend="cpp").loss, logits, upstream)
    assert gradient[3:5].isnan().all()
    assert gradient[[*range(3), *range(5, 20)]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("instruction_set", each(("portable", "avx2", "avx512")), indirect=True)
def test_a_gradient_larger_than_the_caches_is_the_same(instruction_set, dtype):
    """From 16 MB on it is stored past them, from the first whole line of each row on; here no two rows begin alike."""
    torch.manual_seed(12)
    logits, targets = torch.randn(66, 130_003).to(dtype), torch.randint(0, 130_003, (66,))
    targets[0], targets[1], targets[2] = 0, 130_002, -100

    def gradient(rows):
        leaf = logits[rows].clone().requires_grad_()
        stats = sk.row_stats(leaf, targets[rows], backend="cpp")
        return torch.autograd.grad((stats.loss + 0.1 * stats.entropy).sum(), leaf)[0]

    whole = gradient(slice(None))
    assert whole.numel() * whole.element_size() >= 16 << 20
    for begin in range(0, 66, 11):
        assert torch.equal(whole[begin : begin + 11], gradient(slice(begin, begin + 11)))
