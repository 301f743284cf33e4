"""A threshold that keeps a wanted fraction of rows above it, whatever the rows' scale.

A batch is seen through nine reductions (``summarise``), never sorted. With p the target, n of B rows kept:

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
inside the batch, at the p-quantile of an exponential law that begins at its smallest row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparse_training.errors import UserError

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


class Summary(NamedTuple):
    """The reductions of one batch that the law needs; tensors of the threshold's shape."""

    rows: Tensor  # valid rows
    kept: Tensor  # rows kept (a soft gate: their expected number)
    selected: Tensor  # rows above the threshold (a soft gate: sum of sigmoids)
    rejected: Tensor  # the other valid rows
    low: Tensor  # least finite significance
    high: Tensor  # greatest finite significance
    mean: Tensor  # of the finite significance
    excess: Tensor  # sum of (significance - threshold) above the threshold
    deficit: Tensor  # sum of (threshold - significance) below it


class State(NamedTuple):
    """The controller's memory: float32 and int64 tensors of one shape, ``[]`` in a module."""

    threshold: Tensor
    drift: Tensor  # the integral: units a batch
    position_variance: Tensor  # of the threshold, logits^2
    covariance: Tensor  # of position and drift
    drift_variance: Tensor
    unit: Tensor  # significance per logit of the rate; 0 before the first measurement
    error: Tensor  # smoothed e
    error_variance: Tensor  # what noise alone would give it
    surprise: Tensor  # nats of evidence that the feedback is dead
    misses: Tensor  # smoothed share of batches off target
    rate: Tensor  # smoothed rate observed; NaN before the first batch
    steps: Tensor  # int64, batches seen
    saturated: Tensor  # int64, batches in which the target was out of reach


def initial_state(threshold: Tensor) -> State:
    """The state before the first batch: ``threshold`` float32, of any shape; -inf starts by itself."""
    zero = torch.zeros_like(threshold)
    count = torch.zeros_like(threshold, dtype=torch.int64)
    return State(
        threshold, zero, zero + POSITION_VARIANCE, zero, zero + DRIFT_VARIANCE,
        zero, zero, zero, zero, zero, zero + math.nan, count, count,
    )  # fmt: skip


def summarise(
    significance: Tensor, valid: Tensor | None, threshold: Tensor, temperature: float = 0.0, p_min: float = 0.0
) -> Summary:
    """Nine reductions over the last dimension.

    Args:
        significance: floating [..., rows]; NaN rows do not count.
        valid: optional bool [..., rows]; False rows do not count.
        threshold: float32 [...].
        temperature: 0 for a threshold; above 0 the rows count by their probability
            sigmoid((significance - threshold) / temperature): the gate's expected rate, free of the
            noise of its draws. Excess and deficit are softened alike.
        p_min: least probability that a soft gate gives a row.
    """
    real = ~significance.isnan()
    valid = real if valid is None else valid & real
    finite = valid & (significance.abs() < math.inf)
    above = significance - threshold.to(significance.dtype).unsqueeze(-1)
    count = valid.sum(-1)
    if temperature > 0.0:
        scaled = above / temperature
        p = scaled.sigmoid()
        selected = _total(p, valid)
        kept = _total(p.clamp(min=p_min), valid) if p_min > 0.0 else selected
        rejected = _total((-scaled).sigmoid(), valid)  # not count - selected: that cancels
        excess = temperature * nn.functional.softplus(scaled)
        deficit = temperature * nn.functional.softplus(-scaled)
    else:
        selected = kept = (valid & (above > 0)).sum(-1).float()
        rejected = count - selected
        excess, deficit = above.relu(), (-above).relu()
    return Summary(
        rows=count.float(),
        kept=kept,
        selected=selected,
        rejected=rejected,
        low=torch.where(finite, significance, math.inf).amin(-1).float(),
        high=torch.where(finite, significance, -math.inf).amax(-1).float(),
        mean=_total(significance, finite) / finite.sum(-1).clamp(min=1),
        excess=_total(excess, finite),
        deficit=_total(deficit, finite),
    )


def _total(x: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, x, 0).sum(-1).float()


def advance(state: State, batch: Summary, target: Tensor) -> State:
    """One step of the law of this module's head; elementwise, so states of any shape advance side by side.

    Args:
        target: float32 in (0, 1), of the state's shape.

    Returns:
        The next state. A batch without a valid row changes ``steps`` alone.
    """
    p, s = target, state
    rows, q = batch.rows, 1 - p
    w = rows / (rows + 1 / (p * q))
    blind = 1 - w
    noise = w * blind
    rate = batch.kept / rows.clamp(min=1)
    error = torch.logit(p + w * (rate - p)) - torch.logit(p) + (0.5 - p) * noise

    # Is the feedback alive? Evidence adds up while nothing, or everything, is selected.
    none = batch.selected < EDGE * p * rows
    edge = none | (batch.rejected < EDGE * q * rows)
    odds = -rows * torch.log(torch.where(none, q, p))
    surprise = torch.where(edge, s.surprise + odds.clamp(max=SURPRISE_PER_BATCH), 0)
    first = s.unit == 0
    restart = (surprise > SURPRISE) | (edge & first)

    # Is the error beyond noise? Then the covariance grows until it explains it.
    smooth = s.error + SMOOTHING * (error - s.error)
    smooth_noise = (1 - SMOOTHING) ** 2 * s.error_variance + SMOOTHING**2 * noise
    unexplained = smooth.square() - JUMP**2 * smooth_noise
    growth = (unexplained / s.position_variance).clamp(min=1)
    pp, pd = growth * s.position_variance, growth * s.covariance
    dd = torch.maximum(growth * s.drift_variance, JUMP_OF_DRIFT * unexplained)

    # Kalman update and prediction: e = w * position + noise of variance w(1-w).
    spread = w * pp + blind
    k_p, k_i = pp / spread, pd / spread
    left = blind / spread  # 1 - w k_p
    pp, pd, dd = pp * left, pd * left, dd - k_i * w * pd
    pp, pd, dd = pp + 2 * pd + dd + POSITION_NOISE, pd + dd, dd + DRIFT_NOISE

    # The local unit, and the move in it.
    tiny = torch.finfo(torch.float32).tiny
    above = batch.excess / batch.selected.clamp(min=tiny)
    below = batch.deficit / batch.rejected.clamp(min=tiny)
    measured = torch.minimum(above, below)
    followed = s.unit + k_p.clamp(UNIT_GAIN, 1) * (measured - s.unit)
    unit = torch.where(edge, s.unit, torch.where(first, measured, followed))
    drift = (s.drift + k_i * error).clamp(-DRIFT_LIMIT, DRIFT_LIMIT)
    move = (unit * (k_p * error + drift)).clamp(-REACH * below, REACH * above)
    quantile = torch.minimum(batch.low - (batch.mean - batch.low) * torch.log(p), batch.high)
    threshold = torch.where(restart, quantile, s.threshold + move)
    threshold = torch.where(threshold.isfinite(), threshold, s.threshold)

    missed = (restart | (unexplained > 0)).float()
    misses = s.misses + MISS_SMOOTHING * (missed - s.misses)
    gain = (1 / (s.steps.float() + 1)).clamp(min=RATE_SMOOTHING)  # a plain mean at first
    observed = torch.where(s.rate.isnan(), rate, s.rate + gain * (rate - s.rate))

    # A restart keeps threshold, misses and rate alone; no rows, no change. Stacked, for few operations.
    forgotten = torch.stack((drift, pd, unit, smooth, smooth_noise, surprise), -1).masked_fill(restart[..., None], 0)
    drift, pd, unit, smooth, smooth_noise, surprise = forgotten.unbind(-1)
    pp = torch.where(restart, POSITION_VARIANCE, pp)
    dd = torch.where(restart, DRIFT_VARIANCE, dd)
    new = (threshold, drift, pp, pd, dd, unit, smooth, smooth_noise, surprise, misses, observed)
    some = rows > 0
    after = torch.where(some[..., None], torch.stack(new, -1), torch.stack(s[: len(new)], -1)).unbind(-1)
    return State._make((*after, s.steps + 1, s.saturated + (some & (misses > MISS_LIMIT))))


class PIController(nn.Module):
    """Moves a threshold so that the fraction of rows above it meets a target rate.

    Every tensor of the state (``State``) is a buffer of shape ``[]``: it moves with the module, is
    saved with it, and nothing here waits for a device. Casting the module leaves the buffers' dtypes.

    Args:
        target: the rate wanted, in (0, 1]; 1 fixes the threshold at -inf.
        threshold: where to start; None selects the whole first batch and starts from what it holds.
        temperature, p_min: of the gate that uses the threshold, see ``summarise``.

    Raises:
        UserError: a rate out of range, a threshold that is not a finite number.
    """

    threshold: Tensor
    rate: Tensor
    steps: Tensor
    saturated: Tensor
    target: Tensor

    def __init__(
        self, target: float, *, threshold: float | None = None, temperature: float = 0.0, p_min: float = 0.0
    ) -> None:
        super().__init__()
        if not _is_number(target) or not 0.0 < target <= 1.0:
            raise UserError(f"rate={target!r}; wanted a fraction above 0 and at most 1")
        if threshold is not None and not (_is_number(threshold) and math.isfinite(threshold)):
            raise UserError(f"threshold={threshold!r}; wanted None (automatic) or a finite number")
        self.temperature, self.p_min = temperature, p_min
        self.keeps_all = target == 1.0
        automatic = threshold is None or self.keeps_all
        start = torch.tensor(-math.inf if automatic else threshold, dtype=torch.float32)
        for name, value in initial_state(start)._asdict().items():
            self.register_buffer(name, value.clone())
        # Not in the checkpoint: what is wanted comes from who makes the controller.
        self.register_buffer("target", torch.tensor(target, dtype=torch.float32), persistent=False)

    def state(self) -> State:
        """The buffers themselves, not copies."""
        return State(*(getattr(self, name) for name in State._fields))

    @torch.no_grad()
    def update(self, significance: Tensor, valid: Tensor | None = None) -> None:
        """Moves the threshold by one batch: ``significance`` floating [rows], ``valid`` bool [rows] or None for all.

        A batch of no row, or of NaN alone, counts as a step and changes nothing else.
        """
        if self.keeps_all or significance.numel() == 0:  # known from a setting, or a shape
            self.steps.add_(1)
            if self.keeps_all:
                self.rate.fill_(1.0)
            return
        state = self.state()
        batch = summarise(significance, valid, state.threshold, self.temperature, self.p_min)
        for buffer, value in zip(state, advance(state, batch, self.target), strict=True):
            buffer.copy_(value)

    def starting(self) -> Tensor:
        """bool: no batch has been seen yet by a controller that starts from what its first batch holds."""
        return self.rate.isnan() & self.threshold.isneginf()

    def saturation(self) -> Tensor:
        """Share of the batches in which the target was out of reach: float32, 0 to 1, on the device.

        Far above 0, the rate is not the controller's but the significance's: most rows are equal, say.
        """
        return self.saturated / self.steps.clamp(min=1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PIController:
        # A threshold in half precision would select by its rounding: take fn's device, keep the dtype.
        def moved(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            return out if out.dtype == tensor.dtype else tensor.to(out.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
