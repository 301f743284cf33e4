# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (Triton has no types, and its compiler reads annotations as its own.)
"""Row statistics, the gate's decision, and the gradient, each in one pass over the logits.

A program takes BLOCK_ROWS rows and goes through their classes in blocks of BLOCK_COLUMNS. With x the
logits after softcap, m the row's largest x so far, c = log2(e) / temperature, t_j = (x_j - m) c
(base 2, never above 0), e_j = 2^t_j and y the target, it keeps

    rest = sum_{j != y} e_j    rest_t = sum_{j != y} e_j t_j    rest_sq = sum_{j != y} e_j^2    sum_t = sum_j t_j

When a block raises m by delta / c, what the earlier n columns left becomes, with f = 2^-delta,

    rest_t' = f (rest_t - delta rest)    rest' = f rest    rest_sq' = f^2 rest_sq    sum_t' = sum_t - n delta

The target's logit is read by itself, and with e_y = 2^t_y, S = rest + e_y, ln S = log1p(rest) where e_y = 1:

    loss      = log1p(rest / e_y) where e_y >= rest, else ln S - ln2 t_y
                (smoothed by a: (1 - a) loss + a (ln S - ln2 sum_t / classes))
    entropy   = ln S - ln2 (rest_t + e_y t_y) / S
    grad_norm = sqrt(rest^2 + rest_sq) / S     sum_squares = (rest_sq + e_y^2) / S^2
    max_prob  = 1 / S                          margin      = (1 - 2^(c (second - m))) / S
    logsumexp = m / temperature + ln S

The target stays out of the sums because 1 - p_y and 1 - 2 p_y + sum p^2 cancel on a confident row.
The second largest of two blocks is max(min(m1, m2), second1, second2).

Backward, from m, ln S and the entropy H that the forward saved (a logsumexp, rounded at 1e4 to 1e-3,
would not do), with ln p_j = ln2 t_j - ln S:

    dx_j = (g_loss (p_j - (1 - a) [j = y] - a / classes) - g_entropy p_j (ln p_j + H)) / temperature * (1 - tanh^2)

Bytes: forward, the logits once, a sector a row for the target's logit, 4 or 8 bytes a row for the target
and for each output. Backward, the logits once, the gradient once, a few numbers a row. The rows that
are ignored are not read.

Hazards, each said where it is handled: a maximum here drops NaN, so NaN must come through a sum; -inf
must add 0 and never 0 * -inf; offsets pass 2^31, so they are 64-bit.
"""

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from triton.runtime.interpreter import InterpretedFunction  # type: ignore[import-untyped, import-not-found, unused-ignore]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def log1p(x, DOUBLE: tl.constexpr):
    """log(1 + x) for x >= 0, to rounding however coarse the device's log is near 1."""
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
    """tanh, NaN and both infinities included."""
    # Lambert's continued fraction near 0, where 1 - exp cancels.
    LEVELS: tl.constexpr = 11 if DOUBLE else 5
    square = a * a
    fraction = square * 0.0 + (2 * LEVELS + 1)
    for i in tl.static_range(LEVELS):
        fraction = (2 * (LEVELS - i) - 1) + square / fraction
    t = tl.exp2(tl.abs(a) * (-2.0 * LOG2E))
    far = (1.0 - t) / (1.0 + t)
    return tl.where(tl.abs(a) < 0.6, a / fraction, tl.where(a < 0.0, -far, far))


@triton.jit
def philox_uniform(row, step, seed):
    """float32 in [0, 1), as sparse_kernels/philox.py: counter (row, step), key seed, word 0."""
    zero = row * 0
    c0 = (row & 0xFFFFFFFF).to(tl.uint32)
    c1 = (row >> 32).to(tl.uint32)
    c2 = ((zero + step) & 0xFFFFFFFF).to(tl.uint32)
    c3 = (((zero + step) >> 32) & 0xFFFFFFFF).to(tl.uint32)
    k0 = ((zero + seed) & 0xFFFFFFFF).to(tl.uint32)
    k1 = (((zero + seed) >> 32) & 0xFFFFFFFF).to(tl.uint32)
    word, _, _, _ = tl.philox_impl(c0, c1, c2, c3, k0, k1)
    return (word >> 8).to(tl.float32) * (1.0 / 16777216.0)


# Values that change from call to call must not compile anew when they are 1, divisible by 16 or above 2^31.
RUN_TIME = ("inner_rows", "ignore_index", "seed", "step")


@triton.jit(do_not_specialize=RUN_TIME)
def row_stats_kernel(
    logits_ptr,
    targets_ptr,  # [rows]
    outer_stride,
    inner_stride,
    class_stride,
    inner_rows,  # row = outer * inner_rows + inner
    classes,
    ignore_index: tl.int64,
    inverse_temperature: tl.float64,
    softcap: tl.float64,
    label_smoothing: tl.float64,
    # Outputs, [rows] each, or None.
    loss_ptr,
    entropy_ptr,
    grad_norm_ptr,
    sum_squares_ptr,
    max_prob_ptr,
    margin_ptr,
    argmax_ptr,
    logsumexp_ptr,
    maximum_ptr,  # for the backward: m, before the temperature
    log_sum_ptr,  # for the backward: ln S
    # The gate; mask_ptr is None without one.
    mask_ptr,
    significance_ptr,
    weight_ptr,  # None: a plain threshold
    offset_ptr,  # or None
    threshold_ptr,
    invalid_ptr,
    w_loss: tl.float64,
    w_entropy: tl.float64,
    w_grad_norm: tl.float64,
    w_sum_squares: tl.float64,
    w_max_prob: tl.float64,
    w_margin: tl.float64,
    w_logsumexp: tl.float64,
    gate_temperature: tl.float64,
    p_min: tl.float64,
    seed: tl.int64,
    step: tl.int64,
    step_ptr,  # or None: step
    # What to compute: what is stored or weighed.
    LOSS: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    MARGIN: tl.constexpr,
    ARGMAX: tl.constexpr,
    # Which statistics are weighed.
    W_LOSS: tl.constexpr,
    W_ENTROPY: tl.constexpr,
    W_GRAD_NORM: tl.constexpr,
    W_SUM_SQUARES: tl.constexpr,
    W_MAX_PROB: tl.constexpr,
    W_MARGIN: tl.constexpr,
    W_LOGSUMEXP: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    programs = tl.cdiv(inner_rows, BLOCK_ROWS)
    program = tl.program_id(0)
    outer = (program // programs).to(tl.int64)
    inner = (program % programs).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = inner < inner_rows
    row = outer * inner_rows + inner

    target = tl.load(targets_ptr + row, mask=inside, other=0).to(tl.int64)
    ignored = target == ignore_index
    bad = ((target < 0) | (target >= classes)) & (ignored == 0)
    y = tl.where(ignored | bad, 0, target)
    live = inside & (ignored == 0)

    scale = tl.full((), inverse_temperature, ACC) * LOG2E
    cap = tl.full((), softcap, ACC)
    base = logits_ptr + outer * outer_stride + inner * inner_stride
    x_y = tl.load(base + y * class_stride, mask=live, other=0.0).to(ACC)
    if softcap > 0.0:
        x_y = cap * tanh(x_y / cap, DOUBLE)

    m = tl.full((BLOCK_ROWS,), float("-inf"), ACC)
    second = m
    lowest = tl.zeros((BLOCK_ROWS,), tl.int64)
    rest = tl.zeros((BLOCK_ROWS,), ACC)
    rest_t = rest
    rest_sq = rest
    sum_t = rest
    for start in range(0, classes, BLOCK_COLUMNS):
        column = (start + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
        here = live[:, None] & (column < classes)[None, :]
        x = tl.load(base[:, None] + column[None, :] * class_stride, mask=here, other=0.0).to(ACC)
        if softcap > 0.0:
            x = cap * tanh(x / cap, DOUBLE)
        x = tl.where(here, x, float("-inf"))

        block_m = tl.max(x, 1)
        if MARGIN or ARGMAX:
            at = tl.min(tl.where(x == block_m[:, None], column[None, :], classes), 1)
        if MARGIN:
            block_second = tl.max(tl.where(column[None, :] == at[:, None], float("-inf"), x), 1)
            second = tl.maximum(tl.minimum(m, block_m), tl.maximum(second, block_second))
        if ARGMAX:
            lowest = tl.where(block_m > m, at, lowest)  # an equal one further on is not lower

        new_m = tl.maximum(m, block_m)
        # Nothing but -inf so far: t = -inf, not NaN; and nothing was kept that would want rescaling.
        reference = tl.where(new_m == float("-inf"), 0.0, new_m)
        delta = tl.where(m == float("-inf"), 0.0, (new_m - m) * scale)
        m = new_m
        t = (x - reference[:, None]) * scale
        e = tl.exp2(t)
        others = here & (column[None, :] != y[:, None])
        f = tl.exp2(-delta)
        if ENTROPY:
            # exp2(-inf) = 0 must add 0, not 0 * -inf; NaN stays NaN.
            product = tl.where(others & (t != float("-inf")), e * t, 0.0)
            rest_t = f * (rest_t - delta * rest) + tl.sum(product, 1)
        e = tl.where(others, e, 0.0)
        rest = f * rest + tl.sum(e, 1)
        if SQUARES:
            rest_sq = f * f * rest_sq + tl.sum(e * e, 1)
        if LOSS:
            sum_t = sum_t - delta * start + tl.sum(tl.where(here, t, 0.0), 1)

    # A maximum may have dropped NaN or met +inf: then rest or e_y is NaN, and with them total.
    t_y = (x_y - m) * scale
    e_y = tl.exp2(t_y)
    total = rest + e_y
    total = tl.where((m == float("-inf")) | bad, float("nan"), total)
    log_sum = tl.where(e_y == 1.0, log1p(rest, DOUBLE), tl.log(total))
    log_sum = tl.where(total == total, log_sum, float("nan"))
    significance = tl.zeros((BLOCK_ROWS,), ACC)

    if LOSS:
        confident = e_y >= rest
        loss = tl.where(confident, log1p(rest / tl.where(confident, e_y, 1.0), DOUBLE), log_sum - t_y * LN2)
        smoothing = tl.full((), label_smoothing, ACC)
        if label_smoothing > 0.0:  # else 0 * inf where a logit is -inf
            loss = (1.0 - smoothing) * loss + smoothing * (log_sum - LN2 * sum_t / classes)
        loss = tl.where(total == total, loss, float("nan"))
        loss = tl.where(ignored, 0.0, loss)
        if W_LOSS:
            significance += loss * tl.full((), w_loss, ACC)
        if loss_ptr is not None:
            tl.store(loss_ptr + row, loss, mask=inside)
    if ENTROPY:
        entropy = log_sum - LN2 * (rest_t + tl.where(t_y == float("-inf"), 0.0, e_y * t_y)) / total
        entropy = tl.where(ignored, 0.0, entropy)
        if W_ENTROPY:
            significance += entropy * tl.full((), w_entropy, ACC)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + row, entropy, mask=inside)
    if SQUARES:
        grad_norm = tl.where(ignored, 0.0, tl.sqrt(rest * rest + rest_sq) / total)
        if W_GRAD_NORM:
            significance += grad_norm * tl.full((), w_grad_norm, ACC)
        if grad_norm_ptr is not None:
            tl.store(grad_norm_ptr + row, grad_norm, mask=inside)
        sum_squares = tl.where(ignored, 0.0, (rest_sq + e_y * e_y) / (total * total))
        if W_SUM_SQUARES:
            significance += sum_squares * tl.full((), w_sum_squares, ACC)
        if sum_squares_ptr is not None:
            tl.store(sum_squares_ptr + row, sum_squares, mask=inside)
    max_prob = tl.where(ignored, 0.0, 1.0 / total)
    if W_MAX_PROB:
        significance += max_prob * tl.full((), w_max_prob, ACC)
    if max_prob_ptr is not None:
        tl.store(max_prob_ptr + row, max_prob, mask=inside)
    if MARGIN:
        margin = tl.where(ignored, 0.0, (1.0 - tl.exp2((second - m) * scale)) / total)
        if W_MARGIN:
            significance += margin * tl.full((), w_margin, ACC)
        if margin_ptr is not None:
            tl.store(margin_ptr + row, margin, mask=inside)
    if argmax_ptr is not None:
        found = tl.where(total == total, lowest, -1)
        tl.store(argmax_ptr + row, tl.where(ignored, 0, found), mask=inside)
    logsumexp = tl.where(ignored, 0.0, m * tl.full((), inverse_temperature, ACC) + log_sum)
    if W_LOGSUMEXP:
        significance += logsumexp * tl.full((), w_logsumexp, ACC)
    if logsumexp_ptr is not None:
        tl.store(logsumexp_ptr + row, logsumexp, mask=inside)
    if maximum_ptr is not None:
        tl.store(maximum_ptr + row, m, mask=inside)
        tl.store(log_sum_ptr + row, log_sum, mask=inside)

    if mask_ptr is not None:
        if offset_ptr is not None:
            significance += tl.load(offset_ptr + row, mask=inside, other=0.0).to(ACC)
            significance = tl.where(ignored, 0.0, significance)
        tl.store(significance_ptr + row, significance, mask=inside)
        threshold = tl.load(threshold_ptr).to(ACC)
        if weight_ptr is not None:
            p = 1.0 / (1.0 + tl.exp2((threshold - significance) * (LOG2E / tl.full((), gate_temperature, ACC))))
            low = tl.full((), p_min, ACC)
            p = tl.where(p < low, low, p)  # tl.maximum would turn NaN into p_min
            drawn_step = step
            if step_ptr is not None:
                drawn_step = tl.load(step_ptr).to(tl.int64)
            kept = (philox_uniform(row, drawn_step, seed) < p) & live
            tl.store(weight_ptr + row, tl.where(kept, 1.0 / p, 0.0).to(tl.float32), mask=inside)
        else:
            kept = (significance > threshold) & live
        tl.store(mask_ptr + row, kept.to(tl.int8), mask=inside)
        invalid = tl.sum(((significance != significance) & inside).to(tl.int32), 0)
        tl.atomic_add(invalid_ptr, invalid, mask=invalid > 0)


@triton.jit(do_not_specialize=("inner_rows", "ignore_index"))
def row_stats_backward_kernel(
    logits_ptr,
    gradient_ptr,
    targets_ptr,
    maximum_ptr,
    log_sum_ptr,
    entropy_ptr,
    loss_gradient_ptr,  # or None
    entropy_gradient_ptr,  # or None
    outer_stride,
    inner_stride,
    class_stride,
    gradient_outer_stride,
    gradient_inner_stride,
    gradient_class_stride,
    inner_rows,
    classes,
    ignore_index: tl.int64,
    inverse_temperature: tl.float64,
    softcap: tl.float64,
    label_smoothing: tl.float64,
    DOUBLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    programs = tl.cdiv(inner_rows, BLOCK_ROWS)
    program = tl.program_id(0)
    outer = (program // programs).to(tl.int64)
    inner = (program % programs).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = inner < inner_rows
    row = outer * inner_rows + inner

    target = tl.load(targets_ptr + row, mask=inside, other=0).to(tl.int64)
    live = inside & (target != ignore_index)
    m = tl.load(maximum_ptr + row, mask=live, other=0.0)
    log_sum = tl.load(log_sum_ptr + row, mask=live, other=0.0)
    inverse = tl.full((), inverse_temperature, ACC)
    cap = tl.full((), softcap, ACC)
    smoothing = tl.full((), label_smoothing, ACC)
    base = logits_ptr + outer * outer_stride + inner * inner_stride
    out = gradient_ptr + outer * gradient_outer_stride + inner * gradient_inner_stride
    if loss_gradient_ptr is not None:
        g_loss = tl.load(loss_gradient_ptr + row, mask=live, other=0.0)[:, None]
    if entropy_gradient_ptr is not None:
        g_entropy = tl.load(entropy_gradient_ptr + row, mask=live, other=0.0)[:, None]
        entropy = tl.load(entropy_ptr + row, mask=live, other=0.0)[:, None]

    for start in range(0, classes, BLOCK_COLUMNS):
        column = (start + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
        within = inside[:, None] & (column < classes)[None, :]
        x = tl.load(base[:, None] + column[None, :] * class_stride, mask=within & live[:, None], other=0.0).to(ACC)
        slope = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), ACC) + inverse
        if softcap > 0.0:
            bend = tanh(x / cap, DOUBLE)
            slope = (1.0 - bend * bend) * inverse
            x = cap * bend
        log_p = (x - m[:, None]) * inverse - log_sum[:, None]
        p = tl.exp2(log_p * LOG2E)
        g = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), ACC)
        if loss_gradient_ptr is not None:
            wanted = tl.where(column[None, :] == target[:, None], 1.0 - smoothing, 0.0) + smoothing / classes
            g += g_loss * (p - wanted)
        if entropy_gradient_ptr is not None:
            # p ln p -> 0 as p -> 0, where ln p is -inf.
            g -= g_entropy * p * (tl.where(log_p == float("-inf"), 0.0, log_p) + entropy)
        g = tl.where(live[:, None], g * slope, 0.0)
        tl.store(
            out[:, None] + column[None, :] * gradient_class_stride,
            g.to(gradient_ptr.dtype.element_ty),
            mask=within,
        )


INTERPRETED = isinstance(row_stats_kernel, InterpretedFunction)


def scalar(value):
    """A loop's bound as a kernel argument: under NumPy 2.4 the interpreter cannot make an index of its own scalars."""
    return tl.constexpr(value) if INTERPRETED else value
