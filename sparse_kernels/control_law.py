"""Control of a threshold so that a target fraction of rows lies above it, whatever the rows' scale: the specification.

A batch enters as sums over its rows (``summarise``); it is never sorted. With p the set-point and n of B rows kept::

    w = B / (B + 1/(p(1-p)))                                     weight of the evidence of one batch
    e = logit(p + w(n/B - p)) - logit(p) + (1/2 - p) w(1-w)       the error; noise variance w(1-w)
    u <- u + g (min(mean excess above, mean deficit below) - u)  the local unit of significance
    drift <- drift + K_I e;  threshold <- threshold + u (K_P e + drift)

This is PI control in velocity form. The drift, its integral, is the threshold's speed, so a ramp (shrinking losses) is
followed without lag. In logits of the rate and in u, every significance looks alike; for an exponential tail u is
exactly d threshold / d log(rate). So one law serves rates of 1% and 90%, losses of 10 and of 0.01. Shrinking n/B
towards p by the weight w keeps e finite and unbiased at n = 0, and hence serves small batches.

The gains are those of the two-state Kalman filter (position, speed) that observes e. While it locks on they fall like
the expanding-memory g-h filter's, 1/t; fixed gains miss 50 batches or, at 50%, jitter by more than a point. Then they
settle at the level that the process noise sets, which is lower for smaller batches.

Three guards, each with its test:

- Jump: if the smoothed error is beyond noise, the covariance grows until it explains it.
- Reach: a step goes at most 0.8 of the way to the mean row on that side, so it crosses a gap between two modes.
- Restart: if "none" or "all" selected runs on with odds below about e^-11, the feedback is dead. The drift is dropped
  (conditional integration, no windup) and the threshold starts again inside the batch. It starts at the p-quantile of
  an exponential law that begins at the smallest row; if that lies beyond the greatest row, of one that ends there.

A set-point may be a share of mass instead. Rows then count by their mass (the norm of their gradient, say) in every
sum, and n/B is the share of it above the threshold. B is (sum m)^2 / sum m^2, the number of equal rows whose share
would be as noisy. Nothing else changes: the threshold is the same quantile, of the distribution weighted by mass.

control_law.h in csrc is the same law for the compiled backends.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_kernels._arguments import ControlCall
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
LEAST_SETPOINT = 1e-12  # whose logit is finite; a lower set-point counts as this
RATE_SMOOTHING = 0.05
MISS_SMOOTHING, MISS_LIMIT = 1 / 32, 0.6  # off target this much of the time, or 29 batches on end: saturated


class Sums(NamedTuple):
    """Sums over a batch's rows: float tensors of the threshold's shape; ``invalid`` is int64.

    In float64 the sums of parts of a batch add up to the batch's, except that ``low`` takes the least and ``high`` the
    greatest. A row counts by its mass, which is 1 if the set-point is a rate.
    """

    mass: Tensor
    """Mass of the valid rows."""
    mass_sq: Tensor
    """Sum of the squared masses."""
    kept: Tensor
    """Mass of the rows kept; for a soft gate its expectation."""
    selected: Tensor
    """Mass above the threshold."""
    rejected: Tensor
    """Mass of the other valid rows."""
    finite: Tensor
    """Mass of the rows of finite significance; only these count in the fields below."""
    total: Tensor
    """Sum of mass times significance."""
    excess: Tensor
    """Sum of mass times distance above the threshold."""
    deficit: Tensor
    """Sum of mass times distance below the threshold."""
    low: Tensor
    """Least significance."""
    high: Tensor
    """Greatest significance."""
    invalid: Tensor
    """Number of rows of NaN."""


class Summary(NamedTuple):
    """Input of the law from one batch: float tensors of the threshold's shape; ``invalid`` is int64."""

    rows: Tensor
    """Number of valid rows; with masses, the number of equal rows that would be as noisy."""
    kept: Tensor
    """Share of the rows kept; for a soft gate its expectation."""
    left_out: Tensor
    """1 - kept."""
    selected: Tensor
    """Share above the threshold; for a soft gate, of sigmoids."""
    rejected: Tensor
    """The other share."""
    low: Tensor
    """Least finite significance."""
    high: Tensor
    """Greatest finite significance."""
    mean: Tensor
    """Mean of the finite significance."""
    above: Tensor
    """Mean of (significance - threshold) over the rows above it."""
    below: Tensor
    """Mean of (threshold - significance) over the others."""
    invalid: Tensor
    """Number of rows of NaN."""


def initial_state(threshold: Tensor) -> ControlState:
    """Return the state before the first batch.

    Args:
        threshold: float32 [...]; -inf starts automatically, inside the first batch.

    Example:
        >>> state = initial_state(torch.tensor(-math.inf))
    """
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
    """Serve ``sparse_kernels.control``."""
    with torch.no_grad():
        (values, counters), settings = call.state, call.settings
        if call.significance.shape[-1] == 0:  # known from a shape; the least of nothing is not
            counters[..., CONTROL_COUNTERS.index("steps")] += 1
            if call.overflow is not None:
                counters[..., CONTROL_COUNTERS.index("overflow")] += _counted_overflow(call.state, call.overflow)
            return
        valid = None if call.labels is None else call.labels != settings.ignore_index
        threshold = values[..., CONTROL_VALUES.index("threshold")]
        batch = summarise(call.significance, valid, call.mass, threshold, settings.gate_temperature, settings.p_min)
        after = advance(call.state, batch, call.setpoint.reshape(threshold.shape), call.overflow)
        values.copy_(after.values)
        counters.copy_(after.counters)


def summarise(
    significance: Tensor, valid: Tensor | None, mass: Tensor | None, threshold: Tensor,
    gate_temperature: float = 0.0, p_min: float = 0.0,
) -> Summary:  # fmt: skip
    """Summarise a whole batch over the last dimension: ``means`` of its ``sums``.

    Args:
        significance: floating [..., rows]; rows of NaN do not count.
        valid: bool [..., rows]; False rows do not count. None: all count.
        mass: floating [..., rows], by which a row counts; NaN, infinite, 0 or less counts nothing. None: 1 each.
        threshold: float32 [...].
        gate_temperature: 0 (the default) for a threshold. Above 0 rows count by their probability
            sigmoid((significance - threshold) / gate_temperature): the gate's expected rate, without the noise of its
            draws. Excess and deficit are softened alike.
        p_min: least probability that a soft gate gives a row. Default: 0.
    """
    batch = means(sums(significance, valid, mass, threshold, gate_temperature, p_min))
    return batch if significance.dtype == torch.float64 else single(batch)


def single(batch: Summary) -> Summary:
    """Return a summary in float32, as the state is.

    Args:
        batch: of any floating dtype.
    """
    *floats, invalid = tuple(batch)  # PyTorch 2.6 compiles neither a NamedTuple's slice nor its _make
    return Summary(*[*(x.float() for x in floats), invalid])


def sums(
    significance: Tensor, valid: Tensor | None, mass: Tensor | None, threshold: Tensor,
    gate_temperature: float = 0.0, p_min: float = 0.0,
) -> Sums:  # fmt: skip
    """Sum a batch, or a part of it, over the last dimension, in significance's dtype.

    Below float64 masses are in units of the greatest, so the sums of parts of a batch do not add up.

    Args:
        significance: as in :func:`summarise`.
        valid: as in :func:`summarise`.
        mass: as in :func:`summarise`.
        threshold: as in :func:`summarise`.
        gate_temperature: as in :func:`summarise`. Default: 0.
        p_min: as in :func:`summarise`. Default: 0.
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


def means(batch: Sums) -> Summary:
    """Return the summary of a batch's sums.

    Args:
        batch: of the whole batch.
    """
    everything = batch.mass
    tiny = torch.finfo(everything.dtype).tiny
    some = everything.clamp(min=tiny)
    selected, rejected = batch.selected / some, batch.rejected / some
    return Summary(
        everything * (everything / batch.mass_sq.clamp(min=tiny)),
        batch.kept / some,
        (everything - batch.kept) / some,
        selected,
        rejected,
        batch.low,
        batch.high,
        batch.total / batch.finite.clamp(min=tiny),
        batch.excess / some / selected.clamp(min=tiny),
        batch.deficit / some / rejected.clamp(min=tiny),
        batch.invalid,
    )


def advance(state: ControlState, batch: Summary, setpoint: Tensor, overflow: Tensor | None = None) -> ControlState:
    """Take one step of the law; elementwise, so states of any shape advance side by side.

    Args:
        state: before the batch.
        batch: of the state's shape.
        setpoint: float32 in (0, 1], of the state's shape; 1 keeps everything: the threshold is -inf. 0 or less
            counts as ``LEAST_SETPOINT``; NaN as no measurement.
        overflow: integers of that shape, rows selected beyond the gate's capacity. Default: none.

    Returns:
        The next state. A batch without a valid row, or with a set-point of NaN, changes nothing but counters.
    """
    before, drift, pp, pd, dd, unit, smooth, smooth_noise, surprise, misses, observed = state.values.unbind(-1)
    steps, saturated, invalid, overflown = state.counters.unbind(-1)
    p, rows = setpoint.clamp(min=LEAST_SETPOINT), batch.rows
    q = 1 - p
    evidence = rows * p * q
    w, blind = evidence / (evidence + 1), 1 / (evidence + 1)
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
    everything = ~(p < 1)  # and a fresh start once the set-point is lower
    threshold = torch.where(everything, -math.inf, threshold)
    misses = misses + MISS_SMOOTHING * ((missed & ~everything).to(misses.dtype) - misses)
    gain = (1 / (steps.to(misses.dtype) + 1)).clamp(min=RATE_SMOOTHING)  # a plain mean at first
    rate = torch.where(observed.isnan(), batch.kept, observed + gain * (batch.kept - observed))

    # A restart keeps threshold, misses and rate alone; no rows, no change. Stacked, for few operations.
    again = restart | everything
    reset = torch.stack((drift, pd, unit, smooth, smooth_noise, surprise), -1).masked_fill(again[..., None], 0)
    drift, pd, unit, smooth, smooth_noise, surprise = reset.unbind(-1)
    pp = torch.where(again, POSITION_VARIANCE, pp)
    dd = torch.where(again, DRIFT_VARIANCE, dd)
    new = (threshold, drift, pp, pd, dd, unit, smooth, smooth_noise, surprise, misses, rate)
    some = (rows > 0) & ~setpoint.isnan()
    values = torch.where(some[..., None], torch.stack(new, -1), state.values)
    if overflow is not None:
        overflown = overflown + _counted_overflow(state, overflow)
    late = some & ~everything & (misses > MISS_LIMIT)
    counters = torch.stack((steps + 1, saturated + late, invalid + batch.invalid, overflown), -1)
    return ControlState(values, counters)


def _counted_overflow(state: ControlState, overflow: Tensor) -> Tensor:
    """Return the overflow, 0 for the batch that an automatic start keeps whole: it says nothing about the capacity."""
    starting = state.value("rate").isnan() & state.value("threshold").isneginf()
    return torch.where(starting, 0, overflow.reshape(starting.shape))
