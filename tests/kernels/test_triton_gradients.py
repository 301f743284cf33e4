"""Gradients of the Triton kernels against the reference; and offsets beyond 32 bits, of both directions."""

import mmap
from dataclasses import replace

import pytest
import torch
from test_triton import INTERPRETED, runs, serve, stats_call
from test_triton import tensors_where_kernels_run as tensors_where_kernels_run  # of this module, too

import sparse_kernels as sk
from sparse_kernels import reference
from sparse_kernels.backends.triton import backend as triton_backend

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy, on NaN and inf


@runs
@pytest.mark.parametrize(("far", "classes"), [("rows", 4), ("classes", 5), ("classes", 9)])  # 9: in two blocks
def test_offsets_have_64_bits(far, classes):
    """Rows, or classes, far apart. A wrapped offset reads other memory of the mapping."""
    apart, middle = 2**30 if classes < 9 else 2**29, 2**32
    if INTERPRETED:  # pages that are not touched take no memory
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        memory = torch.frombuffer(mmap.mmap(-1, 4 * middle + 4096, flags=flags), dtype=torch.bfloat16)
    else:
        memory = torch.zeros(2 * middle + 2048, dtype=torch.bfloat16)
    strides = (1, apart) if far == "classes" else (apart, 1)
    logits = memory.as_strided((5, classes), strides, middle)
    torch.manual_seed(12)
    logits.copy_(torch.randn(logits.shape))
    call = stats_call(logits, torch.ones(len(logits), dtype=torch.int64))
    small = replace(call, logits=logits.clone(memory_format=torch.contiguous_format))
    for ours, exact in zip(serve(call), reference.row_stats(small), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6)
    one = torch.ones(len(logits))
    stats = reference.row_stats(replace(small, outputs=["entropy"]))
    saved = (
        logits.float().amax(1),
        (logits.float() - logits.float().amax(1, keepdim=True)).exp().sum(1),
        stats.entropy,
    )
    wanted = torch.empty_like(small.logits)
    triton_backend.row_stats_backward(small, *saved, {"loss": one}, wanted)
    triton_backend.row_stats_backward(call, *saved, {"loss": one}, logits)
    assert torch.equal(logits, wanted)


@runs
def test_no_rows_of_any_strides():
    logits = torch.empty(0, 2, 3, 4, 5).permute(4, 3, 2, 1, 0).requires_grad_()
    targets = torch.empty(5, 3, 2, 0, dtype=torch.int64)
    loss = sk.row_stats(logits, targets, dim=1, outputs="loss", backend="triton").loss
    assert torch.autograd.grad(loss.sum(), logits)[0].shape == logits.shape


@runs
@pytest.mark.parametrize("shape", [(9, 10), (3, 100), (2, 1301), (1, 9, 40)])
def test_gradient_written_over_the_logits(shape, many_processors):
    torch.manual_seed(13)
    dim = 1 if len(shape) == 3 else -1
    logits, targets = torch.randn(shape), torch.randint(0, shape[dim], shape[:1] + shape[2:])
    targets.view(-1)[0] = -100
    call = stats_call(logits, targets, dim=dim)
    stats, *saved = triton_backend.row_stats_saving(call)
    upstream = {name: torch.randn(targets.shape) for name in ("loss", "entropy")}
    wanted = torch.empty_like(logits)
    triton_backend.row_stats_backward(call, *saved, stats.entropy, upstream, wanted)
    assert wanted.abs().sum() > 0
    triton_backend.row_stats_backward(call, *saved, stats.entropy, upstream, logits)
    assert torch.equal(logits, wanted)


@runs
def test_gradient_of_rows_in_three_loops_with_their_logits():
    """Each is two nested loops, but not both together: the logits of overlapping rows, their gradient packed."""
    torch.manual_seed(15)
    targets = torch.randint(0, 4, (2, 3, 5))
    gradients = []
    for backend in ("triton", "torch"):
        torch.manual_seed(16)
        base = torch.randn(3, 5, 4, requires_grad=True)
        logits = base.transpose(1, 2).expand(2, 3, 4, 5)
        stats = sk.row_stats(logits, targets, dim=2, backend=backend)
        (stats.loss * torch.arange(30.0).reshape(2, 3, 5)).sum().backward()
        gradients.append(base.grad)
    torch.testing.assert_close(*gradients)


@runs
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "temperature": 1.5}, {"label_smoothing": 0.2}])
@pytest.mark.parametrize("shape", [(11, 9), (3, 1300), (2, 9, 40)])
def test_gradient_is_the_reference_gradient(shape, options):
    torch.manual_seed(7)
    dim = -1 if len(shape) == 2 else 1
    base = 2 * torch.randn(shape) + (0 if "softcap" in options else 1e3)
    targets = torch.randint(5, shape[dim], shape[:1] + shape[2:])
    if not options:
        base[2 % shape[0], 3:5] = -torch.inf
    targets[1] = -100
    if "softcap" not in options:  # where the reference's own gradient of an ignored NaN is NaN
        base[1] = torch.nan
    gradients = []
    for backend, exact in (("triton", False), ("torch", True)):
        logits = (base.double() if exact else base.clone()).requires_grad_()
        outputs = ["entropy", "loss", "grad_norm"]
        stats = sk.row_stats(logits, targets, outputs=outputs, dim=dim, backend=backend, **options)
        assert not stats.grad_norm.requires_grad
        weight = torch.arange(float(stats.loss.numel())).reshape(stats.loss.shape)
        (stats.loss * weight + 0.3 * stats.entropy).sum().backward()
        gradients.append(logits.grad.float())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert (gradients[0][1] == 0).all()


@runs
def test_gradient_of_one_output_and_of_strided_logits():
    targets = torch.tensor([1, 2, -100, 0])
    for dtype in (torch.float64, torch.bfloat16):
        for names in (["loss"], ["entropy"], ["entropy", "loss"]):
            gradients = []
            for backend in ("triton", "torch"):
                torch.manual_seed(8)
                whole = torch.randn(4, 40, dtype=dtype, requires_grad=True)
                stats = sk.row_stats(whole[:, 3:24], targets, outputs=names, backend=backend)
                sum(getattr(stats, name).sum() for name in names).backward()
                gradients.append(whole.grad)
            tolerance = 1e-12 if dtype is torch.float64 else 1e-2
            torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance / 10)


@runs
def test_gradcheck():
    torch.manual_seed(9)
    base, targets = torch.randn(2, 4, dtype=torch.float64), torch.tensor([0, 3])

    def both(logits):
        stats = sk.row_stats(logits, targets, temperature=0.7, backend="triton")
        return stats.loss, stats.entropy

    assert torch.autograd.gradcheck(both, base.requires_grad_())  # the second derivative: test_library.py


@runs
@pytest.mark.parametrize(("shape", "dim"), [((5, 9), -1), ((2, 1300), -1), ((2, 9, 40), 1)])
def test_gradient_in_the_memory_of_the_logits(shape, dim):
    torch.manual_seed(10)
    base, targets = torch.randn(shape), torch.randint(0, shape[dim], shape[:1] + shape[2:])
    targets[0] = -100
    gradients = []
    for inplace in (False, True):
        leaf = base.clone().requires_grad_()
        logits = leaf * 1
        stats = sk.row_stats(logits, targets, dim=dim, softcap=5.0, inplace_backward=inplace, backend="triton")
        (stats.loss + 0.3 * stats.entropy).sum().backward()
        gradients.append(leaf.grad)
        assert torch.equal(logits, base) != inplace
    assert torch.equal(*gradients)
