"""Philox4x32-10, the counter-based generator of the stochastic gate, in plain tensor arithmetic.

A row's number depends on (seed, step, row) alone: not on the backend, the batch's size, the device or earlier draws.
Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. The arithmetic is int64 on 16-bit
halves because neither PyTorch on every device nor XLA has an unsigned 32x32 -> 64 bit product.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def _high_low(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of a * m for a in [0, 2^32), without a product of 2^63 or more."""
    low16 = (a & 0xFFFF) * m
    high16 = (a >> 16) * m
    high = (high16 + (low16 >> 16)) >> 16
    low = (low16 + ((high16 & 0xFFFF) << 16)) & _MASK
    return high, low


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, ...]:
    """Return four words of random bits, int64 tensors in [0, 2^32).

    Args:
        counter: four words, int64 tensors in [0, 2^32).
        seed: the key, modulo 2^64.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        h0, l0 = _high_low(c0, _MULTIPLIERS[0])
        h1, l1 = _high_low(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def words(rows: int, *, seed: int, step: int | Tensor, device: torch.device) -> Tensor:
    """Return each row's word of random bits for this seed and step: int64 [rows] in [0, 2^32).

    Args:
        rows: how many.
        seed: modulo 2^64.
        step: modulo 2^64, an int or a one-element int64 tensor.
        device: of the result.
    """
    row = torch.arange(rows, dtype=torch.int64, device=device)
    step = torch.as_tensor(step, dtype=torch.int64, device=device).reshape(())
    high = torch.zeros_like(row)
    return philox((row & _MASK, row >> 32, high + (step & _MASK), high + ((step >> 32) & _MASK)), seed)[0]


def uniform(rows: int, *, seed: int, step: int | Tensor, device: torch.device) -> Tensor:
    """Return each row's number for this seed and step: float32 [rows] in [0, 1), multiples of 2^-24.

    Not for draws of a probability: it is 0 once in 2^24 rows, so that a row of any probability is kept as often.

    Args:
        rows: how many.
        seed: modulo 2^64.
        step: modulo 2^64, an int or a one-element int64 tensor.
        device: of the result.
    """
    return (words(rows, seed=seed, step=step, device=device) >> 8).to(torch.float32) * 2.0**-24


def draw_limit(p: Tensor) -> Tensor:
    """Return the number t of words, out of 2^32, that keep a row of probability p: p 2^32, rounded up.

    A row is kept if its word is below t, and weighs 2^32 / t: the inverse of the probability that was really used, so
    the weighted sum is unbiased for every p. t is at least 1, so no weight is above 2^32; p = 1 keeps always.

    Args:
        p: floating, any shape, in [0, 1]; NaN keeps never. It is taken in float32, the same for every backend.

    Returns:
        float32 of p's shape, whole numbers in [1, 2^32], which float32 holds; 0 for NaN.
    """
    return (p.float() * 2.0**32).ceil().clamp(min=1.0).nan_to_num(nan=0.0)
