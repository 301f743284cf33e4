# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (Triton has no types, and its compiler reads annotations as its own.)
# ruff: noqa: SIM108 (what is known at compile time decides by itself whether the rest is compiled)
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
    rows_of_program,
    slice_of_program,
    unaligned_columns,
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
def gradient_of(x, row, softcap, DOUBLE: tl.constexpr):
    """Return (2^t (A + B t) - C) * slope of a tile, and the slope: softcap's derivative."""
    m, scale, cap, a, b, c = row
    slope = tl.full(x.shape, 1.0, x.dtype)
    if softcap > 0.0:
        bend = tanh(x / cap, DOUBLE)
        slope = 1.0 - bend * bend
        x = cap * bend
    t = (x - m) * scale
    # 2^-inf = 0 times a finite number: p ln p -> 0 as p -> 0.
    return (tl.exp2(t) * (a + b * tl.maximum(t, -FAR)) - c) * slope, slope


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
    DOUBLE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,  # the classes of both are next to each other
    ALIGNED: tl.constexpr,
    LOOP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    COLUMNS: tl.constexpr = CHUNKS * LANES * WIDTH
    UNITS: tl.constexpr = 16 * 8 // logits_ptr.dtype.element_ty.primitive_bitwidth
    outer, first, inner, row, inside, target, live = rows_of_program(targets_ptr, inner_rows, ignore_index, ROWS)
    base = logits_ptr + outer * outer_stride + inner * inner_stride
    out = gradient_ptr + outer * gradient_outer_stride + inner * gradient_inner_stride
    if LOOP:
        begin, columns = slice_of_program(classes, slice_columns, inside)
    else:
        begin, columns = 0, classes
        if ALIGNED:  # no change in value, but Triton sees it, and moves 16 bytes at a time
            base = tl.multiple_of(base, 16)
            out = tl.multiple_of(out, 16)
            columns = classes // UNITS * UNITS
    place = columns_of_tile(CHUNKS, LANES, WIDTH)
    base = base[:, None, None, None]
    out = out[:, None, None, None]
    alive = live[:, None, None, None]
    y = tl.where(live, target, -1)[:, None, None, None]

    m = tl.load(maximum_ptr + row, mask=live, other=0.0)
    S = tl.load(total_ptr + row, mask=live, other=1.0)
    inverse = tl.full((), inverse_temperature, ACC)
    smoothing = tl.full((), label_smoothing, ACC)
    a = tl.zeros((ROWS,), ACC)
    b = a
    c = a
    d = a
    if loss_gradient_ptr is not None:
        g_loss = tl.load(loss_gradient_ptr + row, mask=live, other=0.0).to(ACC) * inverse
        a += g_loss / S
        c += g_loss * smoothing / classes
        d += g_loss * (1.0 - smoothing)
    if entropy_gradient_ptr is not None:
        g_entropy = tl.load(entropy_gradient_ptr + row, mask=live, other=0.0).to(ACC) * inverse / S
        entropy = tl.load(entropy_ptr + row, mask=live, other=0.0)
        a -= g_entropy * (entropy - tl.log(S))
        b -= g_entropy * LN2
    row_constants = (
        m[:, None, None, None],
        inverse * LOG2E,
        tl.full((), softcap, ACC),
        a[:, None, None, None],
        b[:, None, None, None],
        c[:, None, None, None],
    )
    d = d[:, None, None, None]

    head = columns * 0
    full = head
    if LOOP:
        if LANES > 1 and CONTIGUOUS:
            start_of_row = outer * outer_stride + first * inner_stride + begin
            head = unaligned_columns(start_of_row, misaligned, WIDTH)
            aligned = logits_ptr + start_of_row + head
            aligned_out = gradient_ptr + outer * gradient_outer_stride + first * gradient_inner_stride + begin + head
        full = tl.maximum(columns - head, 0) // COLUMNS * COLUMNS
        start = columns * 0
        while start < full:
            column = begin + head + start + place
            if LANES > 1 and CONTIGUOUS:
                pointers = tl.multiple_of(aligned + start, 16) + place
                out_pointers = aligned_out + start
                if ALIGNED:
                    out_pointers = tl.multiple_of(out_pointers, 16)
                out_pointers += place
            else:
                pointers = base + column.to(tl.int64) * class_stride
                out_pointers = out + column.to(tl.int64) * gradient_class_stride
            x = tl.load(pointers, mask=alive, other=0.0).to(ACC)
            g, slope = gradient_of(x, row_constants, softcap, DOUBLE)
            g -= tl.where(column == y, d * slope, 0.0)
            g = tl.where(alive, g, 0.0).to(gradient_ptr.dtype.element_ty)
            if ROWS == 1:
                tl.store(out_pointers, g)
            else:
                tl.store(out_pointers, g, mask=inside[:, None, None, None])
            start += COLUMNS
    start = columns * 0
    while start < columns - full:
        left = start + place
        if LOOP:
            column = begin + tl.where(left < head, left, left + full)
        else:
            column = left
        here = (left < columns - full) & inside[:, None, None, None]
        offset = column if CONTIGUOUS else column.to(tl.int64) * class_stride
        out_offset = column if CONTIGUOUS else column.to(tl.int64) * gradient_class_stride
        x = tl.load(base + offset, mask=here & alive, other=0.0).to(ACC)
        g, slope = gradient_of(x, row_constants, softcap, DOUBLE)
        g -= tl.where(column == y, d * slope, 0.0)
        tl.store(out + out_offset, tl.where(alive, g, 0.0).to(gradient_ptr.dtype.element_ty), mask=here)
        start += COLUMNS if LOOP else columns
