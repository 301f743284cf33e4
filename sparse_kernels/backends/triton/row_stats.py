# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (Triton has no types, and its compiler reads annotations as its own.)

"""Row statistics and the gate's decision in one pass over the logits.

A program takes the rows and columns of tiles.py, block after block. Let x be the logits after softcap,
c = log2(e) / temperature, y the target, m the largest x so far, t_j = (x_j - m) c (base 2, never above 0) and
e_j = 2^t_j. Each lane keeps for its own columns, without the target,

    m    second (largest x)    lowest (column of m)    rest = sum e_j    rest_t = sum e_j t_j    rest_sq = sum e_j^2

When a block raises m by delta / c, the sums become, with f = 2^-delta,

    rest_t' = f (rest_t - delta rest)    rest' = f rest    rest_sq' = f^2 rest_sq

The same rule joins lanes, slices of a row (below) and, last of all, the target, which is read by itself. If rows are
long, a lane is a thread: threads exchange nothing and meet no barrier before a row's end. With S = rest + e_y:

    ln S      = log1p(S - 1), where S - 1 is rest if the target is largest, else (rest - 1) + e_y
    loss      = log1p(rest / e_y) where e_y >= rest, else ln S + (m - x_y) / temperature
                (smoothed by a: (1 - a) loss + a (ln S - mean_j(x_j - m) / temperature), x_j summed less x_y)
    entropy   = ln S - ln2 (rest_t + e_y t_y) / S
    grad_norm = sqrt(rest^2 + rest_sq) / S     sum_squares = (rest_sq + e_y^2) / S^2
    max_prob  = 1 / S                          margin      = (1 - 2^(c (second - m))) / S
    logsumexp = m / temperature + ln S

The target stays out of the sums because 1 - p_y and 1 - 2 p_y + sum p^2 cancel on a confident row.

Few long rows would leave most of a GPU idle. Then a row's columns are dealt out in slices (phase SLICE), whose peaks
and sums go to scratch memory. A second launch (phase MERGE) joins them in a fixed order, so the result is the same in
every run.

Rounding: x_j - m is exact or one rounding, t_j one more, so e_j carries |t_j| 2^-24 and the device's own
2 ulp of exp2; |t| e^t is at most 0.54, so no statistic gains more than a rounding of itself from it.

Bytes: the logits once, a sector a row for the target's logit, 4 or 8 bytes a row for the target and for each output.
Of an ignored row only the first block is read if rows are long. The first block is loaded before the target is known,
and every other while the one before it is summed. A GPU with 128 lanes on a processor must spend less than 14
instructions on a bfloat16 logit to read 4.3 TB/s (H200).

Hazards, each with a comment where it is handled: a maximum here drops NaN, so NaN must come through a sum; -inf must
add 0 and never 0 * -inf; offsets pass 2^31, so they are 64-bit.
"""

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from triton.runtime.interpreter import InterpretedFunction  # type: ignore[import-untyped, import-not-found, unused-ignore]

from sparse_kernels.backends.triton import launch
from sparse_kernels.backends.triton.math import LOG2E
from sparse_kernels.backends.triton.scan import (
    join,
    load_block,
    read_slices,
    scan_block,
    scan_pixels,
    scan_row,
    write_slice,
)
from sparse_kernels.backends.triton.statistics import decide, write_statistics
from sparse_kernels.backends.triton.tiles import rows_at, rows_of_program, targets_of_rows

SLICE, MERGE = tl.constexpr(launch.SLICE), tl.constexpr(launch.MERGE)

# Not specialised: a value that changes from call to call must not recompile if it is 1, divisible by 16 or above 2^31.
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
# Nor are addresses: a tensor that begins elsewhere must not recompile. ALIGNED says what loads of 16 bytes need.
ADDRESSES = (
    "logits_ptr", "targets_ptr", "sums_ptr", "lowest_ptr", "loss_ptr", "entropy_ptr", "grad_norm_ptr",
    "sum_squares_ptr", "max_prob_ptr", "margin_ptr", "argmax_ptr", "logsumexp_ptr", "maximum_ptr", "total_ptr",
    "mask_ptr", "significance_ptr", "weight_ptr", "offset_ptr", "threshold_ptr", "invalid_ptr", "finished_ptr",
    "step_ptr",
)  # fmt: skip


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=ADDRESSES)
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
    SMOOTHING: tl.constexpr,  # label_smoothing > 0
    SOFTCAP: tl.constexpr,  # softcap > 0
    PHASE: tl.constexpr,
    DOUBLE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,  # class_stride is 1
    PIXELS: tl.constexpr,  # of a thread, if inner_stride is 1 and class_stride is not; else 0
    ALIGNED: tl.constexpr,  # rows start, and end, at multiples of 16 bytes; of PIXELS logits, if there are any
    LOOP: tl.constexpr,  # more columns than a tile's
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,  # in phase MERGE: of slices
    WIDTH: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    if ALIGNED and PHASE != MERGE:
        UNITS: tl.constexpr = 16 * 8 // logits_ptr.dtype.element_ty.primitive_bitwidth
        if PIXELS:
            inner_rows = inner_rows // PIXELS * PIXELS
            class_stride = class_stride // PIXELS * PIXELS
        elif not LOOP:
            classes = classes // UNITS * UNITS
    outer, first, inner, row, inside = rows_of_program(inner_rows, ROWS)
    if PHASE != MERGE and not LOOP:  # before the targets, which it does not wait for
        # Past the last row it is read again: a mask of its own for each row would delay the loads.
        read = inner if PIXELS else tl.minimum(inner, inner_rows - 1)
        base = rows_at(logits_ptr, outer, first, read, outer_stride, inner_stride, ALIGNED, PIXELS)
        place, here, block = load_block(
            base, inside, class_stride, classes, CONTIGUOUS, PIXELS, CHUNKS, LANES, WIDTH
        )  # fmt: skip
    target, live = targets_of_rows(targets_ptr, row, inside, ignore_index)
    ignored = target == ignore_index
    bad = ((target < 0) | (target >= classes)) & (ignored == 0)
    y = tl.where(ignored | bad, 0, target).to(tl.int32)

    scale = tl.full((), inverse_temperature, ACC) * LOG2E
    if PHASE == MERGE:
        m, second, lowest, rest, rest_t, rest_sq, sum_d, x_y = read_slices(
            sums_ptr, lowest_ptr, row, inside, rows, slices, ROWS, LANES, LOSS, ENTROPY, SQUARES, MARGIN, ARGMAX,
            DOUBLE,
        )  # fmt: skip
    elif not LOOP:
        m, second, lowest, rest, rest_t, rest_sq, sum_d, x_y = scan_block(
            place, here, block, base, inside, y, class_stride, scale, softcap, LOSS, ENTROPY, SQUARES, MARGIN, ARGMAX,
            SMOOTHING, SOFTCAP, DOUBLE, ROWS, LANES,
        )  # fmt: skip
    elif CONTIGUOUS:
        m, second, lowest, rest, rest_t, rest_sq, sum_d, x_y = scan_row(
            logits_ptr, outer * outer_stride + first * inner_stride, y, live, misaligned, classes, slice_columns,
            scale, softcap, LOSS, ENTROPY, SQUARES, MARGIN, ARGMAX, SMOOTHING, SOFTCAP, DOUBLE, CHUNKS, LANES, WIDTH,
        )  # fmt: skip
    else:
        base = rows_at(logits_ptr, outer, first, inner, outer_stride, inner_stride, ALIGNED, PIXELS)
        m, second, lowest, rest, rest_t, rest_sq, sum_d, x_y = scan_pixels(
            base, inside, y, class_stride, classes, slice_columns, scale, softcap, LOSS, ENTROPY, SQUARES, MARGIN,
            ARGMAX, SMOOTHING, SOFTCAP, DOUBLE, PIXELS, ROWS, WIDTH,
        )  # fmt: skip
    m, second, lowest, rest, rest_t, rest_sq = join(
        m, second, lowest, rest, rest_t, rest_sq, scale, ENTROPY, SQUARES, MARGIN, ARGMAX
    )  # fmt: skip
    sum_d = tl.sum(sum_d, 1)
    if PHASE == SLICE:
        write_slice(
            sums_ptr, lowest_ptr, m, second, lowest, rest, rest_t, rest_sq, sum_d, x_y, row, inside, rows, slices,
            LOSS, ENTROPY, SQUARES, MARGIN, ARGMAX,
        )  # fmt: skip
    else:
        significance = write_statistics(
            m, second, lowest, rest, rest_t, rest_sq, sum_d, row, inside, ignored, bad, y, x_y, classes, scale,
            inverse_temperature, label_smoothing, loss_ptr, entropy_ptr, grad_norm_ptr, sum_squares_ptr, max_prob_ptr,
            margin_ptr, argmax_ptr, logsumexp_ptr, maximum_ptr, total_ptr, w_loss, w_entropy, w_grad_norm,
            w_sum_squares, w_max_prob, w_margin, w_logsumexp, LOSS, ENTROPY, SQUARES, MARGIN, SMOOTHING, W_LOSS,
            W_ENTROPY, W_GRAD_NORM, W_SUM_SQUARES, W_MAX_PROB, W_MARGIN, W_LOGSUMEXP, DOUBLE, ROWS,
        )  # fmt: skip
        if mask_ptr is not None:
            decide(
                significance, row, inside, live, ignored, mask_ptr, significance_ptr, weight_ptr, offset_ptr,
                threshold_ptr, invalid_ptr, finished_ptr, gate_temperature, p_min, seed, step, step_ptr, DOUBLE,
            )  # fmt: skip


INTERPRETED = isinstance(row_stats_kernel, InterpretedFunction)
