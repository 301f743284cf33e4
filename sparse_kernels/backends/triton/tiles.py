# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (Triton has no types, and its compiler reads annotations as its own.)
"""Rows and columns of a program, shared by the forward and the backward kernels.

A tile is a block of [ROWS, LANES, CHUNKS, WIDTH]: for each of ROWS rows, CHUNKS * LANES * WIDTH columns,
column = (chunk * LANES + lane) * WIDTH + place. Triton gives a thread 16 bytes along the axis whose addresses it knows
to be contiguous. It deals out further threads along the same axis, then along the first axis, and so on to the last,
whose share is a thread's own. So

    LANES > 1      one row: a lane is a thread, which holds CHUNKS times WIDTH = 16 bytes;
    CONTIGUOUS     several whole rows, a few threads to each;
    neither        a thread to a row, for rows next to each other in memory (NCHW) and very short ones.

Strides are not specialised, so that it is CONTIGUOUS alone that tells Triton so.
"""

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from sparse_kernels.backends.triton.math import tanh


@triton.jit
def rows_of_program(targets_ptr, inner_rows, ignore_index, ROWS: tl.constexpr):
    """Return the program's outer row and first inner row, then five numbers for each of its rows, [ROWS] each.

    They are inner row, row = outer * inner_rows + inner in 64 bits, inside (the batch), target, and live (inside and
    not ignored).
    """
    groups = tl.cdiv(inner_rows, ROWS)
    program = tl.program_id(0)
    outer = (program // groups).to(tl.int64)
    first = (program % groups).to(tl.int64) * ROWS
    inner = first + tl.arange(0, ROWS)
    inside = inner < inner_rows
    row = outer * inner_rows + inner
    target = tl.load(targets_ptr + row, mask=inside, other=0).to(tl.int64)
    return outer, first, inner, row, inside, target, inside & (target != ignore_index)


@triton.jit
def columns_of_tile(CHUNKS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Return the column of each place, int32 [1, LANES, CHUNKS, WIDTH]."""
    chunk = tl.arange(0, CHUNKS)[None, None, :, None]
    lane = tl.arange(0, LANES)[None, :, None, None]
    return (chunk * LANES + lane) * WIDTH + tl.arange(0, WIDTH)[None, None, None, :]


@triton.jit
def slice_of_program(classes, slice_columns, live):
    """Return the program's first column and its number of columns: none if none of its rows is live."""
    begin = tl.program_id(1) * slice_columns
    columns = tl.minimum(classes - begin, slice_columns)
    return begin, tl.where(tl.max(live.to(tl.int32), 0) > 0, columns, 0)


@triton.jit
def unaligned_columns(offset, misaligned, WIDTH: tl.constexpr):
    """Return the number of columns before the next 16-byte boundary.

    Counted from ``offset`` logits behind a pointer that is itself ``misaligned`` logits past a boundary.
    """
    past = ((offset + misaligned) % WIDTH).to(tl.int32)
    return (WIDTH - past) % WIDTH


@triton.jit
def load_logits(pointers, mask, softcap, cap, DOUBLE: tl.constexpr):
    """Return logits after softcap, in the accumulator's type; mask may be None."""
    if mask is None:  # noqa: SIM108
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=mask, other=0.0)
    x = x.to(tl.float64 if DOUBLE else tl.float32)
    if softcap > 0.0:
        x = cap * tanh(x / cap, DOUBLE)
    return x
