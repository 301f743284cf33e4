"""A threshold that keeps a wanted fraction of rows above it, whatever the rows' scale: the specification.

A batch is seen through sums over its rows (``summarise``), never sorted. With p the set-point, n of B rows kept:

    w = B / (B + 1/(p(1-p)))                                     how much one batch tells
    e = logit(p + w(n/B - p)) - logit(p) + (1/2 - p) w(1-w)       the error; noise variance w(1-w)
    u <- u + g (min(mean excess above, mean deficit below) - u)  the local unit of significance
    drift <- drift + K_I e;  threshold <- threshold + u (K_P e + drift)

This is PI control in velocity form: drift, the integral, is the threshold's speed, so a ramp (shrinking
losses) is followed without lag. In logits of the rate and in u, which for an exponential tail is exactly
d threshold / d log(rate), every significance looks alike: one law serves 1% and 90%, losses of 10 and of
0.01. Shrinking n/B towards p by the weight w keeps e finite and unbiased at n = 0, hence small batches.
The gains are those of the two-state Kalman filter (position, speed) that sees e: they fall like the
expanding-memory g-h filter's, 1/t, while it locks on (fixed gains miss 50 batches or, at 50%, jitter by
more than a point), then settle at the level that the process noise sets, lower for smaller batches.
Three guards, each with its test. Jump: when the smoothed error is beyond noise the covariance grows until
it explains it. Reach: a step goes at most 0.8 of the way to the mean row on that side, so a gap between two
modes is crossed, not leapt. Restart: when "none" or "all" selected runs on with odds below about e^-11,
the feedback is dead: drift is dropped (conditional integration, no windup) and the threshold starts again
inside the batch, at the p-quantile of an exponential law that begins at its smallest row or, where that lies
beyond the greatest, of one that ends there.

A set-point may be a share of mass instead: rows then count by their mass (the norm of their gradient, say)
in every sum, n/B is the share of it above the threshold, and B is (sum m)^2 / sum m^2, the number of equal
rows whose share would be as noisy. Nothing else changes: the threshold sought is the same quantile, of the
distribution weighted by mass.

csrc/control_law.h is the same law for the compiled backends.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_kernels.calls import ControlCall
from sparse_kernels.types import CONTROL_COUNTERS, CONTROL_VALUES, ControlState

POSITION_VARIANCE, DRIFT_VARIANCE = 4.0, 3e-4  # belief at a start, in logits^2 of the rate
POSITION_NOISE, DRIFT_NOISE = 5e-6, 1e-8  # per batch: set the steady gains (0.05 and 0.001 for 512 rows at 50%)
SMOOTHING = 0.1  # of the error that is tested for a jump
JUMP = 3.0  # deviations of the smoothed error that are a jump
JUMP_OF_DRIFT = 0.01  # of its square: a jump may be the start of a ramp
UNIT_GAIN = 0.2  # least gain of the local unit; it follows K_P above that
REACH = 0.8  # of the way to the mean row on the side moved to
DRIFT_LIMIT = 1.0  # local units a batch
SURPRISE, SURPRISE_PER_BATCH = 11.0, 6.0  # nats: a restart takes at least two batches
EDGE = 1e-6  # of the selected rows' share: below it nothing is selected (soft gates never reach 0)
RATE_SMOOTHING = 0.05
MISS_SMOOTHING, MISS_LIMIT = 1 / 32, 0.6  # off target this much of the time, or 29 batches on end: saturated


class Sums(NamedTuple):
    """What a batch's rows add up to; float tensors of the threshold's shape, ``invalid`` int64.

    Those of parts of a batch, in float64, add up to the batch's, but for the least of ``low`` and the
    greatest of ``high``. A row counts by its mass, 1 where the set-point is a rate.
    """

    mass: Tensor  # of the valid rows
    mass_sq: Tensor  # sum of their squares
    kept: Tensor  # mass of the rows kept; a soft gate's expectation
    selected: Tensor  # mass above the threshold
    rejected: Tensor  # the other valid mass
    finite: Tensor  # mass of the rows of finite significance, which alone count below
    total: Tensor  # of mass times significance
    excess: Tensor  # of mass times the way above the threshold
    deficit: Tensor  # of mass times the way below it
    low: Tensor
    high: Tensor
    invalid: Tensor  # rows of NaN


class Summary(NamedTuple):
    """What the law needs of one batch; float tensors of the threshold's shape, ``invalid`` int64."""

    rows: Tensor  # valid rows; with masses, as many equal ones as would be as noisy
    kept: Tensor  # share of them kept (a soft gate: its expectation)
    left_out: Tensor  # 1 - kept
    selected: Tensor  # share above the threshold (a soft gate: of sigmoids)
    rejected: Tensor  # the other share
    low: Tensor  # least finite significance
    high: Tensor  # greatest finite significance
    mean: Tensor  # of the finite significance
    above: Tensor  # mean of (significance - threshold) over the rows above it
    below: Tensor  # mean of (threshold - significance) over the others
    invalid: Tensor  # rows of NaN


def initial_state(threshold: Tensor) -> ControlState:
    """The state before the first batch: ``threshold`` float32 [...]; -inf starts by itself."""
    values = threshold.new_zeros((*threshold.shape, len(CONTROL_VALUES)))
    for name, value in (
        ("threshold", threshold),
        ("position_variance", POSITION_VARIANCE),
        ("drift_variance", DRIFT_VARIANCE),
        ("rate", math.nan),
    ):
        values[..., CONTROL_VALUES.index(name)] = value
    counters = torch.zeros((*threshold.shape, len(CONTROL_COUNTERS)), dtype=torch.int64, device=threshold.device)
    return ControlState(values, counters)


def control(call: ControlCall) -> None:
    """See ``sparse_kernels.control``."""
    with torch.no_grad():
        values, counters = call.state
        if call.significance.shape[-1] == 0:  # known from a shape; the least of nothing is not
            counters[..., CONTROL_COUNTERS.index("steps")] += 1
            return
        valid = None if call.labels is None else call.labels != call.ignore_index
        threshold = values[..., CONTROL_VALUES.index("threshold")]
        batch = summarise(call.significance, valid, call.mass, threshold, call.gate_temperature, call.p_min)
        after = advance(call.state, batch, call.setpoint.reshape(threshold.shape), call.overflow)
        values.copy_(after.values)
        counters.copy_(after.counters)


def summarise(
    significance: Tensor, valid: Tensor | None, mass: Tensor | None, threshold: Tensor,
    gate_temperature: float = 0.0, p_min: float = 0.0,
) -> Summary:  # fmt: skip
    """What a whole batch tells, over the last dimension: ``means`` of its ``sums``.

    Args:
        significance: floating [..., rows]; NaN rows do not count.
        valid: optional bool [..., rows]; False rows do not count.
        mass: optional floating [..., rows], what a row counts for; NaN, infinite, 0 or less for nothing.
        threshold: float32 [...].
        gate_temperature: 0 for a threshold; above 0 the rows count by their probability
            sigmoid((significance - threshold) / gate_temperature): the gate's expected rate, free of the
            noise of its draws. Excess and deficit are softened alike.
        p_min: least probability that a soft gate gives a row.
    """
    batch = means(sums(significance, valid, mass, threshold, gate_temperature, p_min))
    return batch if significance.dtype == torch.float64 else single(batch)


def single(batch: Summary) -> Summary:
    """In float32, as the state is."""
    *floats, invalid = tuple(batch)  # PyTorch 2.6 compiles neither a NamedTuple's slice nor its _make
    return Summary(*[*(x.float() for x in floats), invalid])


def sums(
    significance: Tensor, valid: Tensor | None, mass: Tensor | None, threshold: Tensor,
    gate_temperature: float = 0.0, p_min: float = 0.0,
) -> Sums:  # fmt: skip
    """Over the last dimension, in significance's dtype; the arguments are ``summarise``'s.

    Below float64 masses are in units of the greatest: of parts of a batch they do not add up.
    """
    nan = significance.isnan()
    counts = ~nan
    if valid is not None:
        counts, nan = counts & valid, nan & valid
    if mass is None:
        m = counts.to(significance.dtype)
    else:
        m = mass.to(significance.dtype)
        counts = counts & (m > 0) & (m < math.inf)
        m = torch.where(counts, m, 0)
        if m.dtype != torch.float64:
            m = m / m.amax(-1, keepdim=True).clamp(min=torch.finfo(m.dtype).tiny)  # or its square would underflow
    finite = counts & (significance.abs() < math.inf)
    # -inf is below even a threshold of -inf.
    above = torch.where(
        significance == -math.inf, -math.inf, significance - threshold.to(significance.dtype).unsqueeze(-1)
    )
    excess, deficit = above.relu(), (-above).relu()
    if gate_temperature > 0.0:
        scaled = above / gate_temperature
        p, rejected = scaled.sigmoid(), (-scaled).sigmoid()  # not 1 - p: that cancels
        kept = p.clamp(min=p_min)
        near = gate_temperature * torch.log1p(torch.exp(-scaled.abs()))
        excess, deficit = excess + near, deficit + near
    else:
        p = kept = (above > 0).to(m.dtype)
        rejected = 1 - p

    def total(x: Tensor, where: Tensor = counts) -> Tensor:
        return torch.where(where, m * x, 0).sum(-1)

    return Sums(
        m.sum(-1),
        m.square().sum(-1),
        total(kept),
        total(p),
        total(rejected),
        total(torch.ones_like(m), finite),
        total(significance, finite),
        total(excess, finite),
        total(deficit, finite),
        torch.where(finite, significance, math.inf).amin(-1),
        torch.where(finite, significance, -math.inf).amax(-1),
        nan.sum(-1),
    )


def means(found: Sums) -> Summary:
    """A batch's sums as the law wants them."""
    everything = found.mass
    tiny = torch.finfo(everything.dtype).tiny
    some = everything.clamp(min=tiny)
    selected, rejected = found.selected / some, found.rejected / some
    return Summary(
        everything * (everything / found.mass_sq.clamp(min=tiny)),
        found.kept / some,
        (everything - found.kept) / some,
        selected,
        rejected,
        found.low,
        found.high,
        found.total / found.finite.clamp(min=tiny),
        found.excess / some / selected.clamp(min=tiny),
        found.deficit / some / rejected.clamp(min=tiny),
        found.invalid,
    )


def advance(state: ControlState, batch: Summary, setpoint: Tensor, overflow: Tensor | None = None) -> ControlState:
    """One step of the law of this module's head; elementwise, so states of any shape advance side by side.

    Args:
        setpoint: float32 in (0, 1], of the state's shape; 1 keeps everything: the threshold is -inf.
        overflow: optional integers of that shape, rows selected beyond the gate's capacity.

    Returns:
        The next state. A batch without a valid row changes the counters ``steps`` and ``invalid`` alone.
    """
    before, drift, pp, pd, dd, unit, smooth, smooth_noise, surprise, misses, observed = state.values.unbind(-1)
    steps, saturated, invalid, overflown = state.counters.unbind(-1)
    p, rows = setpoint, batch.rows
    q = 1 - p
    told = rows * p * q
    w, blind = told / (told + 1), 1 / (told + 1)
    noise = w * blind
    odds = (w * batch.kept + blind * p) * q / ((w * batch.left_out + blind * q) * p)
    error = odds.log() + (0.5 - p) * noise

    # Is the feedback alive? Evidence adds up while nothing, or everything, is selected.
    none = batch.selected < EDGE * p
    edge = none | (batch.rejected < EDGE * q) | before.isneginf()
    against = -rows * torch.log(torch.where(none, q, p))
    surprise = torch.where(edge, surprise + against.clamp(max=SURPRISE_PER_BATCH), 0)
    first = unit == 0
    restart = (surprise > SURPRISE) | (edge & first)

    # Is the error beyond noise? Then the covariance grows until it explains it.
    smooth = smooth + SMOOTHING * (error - smooth)
    smooth_noise = (1 - SMOOTHING) ** 2 * smooth_noise + SMOOTHING**2 * noise
    unexplained = smooth.square() - JUMP**2 * smooth_noise
    growth = (unexplained / pp).clamp(min=1)
    pp, pd, dd = growth * pp, growth * pd, torch.maximum(growth * dd, JUMP_OF_DRIFT * unexplained)

    # Kalman update and prediction: e = w * position + noise of variance w(1-w).
    spread = w * pp + blind
    k_p, k_i = pp / spread, pd / spread
    left = blind / spread  # 1 - w k_p
    pp, pd, dd = pp * left, pd * left, dd - k_i * w * pd
    pp, pd, dd = pp + 2 * pd + dd + POSITION_NOISE, pd + dd, dd + DRIFT_NOISE

    # The local unit, and the move in it.
    measured = torch.minimum(batch.above, batch.below)
    followed = unit + k_p.clamp(UNIT_GAIN, 1) * (measured - unit)
    unit = torch.where(edge, unit, torch.where(first, measured, followed))
    drift = (drift + k_i * error).clamp(-DRIFT_LIMIT, DRIFT_LIMIT)
    move = (unit * (k_p * error + drift)).clamp(-REACH * batch.below, REACH * batch.above)
    from_low = batch.low - (batch.mean - batch.low) * torch.log(p)
    from_high = batch.high + (batch.high - batch.mean) * torch.log1p(-p)  # nothing is above the greatest row itself
    quantile = torch.where(from_low < batch.high, from_low, from_high)
    threshold = torch.where(restart, quantile, before + move)
    threshold = torch.where(threshold.isfinite(), threshold, before)

    missed = restart | (unexplained > 0)
    everything = ~(p < 1)  # and a fresh start once less is wanted
    threshold = torch.where(everything, -math.inf, threshold)
    misses = misses + MISS_SMOOTHING * ((missed & ~everything).to(misses.dtype) - misses)
    gain = (1 / (steps.to(misses.dtype) + 1)).clamp(min=RATE_SMOOTHING)  # a plain mean at first
    rate = torch.where(observed.isnan(), batch.kept, observed + gain * (batch.kept - observed))

    # A restart keeps threshold, misses and rate alone; no rows, no change. Stacked, for few operations.
    again = restart | everything
    forgotten = torch.stack((drift, pd, unit, smooth, smooth_noise, surprise), -1).masked_fill(again[..., None], 0)
    drift, pd, unit, smooth, smooth_noise, surprise = forgotten.unbind(-1)
    pp = torch.where(again, POSITION_VARIANCE, pp)
    dd = torch.where(again, DRIFT_VARIANCE, dd)
    new = (threshold, drift, pp, pd, dd, unit, smooth, smooth_noise, surprise, misses, rate)
    some = rows > 0
    values = torch.where(some[..., None], torch.stack(new, -1), state.values)
    if overflow is not None:
        # The batch that an automatic start keeps whole says nothing about the capacity.
        starting = observed.isnan() & before.isneginf()
        overflown = overflown + torch.where(starting, 0, overflow.reshape(overflown.shape))
    late = some & ~everything & (misses > MISS_LIMIT)
    counters = torch.stack((steps + 1, saturated + late, invalid + batch.invalid, overflown), -1)
    return ControlState(values, counters)
