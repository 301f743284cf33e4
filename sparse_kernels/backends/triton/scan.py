# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (Triton has no types, and its compiler reads annotations as its own.)
# ruff: noqa: SIM102 (what is known at compile time decides by itself whether the rest is compiled)
"""Running peaks and sums of a row over its columns; row_stats.py's header defines and derives them.

Peaks are (m, second, lowest), sums are (rest, rest_t, rest_sq). Each lane keeps its own while the columns are read
(``absorb``); then they are joined over lanes or slices (``join``).
"""

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from sparse_kernels.backends.triton.math import FAR, NO_COLUMN
from sparse_kernels.backends.triton.tiles import columns_of_tile, load_logits, slice_of_program, unaligned_columns


@triton.jit
def across(x):
    """Return a tile's maximum over the columns of each lane and row."""
    return tl.max(tl.max(x, 3), 2)


@triton.jit
def total(x):
    """Return a tile's sum over the columns of each lane and row."""
    return tl.sum(tl.sum(x, 3), 2)


@triton.jit
def rescale(state, delta, ENTROPY: tl.constexpr, SQUARES: tl.constexpr):
    """Return the sums in units of a maximum that is delta above theirs, in base 2."""
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
    """Return each lane's peaks and sums with a tile's columns added."""
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
    """Return the peaks and sums of all lanes (or slices), axis 1, together: [ROWS] each."""
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


@triton.jit
def empty_state(ROWS: tl.constexpr, LANES: tl.constexpr, DOUBLE: tl.constexpr):
    """Return the peaks, sums and sum_d of no columns."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    low = tl.full((ROWS, LANES), float("-inf"), ACC)
    zero = tl.zeros((ROWS, LANES), ACC)
    return (low, low, tl.zeros((ROWS, LANES), tl.int32)), (zero, zero, zero), zero


@triton.jit
def read_slices(
    sums_ptr, lowest_ptr, row, inside, rows, slices, ROWS: tl.constexpr, LANES: tl.constexpr, LOSS: tl.constexpr,
    ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MARGIN: tl.constexpr, ARGMAX: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Return the peaks, sums and sum_d that phase SLICE wrote, a lane to a slice."""
    peaks, sums, sum_d = empty_state(ROWS, LANES, DOUBLE)
    second = peaks[1]
    lowest = peaks[2]
    rest_t = sums[1]
    rest_sq = sums[2]
    piece = tl.arange(0, LANES)[None, :].to(tl.int64)
    at = piece * rows + row[:, None]
    part = rows.to(tl.int64) * slices
    here = (piece < slices) & inside[:, None]
    m = tl.load(sums_ptr + at, mask=here, other=float("-inf"))
    rest = tl.load(sums_ptr + 2 * part + at, mask=here, other=0.0)
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
    return (m, second, lowest), (rest, rest_t, rest_sq), sum_d


@triton.jit
def write_slice(
    sums_ptr, lowest_ptr, peaks, sums, sum_d, x_y, row, inside, rows, slices, LOSS: tl.constexpr,
    ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MARGIN: tl.constexpr, ARGMAX: tl.constexpr,
):  # fmt: skip
    """Write the joined peaks and sums of the program's slice to scratch memory, for phase MERGE."""
    top, second, lowest = peaks
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


@triton.jit
def scan_block(
    base, y, live, origin, class_stride, classes, scale, softcap, cap, label_smoothing, LOSS: tl.constexpr,
    ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MARGIN: tl.constexpr, ARGMAX: tl.constexpr, DOUBLE: tl.constexpr,
    CONTIGUOUS: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the peaks, sums and sum_d of rows that one tile holds."""
    peaks, sums, sum_d = empty_state(ROWS, LANES, DOUBLE)
    place = columns_of_tile(CHUNKS, LANES, WIDTH)
    here = (place < classes) & live[:, None, None, None]
    offset = place if CONTIGUOUS else place.to(tl.int64) * class_stride
    x = load_logits(base[:, None, None, None] + offset, here, softcap, cap, DOUBLE)
    if LOSS:
        if label_smoothing > 0.0:
            sum_d += total(tl.where(here, x - origin[:, None, None, None], 0.0))
    x = tl.where(here & (place != y[:, None, None, None]), x, float("-inf"))
    peaks, sums = absorb(peaks, sums, x, place, scale, ENTROPY, SQUARES, MARGIN, ARGMAX)
    return peaks, sums, sum_d


@triton.jit
def scan_blocks(
    logits_ptr, base, outer, first, y, live, origin, outer_stride, inner_stride, class_stride, misaligned, classes,
    slice_columns, scale, softcap, cap, label_smoothing, LOSS: tl.constexpr, ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr, MARGIN: tl.constexpr, ARGMAX: tl.constexpr, DOUBLE: tl.constexpr, CONTIGUOUS: tl.constexpr,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the peaks, sums and sum_d of the program's slice of its rows, tile after tile."""
    COLUMNS: tl.constexpr = CHUNKS * LANES * WIDTH
    ALONE: tl.constexpr = LANES > 1 and CONTIGUOUS
    peaks, sums, sum_d = empty_state(ROWS, LANES, DOUBLE)
    begin, columns = slice_of_program(classes, slice_columns, live)
    place = columns_of_tile(CHUNKS, LANES, WIDTH)
    y_tile = y[:, None, None, None]
    live_tile = live[:, None, None, None]
    origin_tile = origin[:, None, None, None]
    base_tile = base[:, None, None, None]
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
    return peaks, sums, sum_d
