# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (Triton has no types, and its compiler reads annotations as its own.)
"""Scalar functions that Triton lacks, and the random numbers of the gate."""

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Exponents are cut off here, where 2^-x is 0 in float32 and float64 alike and 0 * x is still 0: the difference
# of a masked logit (-inf, or the type's lowest) and another is -inf.
FAR = tl.constexpr(2000.0)
NO_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def divide(x, y, DOUBLE: tl.constexpr):
    """Return x / y, rounded once: the operator is off by 2 ulp in float32 on a GPU."""
    return x / y if DOUBLE else tl.div_rn(x, y)


@triton.jit
def root(x, DOUBLE: tl.constexpr):
    """Return the square root, rounded once, for the same reason."""
    return tl.sqrt(x) if DOUBLE else tl.sqrt_rn(x)


@triton.jit
def log1p(x, DOUBLE: tl.constexpr):
    """Return log(1 + x) for x >= 0, exact to rounding even if the device's log is coarse near 1."""
    # 2 artanh(s), s = x / (2 + x) <= 1/5 where it is used: 25x a term.
    TERMS: tl.constexpr = 12 if DOUBLE else 6
    s = x / (2.0 + x)
    square = s * s
    series = square * 0.0 + 1.0 / (2 * TERMS + 1)
    for i in tl.static_range(TERMS):
        series = series * square + 1.0 / (2 * (TERMS - i) - 1)
    return tl.where(x < 0.5, 2.0 * s * series, tl.log(1.0 + x))


@triton.jit
def tanh(a, DOUBLE: tl.constexpr):
    """Return tanh(a), also for NaN and both infinities, by one division."""
    # Lambert's continued fraction near 0, where 1 - exp cancels, as a / (p / q).
    LEVELS: tl.constexpr = 11 if DOUBLE else 5
    square = a * a
    q = square * 0.0 + 1.0
    p = q * (2 * LEVELS + 1)
    for i in tl.static_range(LEVELS):
        previous = p
        p = (2 * (LEVELS - i) - 1) * p + square * q
        q = previous
    t = tl.exp2(tl.abs(a) * (-2.0 * LOG2E))
    near = tl.abs(a) < 0.6
    far = tl.where(a < 0.0, t - 1.0, 1.0 - t)
    return tl.where(near, a * q, far) / tl.where(near, p, 1.0 + t)


@triton.jit
def draw_limit(p):
    """Return the number of words, out of 2^32, that keep a row of probability p, as philox.py does; float32."""
    words = tl.ceil(p.to(tl.float32) * 4294967296.0)
    words = tl.where(words < 1.0, 1.0, words)
    return tl.where(words == words, words, 0.0)  # NaN keeps never


@triton.jit
def philox_word(row, step, seed):
    """Return a row's word, int64 in [0, 2^32), as philox.py does: counter (row, step), key seed, word 0."""
    zero = row * 0
    c0 = (row & 0xFFFFFFFF).to(tl.uint32)
    c1 = (row >> 32).to(tl.uint32)
    c2 = ((zero + step) & 0xFFFFFFFF).to(tl.uint32)
    c3 = (((zero + step) >> 32) & 0xFFFFFFFF).to(tl.uint32)
    k0 = ((zero + seed) & 0xFFFFFFFF).to(tl.uint32)
    k1 = (((zero + seed) >> 32) & 0xFFFFFFFF).to(tl.uint32)
    word, _, _, _ = tl.philox_impl(c0, c1, c2, c3, k0, k1)
    return word.to(tl.int64)
