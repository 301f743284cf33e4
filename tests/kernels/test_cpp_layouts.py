"""Operands of any strides: of 0, such that rows overlap, with gaps, and of tensors without elements."""

import pytest
import torch
from test_cpp import DTYPES

import sparse_kernels as sk
from sparse_kernels.backends import cpp as cpp_backend

if cpp_backend.unavailable_reason() is not None:
    pytest.skip(f"the C++ backend is {cpp_backend.unavailable_reason()}", allow_module_level=True)

OUTPUTS = tuple(name for name in sk.STATISTICS if name != "argmax")
SHAPES = ((3, 19, 5), (2, 3, 40), (70, 9), (2, 130, 3), (1, 33, 17), (3, 2, 4, 5, 6), (300, 2), (5, 1))


def strided(shape, values, generator):
    """Return a tensor of one of ``values`` in each place of memory, whose strides are drawn from 0 to 9."""
    strides = torch.randint(0, 10, (len(shape),), generator=generator).tolist()
    return values[: 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))].as_strided(
        shape, strides
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_of_any_length(instruction_set, dtype):
    generator = torch.Generator().manual_seed(5)
    for shape in SHAPES:
        for dim in range(len(shape)):
            rows = shape[:dim] + shape[dim + 1 :]
            logits = strided(shape, (3 * torch.randn(5000, generator=generator)).to(dtype), generator)
            targets = strided(rows, torch.randint(0, shape[dim], (5000,), generator=generator), generator)
            found = []
            for leaf, index in ((logits, targets), (logits.contiguous(), targets.contiguous())):
                leaf = leaf.detach().requires_grad_()
                stats = sk.row_stats(leaf, index, outputs=OUTPUTS, dim=dim, backend="cpp")
                (gradient,) = torch.autograd.grad((stats.loss - stats.entropy).sum(), leaf)
                found.append([*(getattr(stats, name) for name in OUTPUTS), gradient.contiguous()])
            for name, ours, wanted in zip((*OUTPUTS, "gradient"), *found, strict=True):
                tiny = {"rtol": 1e-2, "atol": 1e-3} if name == "gradient" else {"rtol": 1e-5, "atol": 1e-5}
                at = f"{name}, {shape} of strides {logits.stride()}"
                torch.testing.assert_close(ours, wanted, **tiny, msg=lambda m, at=at: f"{at}: {m}")


@pytest.mark.parametrize("empty", range(6))
def test_no_rows_of_many_dimensions(empty):
    """Whose strides lead nowhere, and so need not be those of dimensions that collapse."""
    shape = [2, 3, 4, 5, 6, 7]
    shape[empty] = 0
    logits = torch.empty(shape).permute(5, 4, 3, 2, 1, 0).requires_grad_()
    for dim in (dim for dim, size in enumerate(logits.shape) if size):
        targets = torch.empty([size for d, size in enumerate(logits.shape) if d != dim], dtype=torch.int64)
        stats = sk.row_stats(logits, targets, dim=dim, backend="cpp")
        assert stats.loss.shape == targets.shape
        assert torch.autograd.grad(stats.loss.sum(), logits)[0].shape == logits.shape
        gated = sk.gate_rows(logits, targets, 0.0, weights={"loss": 1.0}, dim=dim, backend="cpp")
        assert gated.mask.shape == targets.shape
