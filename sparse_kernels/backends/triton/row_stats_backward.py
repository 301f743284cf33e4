# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (Triton has no types, and its compiler reads annotations as its own.)
"""Gradient of loss and entropy in the logits, in one pass over them.

The forward saved each row's m, S and entropy H; a logsumexp, rounded at 1e4 to 1e-3, would not do. With
t_j = (x_j - m) log2(e) / temperature, p_j = 2^t_j / S and ln p_j = ln2 t_j - ln S:

    dx_j = (g_loss (p_j - (1 - a) [j = y] - a / classes) - g_entropy p_j (ln p_j + H)) / temperature * (1 - tanh^2)
         = (2^t_j (A + B t_j) - C - D [j = y]) * (1 - tanh^2)

with A, B, C and D constant along a row. Bytes: the logits once, the gradient once, a few numbers a row.

The gradient may be written over the logits: every element is read once, before it is written, and by the same program.
"""

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from sparse_kernels.backends.triton.math import FAR, LN2, LOG2E, tanh
from sparse_kernels.backends.triton.tiles import (
    columns_of_tile,
    edges_of_row,
    places_of_rows,
    rows_at,
    rows_of_program,
    slice_of_program,
    targets_of_rows,
    words_of_row,
    words_of_tile,
)

RUN_TIME = (
    "outer_stride",
    "inner_stride",
    "class_stride",
    "gradient_outer_stride",
    "gradient_inner_stride",
    "gradient_class_stride",
    "misaligned",
    "inner_rows",
    "classes",
    "slice_columns",
    "ignore_index",
)
ADDRESSES = (
    "logits_ptr", "gradient_ptr", "targets_ptr", "maximum_ptr", "total_ptr", "entropy_ptr", "loss_gradient_ptr",
    "entropy_gradient_ptr",
)  # fmt: skip


@triton.jit
def gradient_of(block, column, y, alive, m, scale, a, b, c, d, softcap, SOFTCAP: tl.constexpr):
    """Return the gradient of a tile of logits as they were loaded: (2^t (A + B t) - C - D [column = y]) * slope."""
    x = block.to(m.dtype)
    slope = tl.full(x.shape, 1.0, x.dtype)
    if SOFTCAP:
        cap = tl.full((), softcap, x.dtype)
        bend = tanh(x / cap, x.dtype == tl.float64)
        slope = 1.0 - bend * bend
        x = cap * bend
    t = (x - m) * scale
    # 2^-inf = 0 times a finite number: p ln p -> 0 as p -> 0.
    g = (tl.exp2(t) * (a + b * tl.maximum(t, -FAR)) - c) * slope - tl.where(column == y, d * slope, 0.0)
    return tl.where(alive, g, 0.0).to(block.dtype)


@triton.jit
def write_block(
    base, out, inside, alive, y, class_stride, gradient_class_stride, classes, m, scale, a, b, c, d, softcap,
    SOFTCAP: tl.constexpr, CONTIGUOUS: tl.constexpr, PIXELS: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the gradient of rows that one tile holds."""
    place = columns_of_tile(CHUNKS, LANES, WIDTH)
    here = (place < classes) & inside[:, None, None, None]
    offset = place if CONTIGUOUS else place.to(tl.int64) * class_stride
    out_offset = place if CONTIGUOUS else place.to(tl.int64) * gradient_class_stride
    block = tl.load(places_of_rows(base, offset, CONTIGUOUS, PIXELS), mask=here)
    g = gradient_of(block, place, y, alive, m, scale, a, b, c, d, softcap, SOFTCAP)
    tl.store(places_of_rows(out, out_offset, CONTIGUOUS, PIXELS), g, mask=here)


@triton.jit
def write_row(
    row_ptr, out_ptr, start_of_row, alive, y, misaligned, classes, slice_columns, m, scale, a, b, c, d, softcap,
    SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the program's slice of its one row, block after block, each loaded before it is due."""
    COLUMNS: tl.constexpr = CHUNKS * LANES * WIDTH
    begin, columns = slice_of_program(classes, slice_columns)
    head, body = words_of_row(start_of_row + begin, misaligned, columns, WIDTH)
    word, place = words_of_tile(CHUNKS, LANES, WIDTH), columns_of_tile(CHUNKS, LANES, WIDTH)
    edge, outside = edges_of_row(head, body, columns, LANES, WIDTH)
    edge += begin
    edges = tl.load(row_ptr + edge, mask=outside)
    words = row_ptr + begin + head
    out_words = out_ptr + begin + head
    block = tl.load(tl.multiple_of(words, 16) + place, mask=word < body)
    tl.store(out_ptr + edge, gradient_of(edges, edge, y, alive, m, scale, a, b, c, d, softcap, SOFTCAP), mask=outside)
    start = columns * 0
    while start < body:
        after = start + COLUMNS
        loaded = block
        block = tl.load(tl.multiple_of(words + after, 16) + place, mask=(after + word < body) & alive)
        g = gradient_of(loaded, begin + head + start + place, y, alive, m, scale, a, b, c, d, softcap, SOFTCAP)
        pointer = out_words + start
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        tl.store(pointer + place, g, mask=start + word < body)
        start = after


@triton.jit
def write_pixels(
    base, out, inside, alive, y, class_stride, gradient_class_stride, classes, slice_columns, m, scale, a, b, c, d,
    softcap, SOFTCAP: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the program's slice of rows side by side, WIDTH classes after WIDTH classes."""
    begin, columns = slice_of_program(classes, slice_columns)
    place = columns_of_tile(1, 1, WIDTH)
    inside_tile = inside[:, None, None, None]
    pointers = places_of_rows(base, (begin + place).to(tl.int64) * class_stride, False, PIXELS)
    block = tl.load(pointers, mask=(place < columns) & inside_tile)
    start = columns * 0
    while start < columns:
        column = begin + start + place
        after = start + WIDTH
        here = (after + place < columns) & inside_tile
        loaded = block
        pointers = places_of_rows(base, (column + WIDTH).to(tl.int64) * class_stride, False, PIXELS)
        block = tl.load(pointers, mask=here)
        g = gradient_of(loaded, column, y, alive, m, scale, a, b, c, d, softcap, SOFTCAP)
        here = (start + place < columns) & inside_tile
        pointers = places_of_rows(out, column.to(tl.int64) * gradient_class_stride, False, PIXELS)
        tl.store(pointers, g, mask=here)
        start = after


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=ADDRESSES)
def row_stats_backward_kernel(
    logits_ptr,
    gradient_ptr,  # may be logits_ptr
    targets_ptr,
    maximum_ptr,
    total_ptr,
    entropy_ptr,
    loss_gradient_ptr,  # or None
    entropy_gradient_ptr,  # or None
    outer_stride,
    inner_stride,
    class_stride,
    gradient_outer_stride,
    gradient_inner_stride,
    gradient_class_stride,
    misaligned,
    inner_rows,
    classes,
    ignore_index: tl.int64,
    inverse_temperature: tl.float64,
    softcap: tl.float64,
    label_smoothing: tl.float64,
    slice_columns,
    SMOOTHING: tl.constexpr,  # label_smoothing > 0
    SOFTCAP: tl.constexpr,  # softcap > 0
    DOUBLE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,  # the classes of both are next to each other
    PIXELS: tl.constexpr,  # of both, as in the forward
    ALIGNED: tl.constexpr,
    LOOP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    if ALIGNED:
        UNITS: tl.constexpr = 16 * 8 // logits_ptr.dtype.element_ty.primitive_bitwidth
        if PIXELS:
            inner_rows = inner_rows // PIXELS * PIXELS
            class_stride = class_stride // PIXELS * PIXELS
            gradient_class_stride = gradient_class_stride // PIXELS * PIXELS
        elif not LOOP:
            classes = classes // UNITS * UNITS
    outer, first, inner, row, inside = rows_of_program(inner_rows, ROWS)
    target, live = targets_of_rows(targets_ptr, row, inside, ignore_index)
    m = tl.load(maximum_ptr + row, mask=inside, other=0.0)
    S = tl.load(total_ptr + row, mask=inside, other=1.0)
    inverse = tl.full((), inverse_temperature, ACC)
    a = tl.zeros((ROWS,), ACC)
    b = a
    c = a
    d = a
    # Rows with an upstream gradient; the others are written as zeros. Triton 3.2's interpreter makes no booleans.
    used = tl.zeros((ROWS,), tl.int32) != 0
    if loss_gradient_ptr is not None:
        g_loss = tl.load(loss_gradient_ptr + row, mask=inside, other=0.0).to(ACC)
        used |= g_loss != 0.0
        g_loss *= inverse
        a += g_loss / S
        d += g_loss
        if SMOOTHING:
            smoothing = tl.full((), label_smoothing, ACC)
            c += g_loss * smoothing / classes
            d = g_loss * (1.0 - smoothing)
    if entropy_gradient_ptr is not None:
        g_entropy = tl.load(entropy_gradient_ptr + row, mask=inside, other=0.0).to(ACC)
        used |= g_entropy != 0.0
        g_entropy *= inverse / S
        entropy = tl.load(entropy_ptr + row, mask=inside, other=0.0)
        a -= g_entropy * (entropy - tl.log(S))
        b -= g_entropy * LN2
    m = m[:, None, None, None]
    a = a[:, None, None, None]
    b = b[:, None, None, None]
    c = c[:, None, None, None]
    d = d[:, None, None, None]
    scale = inverse * LOG2E
    alive = (live & used)[:, None, None, None]
    y = target[:, None, None, None]
    if LOOP and CONTIGUOUS:
        start_of_row = outer * outer_stride + first * inner_stride
        write_row(
            logits_ptr + start_of_row, gradient_ptr + outer * gradient_outer_stride + first * gradient_inner_stride,
            start_of_row, alive, y, misaligned, classes, slice_columns, m, scale, a, b, c, d, softcap, SOFTCAP,
            ALIGNED, CHUNKS, LANES, WIDTH,
        )  # fmt: skip
    else:
        base = rows_at(logits_ptr, outer, first, inner, outer_stride, inner_stride, ALIGNED, PIXELS)
        out = rows_at(
            gradient_ptr, outer, first, inner, gradient_outer_stride, gradient_inner_stride, ALIGNED, PIXELS
        )  # fmt: skip
        if LOOP:
            write_pixels(
                base, out, inside, alive, y, class_stride, gradient_class_stride, classes, slice_columns, m, scale, a,
                b, c, d, softcap, SOFTCAP, PIXELS, WIDTH,
            )  # fmt: skip
        else:
            write_block(
                base, out, inside, alive, y, class_stride, gradient_class_stride, classes, m, scale, a, b, c, d,
                softcap, SOFTCAP, CONTIGUOUS, PIXELS, CHUNKS, LANES, WIDTH,
            )  # fmt: skip
