"""PyTorch's own samples for ``linear_cross_entropy``, bad ones included, through the head."""

import sys
import types
import unittest

import pytest
import torch
import torch.nn.functional as F

from sparse_kernels import linear_row_stats, selective_linear_cross_entropy

REDUCTIONS = {"mean": "mean_kept", "sum": "sum"}


@pytest.fixture(scope="module")
def samples():
    """The module of PyTorch's samples; it imports a package for comparing printed text, which no sample needs."""
    patch = pytest.MonkeyPatch()
    try:
        import expecttest  # noqa: F401
    except ImportError:
        patch.setitem(sys.modules, "expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
    from torch.testing._internal import common_methods_invocations

    yield common_methods_invocations
    patch.undo()


def operator(samples):
    found = [info for info in samples.op_db if info.name == "nn.functional.linear_cross_entropy"]
    if not found:
        pytest.skip("PyTorch before 2.13 has no linear_cross_entropy")
    return found[0]


def ours(x, w, target, *, reduction="mean", linear_bias=None, ignore_index=-100, weight=None):
    options = {"linear_bias": linear_bias, "ignore_index": ignore_index}
    if weight is not None:  # as the documentation says: of classes, they weigh the rows' losses
        losses = linear_row_stats(x, w, target, outputs="loss", **options).loss
        row = torch.where(target == ignore_index, 0, weight[target.clamp(min=0)])
        weighted = losses * row
        return {"none": weighted, "sum": weighted.sum(), "mean": weighted.sum() / row.sum()}[reduction]
    if reduction == "none":
        return linear_row_stats(x, w, target, outputs="loss", **options).loss
    return selective_linear_cross_entropy(x, w, target, select=None, reduction=REDUCTIONS[reduction], **options).loss


def served(sample):
    """Class indices for a weight of two dimensions."""
    w, target = sample.args
    return w.dim() == 2 and not target.is_floating_point()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_samples_give_pytorchs_loss_and_gradients(samples, dtype):
    torch.manual_seed(0)
    count = 0
    for sample in operator(samples).sample_inputs("cpu", dtype, requires_grad=True):
        if not served(sample):
            continue
        w, target = sample.args
        leaves = [x for x in (sample.input, w, sample.kwargs.get("linear_bias")) if x is not None]
        found = ours(sample.input, w, target, **sample.kwargs)
        right = F.linear_cross_entropy(sample.input, w, target, **sample.kwargs)
        close = {} if dtype in (torch.float64, torch.float32) else {"rtol": 3e-2, "atol": 3e-2}
        torch.testing.assert_close(found.to(dtype), right, **close)
        above = torch.randn_like(right)
        theirs = torch.autograd.grad(right, leaves, above)
        for a, c in zip(torch.autograd.grad(found, leaves, above.to(found.dtype)), theirs, strict=True):
            torch.testing.assert_close(a, c, **({"rtol": 1e-1, "atol": 2e-1} if close else {}))
        count += 1
    assert count >= 10


def test_samples_of_another_kind_are_refused_in_one_line(samples):
    kinds = set()
    for sample in operator(samples).sample_inputs("cpu", torch.float32, requires_grad=False):
        w, target = sample.args
        if served(sample):
            continue
        with pytest.raises((TypeError, ValueError)) as caught:
            ours(sample.input, w, target, **sample.kwargs)
        assert "\n" not in str(caught.value)
        kinds.add((w.dim() == 2, target.is_floating_point()))
    assert {(True, True), (False, False)} <= kinds  # probabilities, and losses of more dimensions


def test_pytorchs_bad_inputs_are_refused_in_one_line(samples):
    count = 0
    for bad in operator(samples).error_inputs("cpu"):
        sample = bad.sample_input
        with pytest.raises((TypeError, ValueError)) as caught:
            ours(sample.input, *sample.args, **sample.kwargs)
        assert "\n" not in str(caught.value)
        count += 1
    assert count >= 6


@pytest.mark.parametrize("function", [linear_row_stats, selective_linear_cross_entropy])
def test_weights_of_classes_are_refused_by_name(function):
    options = {} if function is linear_row_stats else {"select": None}
    with pytest.raises(TypeError, match="no argument `weight`"):
        function(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2]), weight=torch.ones(5), **options)
