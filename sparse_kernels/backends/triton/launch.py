"""Assignment of a batch's rows and columns to programs. Triton is not imported here.

No speed is measured yet. The choices follow from the instructions, registers and spills that the compiler reports for
sm_75 to sm_100, and from the need for enough 16-byte loads in flight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

BYTES = 16  # of a thread's load, the widest there is
CHUNKS = 4  # such loads in flight a thread: with 16 warps on a processor, 32 KB, more than latency x bandwidth


@dataclass(frozen=True)
class Launch:
    """A tile (see tiles.py) and its warps."""

    classes: int  # the most that it is for
    rows: int
    chunks: int
    lanes: int
    width: int
    warps: int
    contiguous: bool = True  # the class stride is 1
    registers: int | None = None  # the most for a thread; None for the compiler's choice

    @property
    def columns(self) -> int:
        """Columns of a block."""
        return self.chunks * self.lanes * self.width


NO_LIMIT = 2**63
# Classes next to each other in memory, several rows to a program: a block holds all classes.
SHORT = (
    # A thread to a row: one thread does all that follows a row's last logit; the first-level cache joins the loads.
    Launch(32, 128, 1, 1, 32, 4, contiguous=False),
    # A warp and 32 logits a thread: no barrier, few exchanges a row.
    Launch(64, 16, 1, 1, 64, 1),
    Launch(128, 8, 1, 1, 128, 1),
    Launch(256, 4, 1, 1, 256, 1),
    Launch(512, 2, 1, 1, 512, 1),
)
# One row to a program: most classes, warps, registers.
LONG = (
    # A warp: no barrier at all, and one warp does all that follows a row's last logit.
    (8192, 1, None),
    # 16 warps on a processor; without the limit the compiler takes up to 220 registers, because of softcap.
    (NO_LIMIT, 4, 128),
)
# Rows next to each other in memory, as the pixels of NCHW. A thread owns a pixel, so nothing is exchanged; a warp
# reads 32 of them.
STRIDED = Launch(NO_LIMIT, 128, 1, 1, 8, 4, contiguous=False)


def choose(classes: int, class_stride: int, itemsize: int, tensors: int = 1) -> Launch:
    """Return the tile for a batch.

    Args:
        classes: of a row.
        class_stride: in elements.
        itemsize: bytes of a logit.
        tensors: number of tensors of logits that are moved; 2 for a backward.
    """
    if class_stride != 1 and classes != 1:
        tile = STRIDED
    else:
        short = next((tile for tile in SHORT if classes <= tile.classes), None)
        if short is None:
            most, warps, registers = next(rung for rung in LONG if classes <= rung[0])
            return Launch(most, 1, CHUNKS // tensors, 32 * warps, BYTES // itemsize, warps, registers=registers)
        tile = replace(short, width=16) if short.rows == 128 and classes <= 16 else short
    # float64 takes two registers a number.
    return replace(tile, rows=tile.rows // 2) if itemsize == 8 else tile


WARPS = 16  # that a processor needs to keep the memory busy, at CHUNKS loads a thread
MOST_SLICES = 64  # joined by phase MERGE in one go


def slices(tile: Launch, programs: int, classes: int, processors: int) -> tuple[int, int]:
    """Return the number of slices to cut the rows into, and a slice's columns: a multiple of a block's.

    As many slices as give each processor of a GPU its warps, none of less than one block. One slice if there are
    programs enough: a second launch and its scratch memory then cost more than they save.

    Args:
        tile: of each program.
        programs: of one slice.
        classes: of a row.
        processors: of the GPU.
    """
    blocks = -(-classes // tile.columns)
    warps = programs * tile.warps
    if blocks == 1 or 2 * warps > processors * WARPS:
        return 1, classes
    useful = -(-processors * WARPS // warps)
    blocks_of_slice = -(-blocks // min(useful, blocks, MOST_SLICES))
    return -(-blocks // blocks_of_slice), blocks_of_slice * tile.columns


MANY_ROWS = 16384


def merged(tile: Launch, count: int, rows: int) -> Launch | None:
    """Return the tile of phase MERGE, in which a row's slices are its lanes; None if one launch does all.

    Rows of one slice are merged too if they are many and short: the few hundred instructions after a row's last
    logit, which a warp repeats for each of its rows, then cost more than 40 bytes of scratch a row and a launch.

    Args:
        tile: of the launch before.
        count: number of slices.
        rows: of the batch.
    """
    repeated = tile.contiguous and tile.warps == 1 and rows >= MANY_ROWS
    if count == 1 and not repeated:
        return None
    lanes = 1 << (count - 1).bit_length()
    # A thread to a row.
    return Launch(NO_LIMIT, 128 if count == 1 else 4, 1, lanes, 1, 4 if count == 1 else 1, contiguous=False)
