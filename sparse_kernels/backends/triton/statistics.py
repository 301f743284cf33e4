# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (Triton has no types, and its compiler reads annotations as its own.)

"""Statistics of a row from its joined peaks and sums, and the gate's decision; see row_stats.py's header."""

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from sparse_kernels.backends.triton.math import FAR, LN2, LOG2E, divide, draw_limit, log1p, philox_word, root
from sparse_kernels.backends.triton.scan import origin_of, rescale


@triton.jit
def emit(significance, value, weight, pointer, row, inside, WEIGHED: tl.constexpr):
    """Store a statistic unless its pointer is None; return the significance, with the statistic added if weighed."""
    if WEIGHED:
        significance += tl.where(weight == 0.0, 0.0, value * tl.full((), weight, value.dtype))  # never 0 * inf
    if pointer is not None:
        tl.store(pointer + row, value, mask=inside)
    return significance


@triton.jit
def smoothed_loss(
    S, rest, e_y, x_y, log_sum, reference, sum_d, classes, inverse_temperature, label_smoothing,
    SMOOTHING: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Return the loss, right for all rows but the ignored ones."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    confident = e_y >= rest
    # Not from t_y: the difference to the type's lowest number is finite, and its logarithm to base 2 is not.
    away = (reference - x_y) * tl.full((), inverse_temperature, ACC)
    ratio = divide(rest, tl.where(confident, e_y, 1.0), DOUBLE)
    loss = tl.where(confident, log1p(tl.where(confident, ratio, 0.0), DOUBLE), log_sum + away)
    if SMOOTHING:  # else 0 * inf where a logit is -inf
        smoothing = tl.full((), label_smoothing, ACC)
        mean = (sum_d / classes + (origin_of(x_y) - reference)) * tl.full((), inverse_temperature, ACC)
        mean = tl.where(classes <= S, 0.0, mean)  # all logits are equal, and their sum may have overflowed
        loss = (1.0 - smoothing) * loss + smoothing * (log_sum - mean)
    return loss


@triton.jit
def write_statistics(
    m, second, lowest, rest, rest_t, rest_sq, sum_d, row, inside, ignored, bad, y, x_y, classes, scale,
    inverse_temperature, label_smoothing, loss_ptr, entropy_ptr, grad_norm_ptr, sum_squares_ptr, max_prob_ptr,
    margin_ptr, argmax_ptr, logsumexp_ptr, maximum_ptr, total_ptr, w_loss, w_entropy, w_grad_norm, w_sum_squares,
    w_max_prob, w_margin, w_logsumexp, LOSS: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr,
    MARGIN: tl.constexpr, SMOOTHING: tl.constexpr, W_LOSS: tl.constexpr, W_ENTROPY: tl.constexpr,
    W_GRAD_NORM: tl.constexpr, W_SUM_SQUARES: tl.constexpr, W_MAX_PROB: tl.constexpr, W_MARGIN: tl.constexpr,
    W_LOGSUMEXP: tl.constexpr, DOUBLE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Store the statistics, and return their weighted sum."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    # The target, which the peaks and sums left out.
    top = m
    m = tl.maximum(top, x_y)
    reference = tl.where(m == float("-inf"), 0.0, m)
    rest, rest_t, rest_sq = rescale(rest, rest_t, rest_sq, (reference - top) * scale, ENTROPY, SQUARES)
    t_y = (x_y - reference) * scale
    e_y = tl.exp2(t_y)
    # A maximum may have dropped NaN or met +inf: then rest or e_y is NaN. From here NaN goes everywhere.
    rest = tl.where((m == float("-inf")) | bad, float("nan"), rest)
    S = rest + e_y
    # S - 1 without the rounding of S: the 1 of the largest logit is taken from where it is, which is exact.
    log_sum = log1p(tl.where(e_y == 1.0, rest, (rest - 1.0) + e_y), DOUBLE)
    significance = tl.where((S == S) | ignored, tl.zeros((ROWS,), ACC), float("nan"))  # though all weights be 0

    if LOSS:
        loss = smoothed_loss(
            S,
            rest,
            e_y,
            x_y,
            log_sum,
            reference,
            sum_d,
            classes,
            inverse_temperature,
            label_smoothing,
            SMOOTHING,
            DOUBLE,
        )
        loss = tl.where(ignored, 0.0, loss)
        significance = emit(significance, loss, w_loss, loss_ptr, row, inside, W_LOSS)
    if ENTROPY:
        entropy = log_sum - divide((rest_t + e_y * tl.maximum(t_y, -FAR)) * LN2, S, DOUBLE)
        entropy = tl.where(ignored, 0.0, entropy)
        significance = emit(significance, entropy, w_entropy, entropy_ptr, row, inside, W_ENTROPY)
    if SQUARES:
        grad_norm = tl.where(ignored, 0.0, divide(root(rest * rest + rest_sq, DOUBLE), S, DOUBLE))
        significance = emit(significance, grad_norm, w_grad_norm, grad_norm_ptr, row, inside, W_GRAD_NORM)
        sum_squares = tl.where(ignored, 0.0, divide(rest_sq + e_y * e_y, S * S, DOUBLE))
        significance = emit(significance, sum_squares, w_sum_squares, sum_squares_ptr, row, inside, W_SUM_SQUARES)
    max_prob = tl.where(ignored, 0.0, divide(tl.full(S.shape, 1.0, ACC), S, DOUBLE))
    significance = emit(significance, max_prob, w_max_prob, max_prob_ptr, row, inside, W_MAX_PROB)
    if MARGIN:
        second = tl.maximum(tl.minimum(top, x_y), second)
        margin = tl.where(ignored, 0.0, divide(1.0 - tl.exp2((second - reference) * scale), S, DOUBLE))
        significance = emit(significance, margin, w_margin, margin_ptr, row, inside, W_MARGIN)
    if argmax_ptr is not None:
        lowest = tl.where(x_y >= top, tl.where(x_y == top, tl.minimum(y, lowest), y), lowest)
        argmax = tl.where(S == S, lowest, -1)
        tl.store(argmax_ptr + row, tl.where(ignored, 0, argmax).to(tl.int64), mask=inside)
    logsumexp = tl.where(ignored, 0.0, m * tl.full((), inverse_temperature, ACC) + log_sum)
    significance = emit(significance, logsumexp, w_logsumexp, logsumexp_ptr, row, inside, W_LOGSUMEXP)
    if maximum_ptr is not None:
        tl.store(maximum_ptr + row, m, mask=inside)
        tl.store(total_ptr + row, S, mask=inside)
    return significance


@triton.jit
def decide(
    significance, row, inside, live, ignored, mask_ptr, significance_ptr, weight_ptr, offset_ptr, threshold_ptr,
    invalid_ptr, finished_ptr, gate_temperature, p_min, seed, step, step_ptr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Store the gate's decision on each row, and count the rows of NaN."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    if offset_ptr is not None:
        significance += tl.load(offset_ptr + row, mask=inside, other=0.0).to(ACC)
        significance = tl.where(ignored, 0.0, significance)
    tl.store(significance_ptr + row, significance, mask=inside)
    threshold = tl.load(threshold_ptr).to(ACC)
    if weight_ptr is not None:
        scale = tl.full((), LOG2E, ACC) / tl.full((), gate_temperature, ACC)
        p = 1.0 / (1.0 + tl.exp2((threshold - significance) * scale))
        low = tl.full((), p_min, ACC)
        p = tl.where(p < low, low, p)  # tl.maximum would turn NaN into p_min
        drawn_step = step
        if step_ptr is not None:
            drawn_step = tl.load(step_ptr).to(tl.int64)
        limit = draw_limit(p)
        kept = (philox_word(row, drawn_step, seed) < limit.to(tl.int64)) & live
        weight = divide(tl.full(limit.shape, 4294967296.0, tl.float32), tl.where(kept, limit, 1.0), False)
        tl.store(weight_ptr + row, tl.where(kept, weight, 0.0), mask=inside)
    else:
        kept = (significance > threshold) & live
    tl.store(mask_ptr + row, kept.to(tl.int8), mask=inside)
    if invalid_ptr is not None:
        invalid = tl.sum(((significance != significance) & inside).to(tl.int32), 0)
        tl.atomic_add(invalid_ptr, invalid, mask=invalid > 0, sem="relaxed")
    if finished_ptr is not None:
        tl.store(finished_ptr, 0, mask=tl.program_id(0) == 0)
