"""Float32 products of a head by oneDNN, on any processor; which processors take them of their own accord."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from sparse_kernels import linear_row_stats, selective_linear_cross_entropy
from sparse_kernels._settings import checked_settings
from sparse_kernels.head import onednn, products
from sparse_kernels.head.call import flat_head

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
PART = products._PART


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Products that oneDNN has computed, by shape, on a processor that is taken for one where it is ahead."""
    made, linear = [], onednn.linear

    def noted(input, weight, bias=None):
        assert weight.is_contiguous() or weight.t().is_contiguous()  # or it takes a hundred times as long
        made.append((*input.shape, weight.shape[0]))
        return linear(input, weight, bias)

    monkeypatch.setattr(onednn, "_ahead_of_mkl", lambda: True)
    monkeypatch.setattr(onednn, "linear", noted)
    return made


def operands(rows, hidden, classes, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, hidden, generator=g)
    w = torch.randn(classes, hidden, generator=g) / hidden**0.5
    b, y = torch.randn(classes, generator=g), torch.randint(0, classes, (rows,), generator=g)
    return *(tensor.to(dtype).requires_grad_() for tensor in (x, w, b)), y


def gradients(loss, leaves):
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def dense(x, w, b, y):
    return F.cross_entropy(F.linear(x, w, b), y)


def ours(x, w, b, y, **options):
    return linear_row_stats(x, w, y, linear_bias=b, **options).loss.mean()


def check(found, leaves, y):
    """Compare with float64: no more than twice the error of PyTorch's own product."""
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    right, plain = gradients(dense(*exact, y), exact), gradients(dense(*leaves, y), leaves)
    for a, b, c in zip(found, plain, right, strict=True):
        least = 1e-6 * (1 + c.norm())  # of one number, whose error by PyTorch is small by chance
        assert a.shape == b.shape
        assert a.stride() == b.stride()
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm() + least


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("classes", [1, 7, 17, PART, PART + 1, 2 * PART + 17])
@pytest.mark.parametrize("hidden", [1, 7, 17, 128])
@pytest.mark.parametrize("rows", [1, 5])
def test_loss_and_gradients_are_as_near_to_float64_as_the_dense_ones(rows, hidden, classes, chunk, calls):
    *leaves, y = operands(rows, hidden, classes)
    check(gradients(ours(*leaves, y, chunk=chunk), leaves), leaves, y)
    x, w, b = leaves
    fused = selective_linear_cross_entropy(x, w, y, linear_bias=b, select=None, chunk=chunk).loss
    check(gradients(fused, leaves), leaves, y)
    assert calls


def test_the_three_products_of_many_rows(calls):
    *leaves, y = operands(600, 64, PART + 300)
    check(gradients(ours(*leaves, y), leaves), leaves, y)
    shapes = {shape[1:] for shape in calls}
    assert shapes >= {(64, PART), (64, 300), (PART + 300, 64)}
    assert (
        sum(shape[0] for shape in calls if shape[0] in (PART, 300)) >= PART + 300
    )  # the weight's, by blocks of classes


@pytest.mark.parametrize("which", ["input", "bias", "empty strides"])
def test_operands_that_are_not_contiguous(which, calls):
    *leaves, y = operands(6, 16, 40)
    x, w, b = (leaf.detach() for leaf in leaves)
    if which == "input":
        x = x.repeat(1, 2).view(6, 16, 2)[:, :, 0].copy_(x)
    if which == "bias":
        b = b[:1].expand(40)
    if which == "empty strides":
        w = torch.empty_strided((40, 1), (1, 77)).copy_(w[:, :1])
        x = torch.empty_strided((6, 1), (1, 33)).copy_(x[:, :1])
    leaves = [leaf.requires_grad_() for leaf in (x, w, b)]
    x, w, b = leaves
    right = gradients(dense(*leaves, y), leaves)
    for loss in (ours(*leaves, y), selective_linear_cross_entropy(x, w, y, linear_bias=b, select=None).loss):
        for a, c in zip(gradients(loss, leaves), right, strict=True):
            torch.testing.assert_close(a, c)
    assert calls


@pytest.mark.parametrize("why", ["strided weight", "float64", "bfloat16", "switched off", "no hidden size"])
def test_other_products_stay_with_pytorch(why, calls):
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(why, torch.float32)
    *leaves, y = operands(6, 0 if why == "no hidden size" else 16, 40, dtype)
    if why == "strided weight":
        leaves[1] = leaves[1].detach().t().contiguous().t().requires_grad_()
    off = torch.backends.mkldnn.flags(enabled=False) if why == "switched off" else contextlib.nullcontext()
    with off:
        found, right = gradients(ours(*leaves, y), leaves), gradients(dense(*leaves, y), leaves)
    for a, c in zip(found, right, strict=True):
        torch.testing.assert_close(
            a, c, **({"rtol": 2e-2, "atol": 2e-2} if why == "bfloat16" else {}), check_dtype=False
        )
    assert not calls


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_lower_precision_of_products_is_no_worse_than_pytorchs(precision):
    was = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        *leaves, y = operands(64, 256, 500)
        check(gradients(ours(*leaves, y), leaves), leaves, y)
    finally:
        torch.set_float32_matmul_precision(was)


def test_deterministic_algorithms_give_the_same_bits():
    *leaves, y = operands(40, 32, PART + 5)
    first = gradients(ours(*leaves, y), leaves)
    torch.use_deterministic_algorithms(True)
    try:
        second = gradients(ours(*leaves, y), leaves)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_compiled_head(calls):
    *leaves, y = operands(6, 16, 40)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for a, c in zip(gradients(compiled(*leaves, y), leaves), gradients(dense(*leaves, y), leaves), strict=True):
        torch.testing.assert_close(a, c)
    assert calls


@pytest.mark.parametrize("maker", ["GenuineIntel", "AuthenticAMD"])
def test_processors_of_intels_keep_mkl(maker, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(onednn, "_vendor", lambda: f"vendor_id\t: {maker}")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert onednn._ahead_of_mkl.__wrapped__() == (maker != "GenuineIntel")


@pytest.mark.parametrize("rows", [0, 1, 255, 256, 257, 1024, 1025, 5000])
@pytest.mark.parametrize("classes", [40, 49_152, 151_936])
def test_rows_are_dealt_out_evenly_to_few_tiles(rows, classes):
    x, w = torch.empty(1, 8).expand(rows, 8), torch.empty(1, 8).expand(classes, 8)
    head = flat_head(
        x, w, torch.zeros(rows, dtype=torch.int64), None, None, checked_settings(1.0, 0.0, 0.0, -100), None
    )
    size = products.scored_rows(head, rows)
    tiles = -(-rows // size)
    assert 1 <= size <= max(256, 30 * 2**20 // (classes * 4))
    assert (
        rows - (tiles - 1) * size > size - tiles or tiles <= 1
    )  # the last is short of the others by less than their number
    assert products.differentiated_rows(head, rows) >= size
