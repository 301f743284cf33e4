"""A position-wise module whose backward takes only the rows that have a gradient."""

import pytest
import torch
from torch import nn

from sparse_training.errors import UserError
from sparse_training.nn import DropZeroRows


def mlp(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)).to(dtype)


def gradients(module, x, weight):
    (module(x) * weight).sum().backward()
    found = [x.grad, *(parameter.grad for parameter in module.parameters())]
    x.grad = None
    return found


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(9, 6), (2, 7, 6)], ids=str)
def test_gradients_are_those_of_the_module_and_rows_without_one_are_not_run(shape, share):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape, dtype=torch.float64) * (torch.rand(shape[:-1]) < share).unsqueeze(-1)
    right = gradients(mlp(), x, weight)
    dropped = DropZeroRows(mlp())
    for a, b in zip(gradients(dropped, x, weight), right, strict=True):
        torch.testing.assert_close(a, b)
    assert dropped.rows == (int((weight != 0).any(-1).sum()), weight[..., 0].numel())


def test_frozen_parameters_inputs_without_a_gradient_and_no_grad():
    x, module = torch.randn(5, 6), DropZeroRows(mlp(torch.float32))
    module.module[1].weight.requires_grad_(False)
    module(x).sum().backward()
    assert module.module[1].weight.grad is None
    assert module.module[3].weight.grad is not None
    with torch.no_grad():
        assert torch.equal(module(x), module.module(x))


def test_autocast_is_that_of_the_forward():
    x, module = torch.randn(5, 6, requires_grad=True), DropZeroRows(mlp(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)
        right = module.module(x)
    weight = torch.randn_like(output)
    (found,) = torch.autograd.grad(output, x, weight)
    torch.testing.assert_close(found, torch.autograd.grad(right, x, weight)[0])


BAD = {
    "dropout": (nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)), "draws no random numbers; set its dropout to 0"),
    "buffers": (nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), "changes no buffer"),
    "rows": (nn.Flatten(0), r"module of .*got \(30,\)"),
}


@pytest.mark.parametrize(("module", "message"), BAD.values(), ids=BAD)
def test_modules_that_are_not_position_wise_are_refused(module, message):
    with pytest.raises(UserError, match=message):
        DropZeroRows(module)(torch.randn(5, 6, requires_grad=True))


@pytest.mark.parametrize("given", [torch.ones(5, 6, dtype=torch.long), torch.randn(6), "rows"], ids=str)
def test_inputs_that_are_no_rows_are_refused(given):
    with pytest.raises(UserError, match=r"floating tensor \[..., features\], got"):
        DropZeroRows(mlp())(given)


def test_what_is_no_module_and_a_second_derivative_are_refused():
    with pytest.raises(UserError, match=r"torch.nn.Module, got function"):
        DropZeroRows(mlp)
    x = torch.randn(5, 6, requires_grad=True)
    with pytest.raises(UserError, match="no second derivative"):
        torch.autograd.grad(DropZeroRows(mlp(torch.float32))(x).sum(), x, create_graph=True)
