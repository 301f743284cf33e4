# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (Triton has no types, and its compiler reads annotations as its own.)
"""Rows and columns of a program, shared by the forward and the backward kernels.

A tile is a block of [ROWS, LANES, CHUNKS, WIDTH]: for each of ROWS rows, CHUNKS * LANES * WIDTH columns,
column = (chunk * LANES + lane) * WIDTH + place. Triton gives a thread 16 bytes along the axis whose addresses it knows
to be contiguous, and deals out further threads along that axis first. So

    LANES > 1      one row: a lane is a thread, which holds CHUNKS times WIDTH = 16 bytes;
    CONTIGUOUS     several whole rows, a few threads to each;
    PIXELS > 0     rows next to each other in memory (NCHW): a thread to so many of them, loaded at once if ALIGNED;
    none of them   a thread to a row: very short ones, and rows of strided classes.

Strides are not specialised, so that it is CONTIGUOUS and PIXELS alone that tell Triton so.
"""

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from sparse_kernels.backends.triton.math import tanh


@triton.jit
def rows_of_program(inner_rows, ROWS: tl.constexpr):
    """Return the program's outer row and first inner row, then three numbers for each of its rows, [ROWS] each.

    They are inner row, row = outer * inner_rows + inner in 64 bits, and inside (the batch).
    """
    groups = tl.cdiv(inner_rows, ROWS)
    program = tl.program_id(0)
    outer = (program // groups).to(tl.int64)
    first = (program % groups).to(tl.int64) * ROWS
    inner = first + tl.arange(0, ROWS)
    return outer, first, inner, outer * inner_rows + inner, inner < inner_rows


@triton.jit
def targets_of_rows(targets_ptr, row, inside, ignore_index):
    """Return each row's target, and whether the row is live: inside the batch and not ignored."""
    target = tl.load(targets_ptr + row, mask=inside, other=0).to(tl.int64)
    return target, inside & (target != ignore_index)


@triton.jit
def rows_at(pointer, outer, first, inner, outer_stride, inner_stride, ALIGNED: tl.constexpr, PIXELS: tl.constexpr):
    """Return pointers to the first column of the program's rows.

    What is ALIGNED begins at multiples of 16 bytes, or of PIXELS logits. There is no change in value in saying so, but
    Triton sees it, and moves so many at a time.
    """
    if PIXELS:
        start = pointer + outer * outer_stride + first
        if ALIGNED:
            start = tl.multiple_of(start, PIXELS * pointer.dtype.element_ty.primitive_bitwidth // 8)
        return start + tl.arange(0, inner.shape[0])
    rows = pointer + outer * outer_stride + inner * inner_stride
    return tl.multiple_of(rows, 16) if ALIGNED else rows


@triton.jit
def places_of_rows(base, offset, CONTIGUOUS: tl.constexpr, PIXELS: tl.constexpr):
    """Return pointers to a tile's places, ``offset`` behind the first columns of its rows.

    Where no axis is contiguous, Triton up to 3.6 deals out threads along the first one, the rows, and Triton 3.8 along
    the last one, so that 16 threads would each end 16 rows. It is the axis with the longest contiguous stretch: the
    claim of two settles which, and does no more. Two are moved at a time only from addresses known to be multiples.
    """
    pointers = base[:, None, None, None] + offset
    if not CONTIGUOUS and not PIXELS:
        pointers = tl.max_contiguous(pointers, (2, 1, 1, 1))
    return pointers


@triton.jit
def columns_of_tile(CHUNKS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Return the column of each place, int32 [1, LANES, CHUNKS, WIDTH]."""
    return words_of_tile(CHUNKS, LANES, WIDTH) + tl.arange(0, WIDTH)[None, None, None, :]


@triton.jit
def words_of_tile(CHUNKS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Return the column of the first place of each WIDTH, int32 [1, LANES, CHUNKS, 1]."""
    chunk = tl.arange(0, CHUNKS)[None, None, :, None]
    lane = tl.arange(0, LANES)[None, :, None, None]
    return (chunk * LANES + lane) * WIDTH


@triton.jit
def slice_of_program(classes, slice_columns):
    """Return the first column of the program's slice, and its number of columns."""
    begin = tl.program_id(1) * slice_columns
    return begin, tl.minimum(classes - begin, slice_columns)


@triton.jit
def words_of_row(offset, misaligned, columns, WIDTH: tl.constexpr):
    """Return the columns up to the next 16-byte boundary, and those in whole words of 16 bytes after it.

    Counted from ``offset`` logits behind a pointer that is itself ``misaligned`` logits past a boundary.
    """
    past = ((offset + misaligned) % WIDTH).to(tl.int32)
    head = (WIDTH - past) % WIDTH
    return head, tl.maximum(columns - head, 0) // WIDTH * WIDTH


@triton.jit
def edges_of_row(head, body, columns, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Return the columns outside of whole words, int32 [1, LANES, 1, 1], and which of them there are.

    There are ``head`` before the words and fewer than WIDTH behind: at most one to a thread.
    """
    tl.static_assert(LANES >= 2 * WIDTH)
    at = words_of_tile(1, LANES, 1)
    return tl.where(at < head, at, at + body), at < columns - body


@triton.jit
def load_logits(pointers, mask, softcap, SOFTCAP: tl.constexpr, DOUBLE: tl.constexpr):
    """Return logits after softcap, in the accumulator's type."""
    return capped(tl.load(pointers, mask=mask, other=0.0), softcap, SOFTCAP, DOUBLE)


@triton.jit
def capped(x, softcap, SOFTCAP: tl.constexpr, DOUBLE: tl.constexpr):
    """Return logits as they were loaded after softcap, in the accumulator's type."""
    x = x.to(tl.float64 if DOUBLE else tl.float32)
    if SOFTCAP:
        cap = tl.full((), softcap, x.dtype)
        x = cap * tanh(x / cap, DOUBLE)
    return x
