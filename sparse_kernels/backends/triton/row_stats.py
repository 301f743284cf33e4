# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (Triton has no types, and its compiler reads annotations as its own.)
# ruff: noqa: SIM102 (what is known at compile time decides by itself whether the rest is compiled)
"""Row statistics and the gate's decision in one pass over the logits.

A program takes the rows and columns of tiles.py, block after block. With x the logits after softcap,
c = log2(e) / temperature, y the target and m the largest x so far, t_j = (x_j - m) c (base 2, never above 0)
and e_j = 2^t_j, each lane keeps for its own columns, the target left out,

    m    second (largest x)    lowest (column of m)    rest = sum e_j    rest_t = sum e_j t_j    rest_sq = sum e_j^2

When a block raises m by delta / c, what was kept becomes, with f = 2^-delta,

    rest_t' = f (rest_t - delta rest)    rest' = f rest    rest_sq' = f^2 rest_sq

which also joins lanes, slices of a row (below) and, last of all, the target, read by itself. A lane is a thread
where rows are long, so that nothing is exchanged between threads, and no barrier met, before a row's end.
With S = rest + e_y:

    ln S      = log1p(S - 1), where S - 1 is rest if the target is largest, else (rest - 1) + e_y
    loss      = log1p(rest / e_y) where e_y >= rest, else ln S + (m - x_y) / temperature
                (smoothed by a: (1 - a) loss + a (ln S - mean_j(x_j - m) / temperature), x_j summed less x_y)
    entropy   = ln S - ln2 (rest_t + e_y t_y) / S
    grad_norm = sqrt(rest^2 + rest_sq) / S     sum_squares = (rest_sq + e_y^2) / S^2
    max_prob  = 1 / S                          margin      = (1 - 2^(c (second - m))) / S
    logsumexp = m / temperature + ln S

The target stays out of the sums because 1 - p_y and 1 - 2 p_y + sum p^2 cancel on a confident row.

Few long rows would leave most of a GPU idle. Then a row's columns are dealt out in slices (phase SLICE), each
kept as above in scratch memory, and joined in their order by a second launch (phase MERGE): one way to add, so
the result is the same run after run.

Rounding: x_j - m is exact or one rounding, t_j one more, so e_j carries |t_j| 2^-24 and the device's own
2 ulp of exp2; |t| e^t is at most 0.54, so no statistic gains more than a rounding of itself from it.

Bytes: the logits once, a sector a row for the target's logit, 4 or 8 bytes a row for the target and for each
output. The rows that are ignored are not read where rows are long. A GPU with 128
lanes on a processor must spend less than 14 instructions on a bfloat16 logit to read 4.3 TB/s (H200); the loop over
whole blocks has 9.5 with loss and entropy, of which one is of the 16 lanes of exp2, 58% busy then.

Hazards, each said where it is handled: a maximum here drops NaN, so NaN must come through a sum; -inf
must add 0 and never 0 * -inf; offsets pass 2^31, so they are 64-bit.
"""

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from triton.runtime.interpreter import InterpretedFunction  # type: ignore[import-untyped, import-not-found, unused-ignore]

from sparse_kernels.backends.triton.math import LN2, LOG2E, divide, log1p, philox_uniform, root
from sparse_kernels.backends.triton.tiles import (
    columns_of_tile,
    load_logits,
    rows_of_program,
    slice_of_program,
    unaligned_columns,
)

WHOLE, SLICE, MERGE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # phases
# Exponents are cut off here, where 2^-x is 0 in float32 and float64 alike and 0 * x is still 0: the difference
# of a masked logit (-inf, or the type's lowest) and another is -inf.
FAR = tl.constexpr(2000.0)
NO_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def across(x):
    """A tile's maximum over the columns of each lane and row."""
    return tl.max(tl.max(x, 3), 2)


@triton.jit
def total(x):
    """A tile's sum over the columns of each lane and row."""
    return tl.sum(tl.sum(x, 3), 2)


@triton.jit
def rescale(state, delta, ENTROPY: tl.constexpr, SQUARES: tl.constexpr):
    """(rest, rest_t, rest_sq) in units of a maximum that is delta above theirs, in base 2."""
    rest, rest_t, rest_sq = state
    delta = tl.minimum(delta, FAR)
    f = tl.exp2(-delta)
    if ENTROPY:
        rest_t = f * (rest_t - delta * rest)
    if SQUARES:
        rest_sq = f * f * rest_sq
    return f * rest, rest_t, rest_sq


@triton.jit
def absorb(
    peaks,  # (m, second, lowest), [ROWS, LANES] each
    sums,  # (rest, rest_t, rest_sq), the same
    x,  # a tile; -inf for the target and for what is no column
    column,  # int32
    scale,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    MARGIN: tl.constexpr,
    ARGMAX: tl.constexpr,
):
    """What a lane keeps, with a tile's columns added."""
    m, second, lowest = peaks
    block_m = across(x)
    if MARGIN or ARGMAX:
        at = tl.min(tl.min(tl.where(x == block_m[:, :, None, None], column, NO_COLUMN), 3), 2)
    if MARGIN:
        block_second = across(tl.where(column == at[:, :, None, None], float("-inf"), x))
        second = tl.maximum(tl.minimum(m, block_m), tl.maximum(second, block_second))
    if ARGMAX:
        at = tl.where(block_m == m, tl.minimum(at, lowest), at)
        lowest = tl.where(block_m >= m, at, lowest)
    new_m = tl.maximum(m, block_m)
    reference = tl.where(new_m == float("-inf"), 0.0, new_m)  # else t = NaN where all is -inf so far
    rest, rest_t, rest_sq = rescale(sums, (reference - m) * scale, ENTROPY, SQUARES)
    t = (x - reference[:, :, None, None]) * scale
    e = tl.exp2(t)
    rest += total(e)
    if ENTROPY:
        rest_t += total(e * tl.maximum(t, -FAR))  # 2^-inf = 0 must add 0; NaN comes through e
    if SQUARES:
        rest_sq += total(e * e)
    return (new_m, second, lowest), (rest, rest_t, rest_sq)


@triton.jit
def join(peaks, sums, scale, ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MARGIN: tl.constexpr, ARGMAX: tl.constexpr):
    """What the lanes (or slices), axis 1, keep together: [ROWS] each."""
    m, second, lowest = peaks
    top = tl.max(m, 1)
    reference = tl.where(top == float("-inf"), 0.0, top)
    rest, rest_t, rest_sq = rescale(sums, (reference[:, None] - m) * scale, ENTROPY, SQUARES)
    if MARGIN:
        lane = tl.arange(0, m.shape[1])[None, :]
        first = tl.min(tl.where(m == top[:, None], lane, NO_COLUMN), 1)
        second = tl.maximum(tl.max(second, 1), tl.max(tl.where(lane == first[:, None], float("-inf"), m), 1))
    else:
        second = tl.max(second, 1)
    lowest = tl.min(tl.where(m == top[:, None], lowest, NO_COLUMN), 1)
    return (top, second, lowest), (tl.sum(rest, 1), tl.sum(rest_t, 1), tl.sum(rest_sq, 1))


# Values that change from call to call must not compile anew when they are 1, divisible by 16 or above 2^31.
RUN_TIME = (
    "outer_stride",
    "inner_stride",
    "class_stride",
    "misaligned",
    "inner_rows",
    "classes",
    "slice_columns",
    "slices",
    "rows",
    "ignore_index",
    "seed",
    "step",
)


@triton.jit(do_not_specialize=RUN_TIME)
def row_stats_kernel(
    logits_ptr,
    targets_ptr,  # [rows]
    outer_stride,
    inner_stride,
    class_stride,
    misaligned,  # logits that logits_ptr is past a multiple of 16 bytes
    inner_rows,  # row = outer * inner_rows + inner
    classes,
    ignore_index: tl.int64,
    inverse_temperature: tl.float64,
    softcap: tl.float64,
    label_smoothing: tl.float64,
    # Slices of rows: without them one slice, of all classes.
    slice_columns,
    slices,
    rows,
    sums_ptr,  # [7, slices, rows]: m, second, rest, rest_t, rest_sq, sum_d, x_y
    lowest_ptr,  # int32 [slices, rows]
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
    total_ptr,  # for the backward: S
    # The gate; mask_ptr is None without one.
    mask_ptr,
    significance_ptr,
    weight_ptr,  # None: a plain threshold
    offset_ptr,  # or None
    threshold_ptr,
    invalid_ptr,  # int32, 0 before; or None, and a kernel after this one counts
    finished_ptr,  # int32, for such a kernel to find 0 in; or None
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
    PHASE: tl.constexpr,
    DOUBLE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,  # class_stride is 1
    ALIGNED: tl.constexpr,  # and the classes, and where rows start, are multiples of 16 bytes
    LOOP: tl.constexpr,  # more columns than a tile's
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,  # in phase MERGE: of slices
    WIDTH: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    UNITS: tl.constexpr = 16 * 8 // logits_ptr.dtype.element_ty.primitive_bitwidth
    outer, first, inner, row, inside, target, live = rows_of_program(targets_ptr, inner_rows, ignore_index, ROWS)
    ignored = target == ignore_index
    bad = ((target < 0) | (target >= classes)) & (ignored == 0)
    y = tl.where(ignored | bad, 0, target).to(tl.int32)

    scale = tl.full((), inverse_temperature, ACC) * LOG2E
    cap = tl.full((), softcap, ACC)
    if ALIGNED and not LOOP:  # no change in value, but Triton sees it, and loads 16 bytes at a time
        outer_stride = outer_stride // UNITS * UNITS
        inner_stride = inner_stride // UNITS * UNITS
        classes = classes // UNITS * UNITS
    base = logits_ptr + outer * outer_stride + inner * inner_stride
    if PHASE == MERGE:
        x_y = tl.load(sums_ptr + 6 * rows.to(tl.int64) * slices + row, mask=inside, other=0.0)
    else:
        x_y = load_logits(base + y.to(tl.int64) * class_stride, live, softcap, cap, DOUBLE)
    # Of sum_d: not a masked target's, whose distance to all the others would overflow upwards.
    origin = tl.where(tl.abs(x_y) < 1e30, x_y, 0.0)

    low = tl.full((ROWS, LANES), float("-inf"), ACC)
    zero = tl.zeros((ROWS, LANES), ACC)
    peaks = (low, low, tl.zeros((ROWS, LANES), tl.int32))
    sums = (zero, zero, zero)
    sum_d = zero
    if PHASE == MERGE:
        piece = tl.arange(0, LANES)[None, :].to(tl.int64)
        at = piece * rows + row[:, None]
        part = rows.to(tl.int64) * slices
        here = (piece < slices) & inside[:, None]
        m = tl.load(sums_ptr + at, mask=here, other=float("-inf"))
        second = low
        lowest = peaks[2]
        rest = tl.load(sums_ptr + 2 * part + at, mask=here, other=0.0)
        rest_t = zero
        rest_sq = zero
        if MARGIN:
            second = tl.load(sums_ptr + part + at, mask=here, other=float("-inf"))
        if ARGMAX:
            lowest = tl.load(lowest_ptr + at, mask=here, other=0)
        if ENTROPY:
            rest_t = tl.load(sums_ptr + 3 * part + at, mask=here, other=0.0)
        if SQUARES:
            rest_sq = tl.load(sums_ptr + 4 * part + at, mask=here, other=0.0)
        if LOSS:
            sum_d = tl.load(sums_ptr + 5 * part + at, mask=here, other=0.0)
        peaks = (m, second, lowest)
        sums = (rest, rest_t, rest_sq)
    else:
        COLUMNS: tl.constexpr = CHUNKS * LANES * WIDTH
        ALONE: tl.constexpr = LANES > 1 and CONTIGUOUS
        if LOOP:
            begin, columns = slice_of_program(classes, slice_columns, live)
        else:
            columns = classes
        place = columns_of_tile(CHUNKS, LANES, WIDTH)
        y_tile = y[:, None, None, None]
        live_tile = live[:, None, None, None]
        origin_tile = origin[:, None, None, None]
        base_tile = base[:, None, None, None]
        if LOOP:
            # Whole blocks, from the next multiple of 16 bytes on where a row is a program's.
            head = columns * 0
            if ALONE:
                start_of_row = outer * outer_stride + first * inner_stride + begin
                head = unaligned_columns(start_of_row, misaligned, WIDTH)
                aligned = logits_ptr + start_of_row + head
            full = tl.maximum(columns - head, 0) // COLUMNS * COLUMNS
            stop = full
            if ROWS == 1:  # the block with the target is one of those that are looked at logit by logit
                y_at = tl.max(y, 0) - begin - head
                stop = tl.where((y_at >= 0) & (y_at < full), y_at // COLUMNS * COLUMNS, full)
            start = columns * 0
            left = columns * 0  # of the columns before the first whole block and after the last
            while (start < full) | (left < columns - full):
                while start < stop:
                    column = begin + head + start + place
                    if ALONE:
                        pointers = tl.multiple_of(aligned + start, 16) + place
                    else:
                        pointers = base_tile + column.to(tl.int64) * class_stride
                    x = load_logits(pointers, None if ROWS == 1 else live_tile, softcap, cap, DOUBLE)
                    if LOSS:
                        if label_smoothing > 0.0:
                            sum_d += total(x - origin_tile)
                    if ROWS > 1:
                        x = tl.where(column == y_tile, float("-inf"), x)
                    peaks, sums = absorb(peaks, sums, x, column, scale, ENTROPY, SQUARES, MARGIN, ARGMAX)
                    start += COLUMNS
                whole = start < full
                at = left + place
                column = begin + tl.where(whole, head + start + place, tl.where(at < head, at, at + full))
                here = (whole | (at < columns - full)) & live_tile
                offset = column if CONTIGUOUS else column.to(tl.int64) * class_stride
                x = load_logits(base_tile + offset, here, softcap, cap, DOUBLE)
                if LOSS:
                    if label_smoothing > 0.0:
                        sum_d += total(tl.where(here, x - origin_tile, 0.0))
                x = tl.where(here & (column != y_tile), x, float("-inf"))
                peaks, sums = absorb(peaks, sums, x, column, scale, ENTROPY, SQUARES, MARGIN, ARGMAX)
                left += tl.where(whole, 0, COLUMNS)
                start += tl.where(whole, COLUMNS, 0)
                stop = full
        else:
            here = (place < columns) & live_tile
            offset = place if CONTIGUOUS else place.to(tl.int64) * class_stride
            x = load_logits(base_tile + offset, here, softcap, cap, DOUBLE)
            if LOSS:
                if label_smoothing > 0.0:
                    sum_d += total(tl.where(here, x - origin_tile, 0.0))
            x = tl.where(here & (place != y_tile), x, float("-inf"))
            peaks, sums = absorb(peaks, sums, x, place, scale, ENTROPY, SQUARES, MARGIN, ARGMAX)
    peaks, sums = join(peaks, sums, scale, ENTROPY, SQUARES, MARGIN, ARGMAX)
    sum_d = tl.sum(sum_d, 1)
    top, second, lowest = peaks

    if PHASE == SLICE:
        at = tl.program_id(1).to(tl.int64) * rows + row
        part = rows.to(tl.int64) * slices
        tl.store(sums_ptr + at, top, mask=inside)
        tl.store(sums_ptr + 2 * part + at, sums[0], mask=inside)
        tl.store(sums_ptr + 6 * part + at, x_y, mask=inside)
        if MARGIN:
            tl.store(sums_ptr + part + at, second, mask=inside)
        if ARGMAX:
            tl.store(lowest_ptr + at, lowest, mask=inside)
        if ENTROPY:
            tl.store(sums_ptr + 3 * part + at, sums[1], mask=inside)
        if SQUARES:
            tl.store(sums_ptr + 4 * part + at, sums[2], mask=inside)
        if LOSS:
            tl.store(sums_ptr + 5 * part + at, sum_d, mask=inside)
        return

    # The target.
    m = tl.maximum(top, x_y)
    reference = tl.where(m == float("-inf"), 0.0, m)
    rest, rest_t, rest_sq = rescale(sums, (reference - top) * scale, ENTROPY, SQUARES)
    t_y = (x_y - reference) * scale
    e_y = tl.exp2(t_y)
    # A maximum may have dropped NaN or met +inf: then rest or e_y is NaN. From here NaN goes everywhere.
    rest = tl.where((m == float("-inf")) | bad, float("nan"), rest)
    S = rest + e_y
    confident = e_y >= rest
    # S - 1 without the rounding of S: the 1 of the largest logit is taken from where it is, which is exact.
    log_sum = log1p(tl.where(e_y == 1.0, rest, (rest - 1.0) + e_y), DOUBLE)
    significance = tl.zeros((ROWS,), ACC)

    if LOSS:
        # Not from t_y: the difference to the type's lowest number is finite, and its logarithm to base 2 is not.
        away = (reference - x_y) * tl.full((), inverse_temperature, ACC)
        ratio = divide(rest, tl.where(confident, e_y, 1.0), DOUBLE)
        loss = tl.where(confident, log1p(tl.where(confident, ratio, 0.0), DOUBLE), log_sum + away)
        smoothing = tl.full((), label_smoothing, ACC)
        if label_smoothing > 0.0:  # else 0 * inf where a logit is -inf
            mean = (sum_d / classes + (origin - reference)) * tl.full((), inverse_temperature, ACC)
            loss = (1.0 - smoothing) * loss + smoothing * (log_sum - mean)
        loss = tl.where(ignored, 0.0, loss)
        if W_LOSS:
            significance += loss * tl.full((), w_loss, ACC)
        if loss_ptr is not None:
            tl.store(loss_ptr + row, loss, mask=inside)
    if ENTROPY:
        entropy = log_sum - divide(LN2 * (rest_t + e_y * tl.maximum(t_y, -FAR)), S, DOUBLE)
        entropy = tl.where(ignored, 0.0, entropy)
        if W_ENTROPY:
            significance += entropy * tl.full((), w_entropy, ACC)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + row, entropy, mask=inside)
    if SQUARES:
        grad_norm = tl.where(ignored, 0.0, divide(root(rest * rest + rest_sq, DOUBLE), S, DOUBLE))
        if W_GRAD_NORM:
            significance += grad_norm * tl.full((), w_grad_norm, ACC)
        if grad_norm_ptr is not None:
            tl.store(grad_norm_ptr + row, grad_norm, mask=inside)
        sum_squares = tl.where(ignored, 0.0, divide(rest_sq + e_y * e_y, S * S, DOUBLE))
        if W_SUM_SQUARES:
            significance += sum_squares * tl.full((), w_sum_squares, ACC)
        if sum_squares_ptr is not None:
            tl.store(sum_squares_ptr + row, sum_squares, mask=inside)
    max_prob = tl.where(ignored, 0.0, divide(tl.full(S.shape, 1.0, ACC), S, DOUBLE))
    if W_MAX_PROB:
        significance += max_prob * tl.full((), w_max_prob, ACC)
    if max_prob_ptr is not None:
        tl.store(max_prob_ptr + row, max_prob, mask=inside)
    if MARGIN:
        second = tl.maximum(tl.minimum(top, x_y), second)
        margin = tl.where(ignored, 0.0, divide(1.0 - tl.exp2((second - reference) * scale), S, DOUBLE))
        if W_MARGIN:
            significance += margin * tl.full((), w_margin, ACC)
        if margin_ptr is not None:
            tl.store(margin_ptr + row, margin, mask=inside)
    if argmax_ptr is not None:
        lowest = tl.where(x_y >= top, tl.where(x_y == top, tl.minimum(y, lowest), y), lowest)
        found = tl.where(S == S, lowest, -1)
        tl.store(argmax_ptr + row, tl.where(ignored, 0, found).to(tl.int64), mask=inside)
    logsumexp = tl.where(ignored, 0.0, m * tl.full((), inverse_temperature, ACC) + log_sum)
    if W_LOGSUMEXP:
        significance += logsumexp * tl.full((), w_logsumexp, ACC)
    if logsumexp_ptr is not None:
        tl.store(logsumexp_ptr + row, logsumexp, mask=inside)
    if maximum_ptr is not None:
        tl.store(maximum_ptr + row, m, mask=inside)
        tl.store(total_ptr + row, S, mask=inside)

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
        if invalid_ptr is not None:
            invalid = tl.sum(((significance != significance) & inside).to(tl.int32), 0)
            tl.atomic_add(invalid_ptr, invalid, mask=invalid > 0, sem="relaxed")
        if finished_ptr is not None:
            tl.store(finished_ptr, 0, mask=tl.program_id(0) == 0)


INTERPRETED = isinstance(row_stats_kernel, InterpretedFunction)
