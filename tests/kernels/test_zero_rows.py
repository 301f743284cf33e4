"""The backward of ``row_stats`` on rows without an upstream gradient: zeros, and their logits are not read."""

import ctypes
import mmap
import os
import sys
from pathlib import Path

import pytest
import torch

import sparse_kernels as sk
from sparse_kernels import reference
from sparse_kernels._arguments import StatsCall, checked_settings
from sparse_kernels._dispatch import BACKENDS
from sparse_kernels.backends import cpp as cpp_backend
from sparse_kernels.backends import cpp_direct
from sparse_kernels.backends.cpp import LARGE, large_pages
from sparse_kernels.memory import untouched_zeros
from sparse_kernels.torch_library import schemas

M_PERTURB = -6  # of <malloc.h>: conftest.py has it fill memory
BUILT = not cpp_backend.unavailable_reason()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNELS = [*(["cpp"] if BUILT else []), *(["triton"] if INTERPRETED else [])]
# Rows longer than a tile, short ones, classes that are not contiguous (NCHW), and one row a lane.
LAYOUTS = {"rows": ((13, 700), -1), "short rows": ((37, 9), -1), "pixels": ((2, 19, 4, 9), 1), "columns": ((50, 11), 0)}


def batch(shape, dim, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=g).to(dtype)
    rows = list(shape)
    classes = rows.pop(dim)
    above = [torch.randn(rows, generator=g) * (torch.rand(rows, generator=g) < 0.3) for _ in range(2)]
    return logits, torch.randint(0, classes, rows, generator=g), above


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("outputs", [("loss",), ("entropy",), ("loss", "entropy")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("backend", KERNELS)
def test_unused_rows_are_zeros_whatever_they_hold_and_the_others_are_right(backend, layout, dtype, outputs, inplace):
    shape, dim = layout
    if backend == "triton" and (dtype is torch.float64 or shape[0] > 40):
        pytest.skip("slow, and shown by fewer classes")
    logits, targets, above = batch(shape, dim, dtype)
    above = dict(zip(("loss", "entropy"), above, strict=True))
    used = torch.stack([above[name] != 0 for name in outputs]).any(0)
    assert 0 < used.sum() < used.numel()

    def gradient(logits, backend, **options):
        leaf = logits.clone().requires_grad_()
        x = leaf * 1 if options else leaf
        stats = sk.row_stats(x, targets, outputs=outputs, dim=dim, backend=backend, **options)
        total = sum(torch.where(above[name] != 0, getattr(stats, name) * above[name], 0.0).sum() for name in outputs)
        return torch.autograd.grad(total, leaf)[0]

    right = gradient(logits, "torch")
    spoilt = torch.where(used.unsqueeze(dim), logits, torch.nan)
    found = gradient(spoilt, backend, **({"inplace_backward": True} if inplace else {}))
    close = {"rtol": 2e-2, "atol": 1e-3} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(found, right, **close)
    assert found.movedim(dim, -1)[~used].eq(0).all()


@pytest.mark.parametrize("backend", KERNELS)
def test_nan_is_no_zero(backend):
    logits, targets, _ = batch((5, 20), -1)
    above = torch.tensor([0.0, torch.nan, 1.0, 0.0, -0.0])
    leaf = logits.requires_grad_()
    (found,) = torch.autograd.grad(sk.row_stats(leaf, targets, backend=backend).loss, leaf, above)
    assert found.isnan().any(-1).tolist() == [False, True, False, False, False]
    assert found.ne(0).any(-1).tolist() == [False, True, True, False, False]


@pytest.mark.skipif(not BUILT, reason="_cpp is not built, or this PyTorch is too old")
def test_unused_rows_of_a_gradient_that_no_cache_holds(instruction_set):
    logits, targets, _ = batch((40, 120_001), -1)
    above = torch.zeros(40)
    above[::7] = 1.0
    leaf = logits.requires_grad_()
    (found,) = torch.autograd.grad(sk.row_stats(leaf, targets).loss, leaf, above)
    assert found[above == 0].eq(0).all()
    right = leaf.detach()[::7].softmax(-1)
    right[torch.arange(6), targets[::7]] -= 1
    torch.testing.assert_close(found[::7], right)


def resident():
    """Bytes of this process in memory."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


@pytest.fixture
def fresh_memory():
    """Memory as the system gives it, not filled, and nothing that other tests have freed."""
    c_library = ctypes.CDLL(None)
    torch.use_deterministic_algorithms(False)
    if hasattr(c_library, "malloc_trim"):  # glibc
        c_library.mallopt(M_PERTURB, 0)
        c_library.malloc_trim(0)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.mark.skipif(not BUILT or not sys.platform.startswith("linux"), reason="_cpp is not built, or no Linux")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unused_rows_of_a_large_gradient_take_no_memory(fresh_memory, dtype):
    logits, targets, _ = batch((2, 64, 120_001), -1, dtype)
    targets[0, 1] = -100  # its upstream gradient is not 0
    above = torch.zeros(2, 64)
    above[:, ::16] = above[0, 1] = 0.5
    leaf = logits.requires_grad_()
    loss = sk.row_stats(leaf, targets).loss
    before = resident()
    (found,) = torch.autograd.grad(loss, leaf, above)
    assert resident() - before < found.nbytes / 4
    assert found.nbytes >= 16 << 20
    right = leaf.detach()[:, ::16].float().softmax(-1)
    right -= torch.nn.functional.one_hot(targets[:, ::16], 120_001)
    torch.testing.assert_close(found[:, ::16], (0.5 * right).to(dtype))
    above[0, 1] = 0.0
    assert found[above == 0].eq(0).all()
    found += 1.0  # an ordinary tensor
    assert found[above == 0].eq(1).all()


@pytest.mark.skipif(not cpp_direct.AVAILABLE, reason="_cpp is not built, or this PyTorch is too old")
@pytest.mark.parametrize("idle", [0, 40, 64])
def test_rows_without_an_upstream_gradient_are_counted_once(fresh_memory, monkeypatch, idle):
    """By the one call of C++ that makes the gradient: neither does the general route count, nor is it taken."""
    monkeypatch.setattr(schemas, "row_stats_backward", None)
    logits, targets, _ = batch((64, 120_001), -1)
    above = torch.ones(64)
    above[:idle] = 0.0
    leaf = logits.requires_grad_()
    (found,) = torch.autograd.grad(sk.row_stats(leaf, targets).loss, leaf, above)
    assert found[:idle].eq(0).all()
    right = leaf.detach()[idle:].softmax(-1)
    right -= torch.nn.functional.one_hot(targets[idle:], 120_001)
    torch.testing.assert_close(found[idle:], right)


@pytest.mark.skipif(not BUILT, reason="_cpp is not built, or this PyTorch is too old")
def test_a_large_gradient_of_upstream_zeros_and_of_a_wrong_shape(fresh_memory):
    logits, targets, _ = batch((64, 70_000), -1)
    leaf = logits.requires_grad_()
    loss = sk.row_stats(leaf, targets).loss
    for nothing in (torch.zeros(64), torch._efficientzerotensor(64), torch.zeros(()).expand(64)):
        (found,) = torch.autograd.grad(loss, leaf, nothing, retain_graph=True)
        assert found.eq(0).all()
    one = torch.ones(64)
    scoring = (-1, 1.0, 0.0, 0.0, -100, "cpp")
    with pytest.raises(ValueError, match="`loss_gradient` must be"):
        torch.ops.sparse_kernels.row_stats_backward(leaf, targets, one, one, None, torch.zeros(7), None, *scoring)


def test_memory_that_is_there_already_is_used_again(fresh_memory):
    like = torch.empty(8 << 20)
    assert (untouched_zeros(like) is not None) == sys.platform.startswith("linux")
    torch.use_deterministic_algorithms(True)  # fills new memory, so that its pages are there
    assert untouched_zeros(like) is None


@pytest.mark.parametrize("settings", [(1.0, 0.0, 0.0), (0.7, 5.0, 0.2)], ids=str)
def test_the_references_gradient_in_closed_form_is_that_of_autograd(settings):
    logits, targets, above = batch((13, 70), -1, torch.float64)
    targets[2], logits[2], logits[3, 5] = -100, torch.nan, -torch.inf
    targets[3] = 0
    call = StatsCall(logits, targets, ("loss", "entropy"), -1, checked_settings(*settings))
    stats, maximum, total = reference.row_stats_saving(call)
    leaf = logits.clone().requires_grad_()
    right = reference.row_stats(StatsCall(leaf, targets, ("loss", "entropy"), -1, call.settings))
    (expected,) = torch.autograd.grad([right.loss, right.entropy], leaf, above)
    found = torch.empty_like(logits)
    upstream = dict(zip(("loss", "entropy"), above, strict=True))
    BACKENDS["torch"].row_stats_backward(call, maximum, total, stats.entropy, upstream, found)
    torch.testing.assert_close(found, expected)
    reference.row_stats_backward(call, maximum, total, stats.entropy, upstream, logits)
    torch.testing.assert_close(logits, expected)


THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not (BUILT and THP.exists()), reason="no large pages")
@pytest.mark.parametrize("size", [LARGE - 1, 4 * LARGE])
def test_large_pages_are_asked_for_under_a_large_tensor(size):
    # A mapping of its own: memory of the heap can be what an earlier tensor has asked large pages for.
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    assert large_pages(memory) is memory
    middle, asked = memory.data_ptr() + size // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            begin, end = (int(number, 16) for number in words[0].split("-"))
        elif words[0] == "VmFlags:" and begin <= middle < end:
            asked = "hg" in words
    assert asked == (size > LARGE)
