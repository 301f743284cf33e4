"""Assignment of a batch's rows and columns to programs. Triton is not imported here.

No speed is measured yet. The choices follow from the instructions, registers and spills that the compilers of Triton
3.2, 3.6 and 3.8 report for sm_75 to sm_120, and from the need for enough 16-byte loads in flight.
"""

from __future__ import annotations

from dataclasses import dataclass

BYTES = 16  # of a thread's load, the widest there is
WHOLE, SLICE, MERGE = 0, 1, 2  # phases of row_stats.py: a row in one launch, or its slices and their sum
CHUNKS = 4  # such loads in flight a thread: with 16 warps on a processor, 32 KB, more than latency x bandwidth
WARP_BYTES = 32 * CHUNKS * BYTES  # that a warp loads at once


@dataclass(frozen=True)
class Launch:
    """A tile (see tiles.py) and its warps."""

    rows: int
    chunks: int
    lanes: int
    width: int
    warps: int
    contiguous: bool = True  # the class stride is 1
    limited: bool = False  # in registers

    @property
    def columns(self) -> int:
        """Columns of a block."""
        return self.chunks * self.lanes * self.width


SHORT = 16  # most classes of a row that is a thread's: more, and its threads' loads touch too many sectors each
ONE_WARP = 8192  # most classes of a row that is a warp's: no barrier, and one warp does all that follows a row's end


def pixels(itemsize: int) -> int:
    """Return the number of adjacent rows that a thread owns where rows lie side by side: 16 bytes, 4 at most."""
    return min(4, BYTES // itemsize)


def unaligned_rows(itemsize: int) -> int:
    """Return the most rows of a warp whose lanes load single logits of each: all its threads end all of these rows."""
    return 2 if itemsize == 8 else 4  # more spill where everything is asked for


def choose(classes: int, class_stride: int, itemsize: int, tensors: int = 1) -> Launch:
    """Return the tile for a batch.

    Args:
        classes: of a row.
        class_stride: in elements.
        itemsize: bytes of a logit.
        tensors: number of tensors of logits that are moved; 2 for a backward.
    """
    if class_stride != 1 and classes != 1:
        # Rows side by side, as the pixels of NCHW: a thread owns some, so nothing is exchanged.
        return Launch(128 * pixels(itemsize), 1, 1, CHUNKS, 4, contiguous=False)
    if classes <= SHORT:
        # One thread does all that follows a row's last logit; the first-level cache joins the loads.
        warps = 2 if itemsize == 8 else 4
        return Launch(32 * warps, 1, 1, SHORT, warps, contiguous=False)
    # float64 takes two registers a number.
    width = 1 << (classes - 1).bit_length()
    rows = WARP_BYTES // (width * itemsize) // (2 if itemsize == 8 else 1)
    if rows > 1:  # a warp to some rows: few exchanges a row
        return Launch(rows, 1, 1, width, 1)
    if classes <= ONE_WARP:
        return Launch(1, CHUNKS // tensors, 32, BYTES // itemsize, 1)
    return Launch(1, CHUNKS // tensors, 128, BYTES // itemsize, 4, limited=True)


def most_registers(tile: Launch, many: bool) -> int | None:
    """Return the most registers for a thread, None for the compiler's choice.

    16 warps on a processor, or 12 where ``many`` statistics or a softcap spill at that: they have two blocks in flight.
    Threads that own rows of several blocks, or merge, or hold whole rows of which ``many`` are asked, get all that they
    need: of its own choice ptxas takes fewer for some of them, and spills.
    """
    if tile.contiguous:
        if many and tile.rows > 1:
            return 255
        return 128 if tile.limited and not many else None
    return 255 if tile.warps == 4 and tile.width < SHORT else None


WARPS = 16  # that a processor needs to keep the memory busy, at CHUNKS loads a thread
MOST_SLICES = 64  # joined by phase MERGE in one go


START = 1  # blocks that a program's start and end are worth
SECOND_LAUNCH = 2  # blocks that phase MERGE is worth


def slices(tile: Launch, programs: int, classes: int, processors: int) -> tuple[int, int]:
    """Return the number of slices to cut the rows into, and a slice's columns: a multiple of a block's.

    The number is the one that takes least time, counted in blocks: programs run in waves of as many as there is room
    for, and the last wave takes as long as a full one. One slice if that is no more than a sixteenth slower.

    Args:
        tile: of each program.
        programs: of one slice.
        classes: of a row.
        processors: of the GPU.
    """
    blocks, room = -(-classes // tile.columns), max(1, processors * WARPS // tile.warps)

    def time(blocks_of_slice: int) -> tuple[int, int]:
        count = -(-blocks // blocks_of_slice)
        waves = -(-programs * count // room)
        return waves * (blocks_of_slice + START) + (SECOND_LAUNCH if count > 1 else 0), count

    fewest = -(-blocks // MOST_SLICES)
    best = min(range(fewest, blocks + 1), key=time)
    quickest, count = time(best)
    if 15 * time(blocks)[0] <= 16 * quickest:
        return 1, classes
    return count, best * tile.columns


MANY_ROWS = 16384
CHEAP = 3  # threads that repeat the end of a row in less time than its scratch memory takes
MANY_REPETITIONS = 200_000  # of that end, by further threads: a launch's time (docs/design/gpu_kernels.md)


def merged(tile: Launch, count: int, rows: int) -> Launch | None:
    """Return the tile of phase MERGE, in which a row's slices are its lanes; None if one launch does all.

    Rows of one slice are merged too if they are many and each is ended by several threads: all of these repeat the few
    hundred instructions after a row's last logit, which can cost more than 40 bytes of scratch a row and a launch.

    Args:
        tile: of the launch before.
        count: number of slices.
        rows: of the batch.
    """
    threads = min(32, 32 * CHUNKS // tile.rows)  # that end a row
    repeated = tile.contiguous and tile.warps == 1 and rows >= MANY_ROWS
    if count == 1 and not (repeated and rows * (threads - CHEAP) >= MANY_REPETITIONS):
        return None
    lanes = 1 << (count - 1).bit_length()
    # A thread to a row.
    return Launch(128 if count == 1 else 4, 1, lanes, 1, 4 if count == 1 else 1, contiguous=False)
