"""Operands of attention, and the comparison of two forms of it."""

import torch


def operands(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


def assert_same(y, right, q, k, v):
    """Results agree, and so do the gradients of q, k and v."""
    torch.testing.assert_close(y, right)
    grad = torch.randn_like(y)
    for ours, theirs in zip(*(torch.autograd.grad(out, (q, k, v), grad) for out in (y, right)), strict=True):
        torch.testing.assert_close(ours, theirs)
