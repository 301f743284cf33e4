# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (Triton has no types, and its compiler reads annotations as its own.)
"""Running peaks and sums of a row over its columns; row_stats.py's header defines and derives them.

Peaks are m, second and lowest, sums are rest, rest_t and rest_sq. Each lane keeps its own while the columns are read
(``absorb``); then they are joined over lanes or slices (``join``). They are passed one by one: Triton 3.2 takes no
tuples.
"""

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from sparse_kernels.backends.triton.math import FAR, NO_COLUMN
from sparse_kernels.backends.triton.tiles import (
    capped,
    columns_of_tile,
    edges_of_row,
    load_logits,
    places_of_rows,
    slice_of_program,
    words_of_row,
    words_of_tile,
)


@triton.jit
def across(x):
    """Return a tile's maximum over the columns of each lane and row."""
    return tl.max(tl.max(x, 3), 2)


@triton.jit
def total(x):
    """Return a tile's sum over the columns of each lane and row."""
    return tl.sum(tl.sum(x, 3), 2)


@triton.jit
def rescale(rest, rest_t, rest_sq, delta, ENTROPY: tl.constexpr, SQUARES: tl.constexpr):
    """Return the sums in units of a maximum that is delta above theirs, in base 2."""
    delta = tl.minimum(delta, FAR)
    f = tl.exp2(-delta)
    if ENTROPY:
        rest_t = f * (rest_t - delta * rest)
    if SQUARES:
        rest_sq = f * f * rest_sq
    return f * rest, rest_t, rest_sq


@triton.jit
def absorb(
    m,  # the peaks, [ROWS, LANES] each
    second,
    lowest,
    rest,  # the sums, the same
    rest_t,
    rest_sq,
    x,  # a tile; -inf for the target and for what is no column
    column,  # int32
    scale,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    MARGIN: tl.constexpr,
    ARGMAX: tl.constexpr,
):
    """Return each lane's peaks and sums with a tile's columns added."""
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
    rest, rest_t, rest_sq = rescale(rest, rest_t, rest_sq, (reference - m) * scale, ENTROPY, SQUARES)
    t = (x - reference[:, :, None, None]) * scale
    e = tl.exp2(t)
    rest += total(e)
    if ENTROPY:
        rest_t += total(e * tl.maximum(t, -FAR))  # 2^-inf = 0 must add 0; NaN comes through e
    if SQUARES:
        rest_sq += total(e * e)
    return new_m, second, lowest, rest, rest_t, rest_sq


@triton.jit
def join(
    m, second, lowest, rest, rest_t, rest_sq, scale, ENTROPY: tl.constexpr, SQUARES: tl.constexpr,
    MARGIN: tl.constexpr, ARGMAX: tl.constexpr,
):  # fmt: skip
    """Return the peaks and sums of all lanes (or slices), axis 1, together: [ROWS] each."""
    top = tl.max(m, 1)
    reference = tl.where(top == float("-inf"), 0.0, top)
    rest, rest_t, rest_sq = rescale(rest, rest_t, rest_sq, (reference[:, None] - m) * scale, ENTROPY, SQUARES)
    if MARGIN:
        lane = tl.arange(0, m.shape[1])[None, :]
        first = tl.min(tl.where(m == top[:, None], lane, NO_COLUMN), 1)
        second = tl.maximum(tl.max(second, 1), tl.max(tl.where(lane == first[:, None], float("-inf"), m), 1))
    else:
        second = tl.max(second, 1)
    lowest = tl.min(tl.where(m == top[:, None], lowest, NO_COLUMN), 1)
    return top, second, lowest, tl.sum(rest, 1), tl.sum(rest_t, 1), tl.sum(rest_sq, 1)


@triton.jit
def origin_of(x_y):
    """Return the origin of sum_d: not a masked target, whose distance to all the others would overflow upwards."""
    return tl.where(tl.abs(x_y) < 1e30, x_y, 0.0)


@triton.jit
def empty_state(ROWS: tl.constexpr, LANES: tl.constexpr, DOUBLE: tl.constexpr):
    """Return the peaks, sums and sum_d of no columns."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    low = tl.full((ROWS, LANES), float("-inf"), ACC)
    zero = tl.zeros((ROWS, LANES), ACC)
    return low, low, tl.zeros((ROWS, LANES), tl.int32), zero, zero, zero, zero


@triton.jit
def read_slices(
    sums_ptr, lowest_ptr, row, inside, rows, slices, ROWS: tl.constexpr, LANES: tl.constexpr, LOSS: tl.constexpr,
    ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MARGIN: tl.constexpr, ARGMAX: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Return the peaks, sums, sum_d and targets' logits that phase SLICE wrote, a lane to a slice."""
    m, second, lowest, rest, rest_t, rest_sq, sum_d = empty_state(ROWS, LANES, DOUBLE)
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
    x_y = tl.load(sums_ptr + 6 * part + row, mask=inside, other=0.0)
    return m, second, lowest, rest, rest_t, rest_sq, sum_d, x_y


@triton.jit
def write_slice(
    sums_ptr, lowest_ptr, m, second, lowest, rest, rest_t, rest_sq, sum_d, x_y, row, inside, rows, slices,
    LOSS: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MARGIN: tl.constexpr, ARGMAX: tl.constexpr,
):  # fmt: skip
    """Write the joined peaks and sums of the program's slice to scratch memory, for phase MERGE."""
    at = tl.program_id(1).to(tl.int64) * rows + row
    part = rows.to(tl.int64) * slices
    tl.store(sums_ptr + at, m, mask=inside)
    tl.store(sums_ptr + 2 * part + at, rest, mask=inside)
    tl.store(sums_ptr + 6 * part + at, x_y, mask=inside)
    if MARGIN:
        tl.store(sums_ptr + part + at, second, mask=inside)
    if ARGMAX:
        tl.store(lowest_ptr + at, lowest, mask=inside)
    if ENTROPY:
        tl.store(sums_ptr + 3 * part + at, rest_t, mask=inside)
    if SQUARES:
        tl.store(sums_ptr + 4 * part + at, rest_sq, mask=inside)
    if LOSS:
        tl.store(sums_ptr + 5 * part + at, sum_d, mask=inside)


@triton.jit
def load_block(
    base, inside, class_stride, classes, CONTIGUOUS: tl.constexpr, PIXELS: tl.constexpr, CHUNKS: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the columns of rows that one tile holds, int32, which of them there are, and their logits as loaded.

    What is no column is -inf. All loads are issued before any of them is waited for.
    """
    place = columns_of_tile(CHUNKS, LANES, WIDTH)
    here = place < classes
    if PIXELS:
        here &= inside[:, None, None, None]
    offset = place if CONTIGUOUS else place.to(tl.int64) * class_stride
    pointers = places_of_rows(base, offset, CONTIGUOUS, PIXELS)
    block = tl.load(pointers, mask=here, other=float("-inf"))
    if CONTIGUOUS:  # one warp. Otherwise ptxas puts the sums of a row before the loads of the next
        tl.debug_barrier()
    return place, here, block


@triton.jit
def scan_block(
    place, here, block, base, inside, y, class_stride, scale, softcap, LOSS: tl.constexpr, ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr, MARGIN: tl.constexpr, ARGMAX: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr,
    DOUBLE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Return the peaks, sums and sum_d of rows that one tile holds, and their targets' logits."""
    m, second, lowest, rest, rest_t, rest_sq, sum_d = empty_state(ROWS, LANES, DOUBLE)
    x = capped(block, softcap, SOFTCAP, DOUBLE)
    if SMOOTHING:
        x_y = load_logits(base + y.to(tl.int64) * class_stride, inside, softcap, SOFTCAP, DOUBLE)
        sum_d += total(tl.where(here, x - origin_of(x_y)[:, None, None, None], 0.0))
    other = place != y[:, None, None, None]
    if SOFTCAP:  # of -inf it is a number
        other &= here
    x = tl.where(other, x, float("-inf"))
    m, second, lowest, rest, rest_t, rest_sq = absorb(
        m, second, lowest, rest, rest_t, rest_sq, x, place, scale, ENTROPY, SQUARES, MARGIN, ARGMAX
    )  # fmt: skip
    if not SMOOTHING:
        x_y = load_logits(base + y.to(tl.int64) * class_stride, inside, softcap, SOFTCAP, DOUBLE)
    return m, second, lowest, rest, rest_t, rest_sq, sum_d, x_y


@triton.jit
def scan_row(
    logits_ptr, start_of_row, y, live, misaligned, classes, slice_columns, scale, softcap, LOSS: tl.constexpr,
    ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MARGIN: tl.constexpr, ARGMAX: tl.constexpr, SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr, DOUBLE: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the peaks, sums and sum_d of the program's slice of its one row, and the target's logit.

    The row is read in whole words of 16 bytes, but for the few columns before and behind them. A block is loaded
    while the one before it is summed. The first is loaded before the target is known, so of ignored rows as well.
    """
    COLUMNS: tl.constexpr = CHUNKS * LANES * WIDTH
    m, second, lowest, rest, rest_t, rest_sq, sum_d = empty_state(1, LANES, DOUBLE)
    begin, columns = slice_of_program(classes, slice_columns)
    head, body = words_of_row(start_of_row + begin, misaligned, columns, WIDTH)
    word, place = words_of_tile(CHUNKS, LANES, WIDTH), columns_of_tile(CHUNKS, LANES, WIDTH)
    edge, outside = edges_of_row(head, body, columns, LANES, WIDTH)
    edge += begin
    row_ptr = logits_ptr + start_of_row
    edges = tl.load(row_ptr + edge, mask=outside)
    words = row_ptr + begin + head
    block = tl.load(tl.multiple_of(words, 16) + place, mask=word < body)
    if SMOOTHING:
        x_y = load_logits(row_ptr + y, live, softcap, SOFTCAP, DOUBLE)
        origin = origin_of(x_y)[:, None, None, None]
    y_tile = y[:, None, None, None]

    edge_x = capped(edges, softcap, SOFTCAP, DOUBLE)
    if LOSS and SMOOTHING:
        sum_d += total(tl.where(outside, edge_x - origin, 0.0))
    edge_x = tl.where(outside & (edge != y_tile), edge_x, float("-inf"))
    m, second, lowest, rest, rest_t, rest_sq = absorb(
        m, second, lowest, rest, rest_t, rest_sq, edge_x, edge, scale, ENTROPY, SQUARES, MARGIN, ARGMAX
    )  # fmt: skip

    y_at = tl.max(y, 0) - begin - head
    stop = tl.where(tl.max(live.to(tl.int32), 0) > 0, body, 0)
    start = columns * 0
    while start < stop:
        after = start + COLUMNS
        x = capped(block, softcap, SOFTCAP, DOUBLE)
        block = tl.load(tl.multiple_of(words + after, 16) + place, mask=after + word < stop)
        column = begin + head + start + place
        if LOSS and SMOOTHING:
            sum_d += total(tl.where(start + word < body, x - origin, 0.0))
        if (after > body) | ((y_at >= start) & (y_at < after)):  # the last block, or the target's
            x = tl.where((start + word < body) & (column != y_tile), x, float("-inf"))
        m, second, lowest, rest, rest_t, rest_sq = absorb(
            m, second, lowest, rest, rest_t, rest_sq, x, column, scale, ENTROPY, SQUARES, MARGIN, ARGMAX
        )  # fmt: skip
        start = after
    if not SMOOTHING:  # before the loop ptxas would put it, and the wait for the target, ahead of the first block
        x_y = load_logits(row_ptr + y, live, softcap, SOFTCAP, DOUBLE)
    return m, second, lowest, rest, rest_t, rest_sq, sum_d, x_y


@triton.jit
def scan_pixels(
    base, inside, y, class_stride, classes, slice_columns, scale, softcap, LOSS: tl.constexpr, ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr, MARGIN: tl.constexpr, ARGMAX: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr,
    DOUBLE: tl.constexpr, PIXELS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the peaks, sums and sum_d of the program's slice of rows side by side, and their targets' logits.

    WIDTH classes are loaded while those before them are summed. Ignored rows are read like their neighbours, with
    which they share words.
    """
    m, second, lowest, rest, rest_t, rest_sq, sum_d = empty_state(ROWS, 1, DOUBLE)
    begin, columns = slice_of_program(classes, slice_columns)
    place = columns_of_tile(1, 1, WIDTH)
    inside_tile = inside[:, None, None, None]
    pointers = places_of_rows(base, (begin + place).to(tl.int64) * class_stride, False, PIXELS)
    block = tl.load(pointers, mask=(place < columns) & inside_tile)
    if SMOOTHING:
        x_y = load_logits(base + y.to(tl.int64) * class_stride, inside, softcap, SOFTCAP, DOUBLE)
        origin = origin_of(x_y)[:, None, None, None]
    start = columns * 0
    while start < columns:
        after = start + WIDTH
        x = capped(block, softcap, SOFTCAP, DOUBLE)
        here = after + place < columns
        pointers = places_of_rows(base, (begin + after + place).to(tl.int64) * class_stride, False, PIXELS)
        block = tl.load(pointers, mask=here & inside_tile)
        column = begin + start + place
        here = (start + place < columns) & inside_tile
        if LOSS and SMOOTHING:
            sum_d += total(tl.where(here, x - origin, 0.0))
        x = tl.where(here & (column != y[:, None, None, None]), x, float("-inf"))
        m, second, lowest, rest, rest_t, rest_sq = absorb(
            m, second, lowest, rest, rest_t, rest_sq, x, column, scale, ENTROPY, SQUARES, MARGIN, ARGMAX
        )  # fmt: skip
        start = after
    if not SMOOTHING:  # as in `scan_row`
        x_y = load_logits(base + y.to(tl.int64) * class_stride, inside, softcap, SOFTCAP, DOUBLE)
    return m, second, lowest, rest, rest_t, rest_sq, sum_d, x_y
