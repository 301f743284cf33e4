"""The gradient of ``row_stats`` in one step of C++ against the general route: bit for bit the same, or left to it."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import sparse_kernels as sk
from sparse_kernels.backends import cpp_direct
from sparse_kernels.torch_library import gradients

pytestmark = pytest.mark.skipif(not cpp_direct.AVAILABLE, reason="_cpp is not built, or this PyTorch is too old")


def batch(rows, classes, dtype=torch.float32, targets=torch.int64):
    torch.manual_seed(3)
    labels = torch.randint(0, classes, (rows,), dtype=targets)
    labels[::7] = -100
    logits = 2 * torch.randn(rows, classes)
    logits[1::9, 2], logits[2::9, 3] = torch.nan, -torch.inf
    return logits.to(dtype), labels


def both(gradient_of, served=True):
    """The gradient by C++ alone, shown to be so, and by the general route."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpp_direct, "AVAILABLE", False)
        general = gradient_of()
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        general_gradient = gradients._gradient_in_new_memory
        patch.setattr(gradients, "_gradient_in_new_memory", lambda *given: calls.append(1) or general_gradient(*given))
        direct = gradient_of()
    assert bool(calls) != served
    for a, b in zip(direct, general, strict=True):
        assert (a.dtype, a.shape, a.stride(), type(a)) == (b.dtype, b.shape, b.stride(), type(b))
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


UPSTREAM = {
    "a mean": lambda stats: stats.loss.mean(),
    "a sum of both": lambda stats: (stats.loss + 0.3 * stats.entropy).sum(),
    "both sums": lambda stats: stats.loss.sum() + stats.entropy.sum(),
    "entropy": lambda stats: stats.entropy.mean(),
    "weights": lambda stats: stats.loss @ torch.arange(float(stats.loss.numel())),
    "few rows": lambda stats: stats.loss[::5].sum(),
}


@pytest.mark.parametrize("classes", [3, 10, 100, 129, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("upstream", UPSTREAM)
def test_every_dtype_and_upstream_gradient(upstream, dtype, classes):
    logits, labels = batch(61, max(classes, 4), dtype, torch.int32 if classes == 10 else torch.int64)

    def gradient():
        leaf = logits.clone().requires_grad_()
        stats = sk.row_stats(leaf, labels, temperature=0.7, label_smoothing=0.1, outputs=["loss", "entropy", "argmax"])
        assert not stats.argmax.requires_grad
        assert stats.grad_norm is None
        UPSTREAM[upstream](stats).backward()
        return stats.loss.detach(), leaf.grad

    both(gradient)


@pytest.mark.parametrize("shape", [(7,), (3, 4, 7), (1, 1, 7)], ids=str)
def test_every_shape_of_rows(shape):
    logits, labels = torch.randn(shape), torch.randint(0, 7, shape[:-1])

    def gradient():
        leaf = logits.clone().requires_grad_()
        return torch.autograd.grad(sk.row_stats(leaf, labels).loss.mean(), leaf)

    both(gradient)


def test_a_model_learns_and_a_graph_serves_twice():
    model = torch.nn.Linear(5, 10)
    inputs, labels = torch.randn(64, 5), torch.randint(0, 10, (64,))

    def gradient():
        loss = sk.row_stats(model(inputs), labels).loss.mean()
        first = torch.autograd.grad(loss, model.weight, retain_graph=True)
        return *first, *torch.autograd.grad(loss, model.weight)

    both(gradient)


def test_what_something_else_must_see_is_left_to_the_general_route():
    logits, labels = batch(40, 10)
    logits = logits.nan_to_num()

    above = torch.view_as_complex(torch.randn(40, 2)).conj().imag
    assert above.is_neg()

    def second():
        leaf = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(sk.row_stats(leaf, labels).entropy.sum(), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)

    def negated():
        leaf = logits.clone().requires_grad_()
        return torch.autograd.grad(sk.row_stats(leaf, labels).loss, leaf, above)

    def strided():
        leaf = logits.clone().requires_grad_()
        return torch.autograd.grad(sk.row_stats(leaf, labels).loss, leaf, torch.arange(80.0)[::2])

    for gradient in (second, negated, strided):
        both(gradient, served=False)


def test_a_checkpoint_and_hooks_of_saved_tensors():
    logits, labels = batch(40, 10)

    def checkpointed():
        leaf = logits.clone().requires_grad_()
        checkpoint(lambda x: sk.row_stats(x, labels).loss.sum(), leaf, use_reentrant=False).backward()
        return (leaf.grad,)

    def hooked():
        leaf = logits.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
            loss = sk.row_stats(leaf, labels).loss.sum()
        return torch.autograd.grad(loss, leaf)

    both(checkpointed)
    both(hooked)


def test_logits_changed_since_are_refused():
    logits, labels = torch.randn(40, 10).requires_grad_() * 1, torch.randint(0, 10, (40,))
    loss = sk.row_stats(logits, labels).loss.sum()
    logits.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_gradient_above_is_no_gradient():
    leaf = torch.randn(40, 10).requires_grad_()
    stats = sk.row_stats(leaf, torch.randint(0, 10, (40,)), outputs=("loss", "entropy"))
    assert torch.autograd.grad(stats.loss.sum(), leaf, torch.zeros(()), retain_graph=True)[0].eq(0).all()
    assert gradients._PlainRowStats.backward(None, None, None) == (None,) * 4


@pytest.mark.parametrize("targets", [torch.int64, torch.int32], ids=str)
def test_a_large_gradient_is_direct_however_much_of_it_is_of_rows_without_one(targets):
    """16 MB of such rows and more may take no memory."""
    row = torch.randn(1 << 20)
    labels, weights = torch.arange(1, 21, dtype=targets), torch.arange(20.0) + 1

    def gradient():
        leaf = row.repeat(20, 1).requires_grad_()  # 4 MB a row
        stats = sk.row_stats(leaf, labels)
        found = torch.autograd.grad((stats.loss, stats.entropy), leaf, (weights, weights))
        return [part[::3, :100] for part in found]

    labels[4], weights[5], weights[6] = -100, 0, 0
    both(gradient)
    labels[7] = -100
    both(gradient)
