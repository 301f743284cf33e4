"""How the rows and columns of a batch are dealt out to programs. Triton is not imported here.

No speed is measured yet: these follow from the instructions, registers and spills that the compiler reports
for sm_75 to sm_100, and from enough loads of 16 bytes being in flight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

BYTES = 16  # of a thread's load, the widest there is
CHUNKS = 4  # such loads in flight a thread: with 16 warps on a processor, 32 KB, more than latency x bandwidth


@dataclass(frozen=True)
class Launch:
    """A tile (see tiles.py), its warps, and the most classes it is for."""

    classes: int
    rows: int
    chunks: int
    lanes: int
    width: int
    warps: int
    reason: str
    contiguous: bool = True  # what the kernel is told of the class stride
    registers: int | None = None  # a thread's, at most

    @property
    def columns(self) -> int:
        """Of a block."""
        return self.chunks * self.lanes * self.width


NO_LIMIT = 2**63
# Classes next to each other in memory, several rows to a program: a block holds all classes.
SHORT = (
    Launch(32, 128, 1, 1, 32, 4, "a thread to a row: what follows a row's last logit is done by one thread; the "
           "first-level cache joins the rows' loads", False),
    Launch(64, 16, 1, 1, 64, 1, "a warp and 32 logits a thread: no barrier, few exchanges a row"),
    Launch(128, 8, 1, 1, 128, 1, "the same"),
    Launch(256, 4, 1, 1, 256, 1, "the same"),
    Launch(512, 2, 1, 1, 512, 1, "the same"),
)  # fmt: skip
# One row to a program: most classes, warps, registers, reason.
LONG = (
    (8192, 1, None, "a warp: no barrier at all, and what follows a row's last logit is done by one warp"),
    (NO_LIMIT, 4, 128, "16 warps on a processor; unasked the compiler takes up to 220 registers, for softcap's sake"),
)
# Rows next to each other in memory, as the pixels of NCHW.
STRIDED = Launch(NO_LIMIT, 128, 1, 1, 8, 4, "a thread owns a pixel, so nothing is exchanged; a warp reads 32", False)


def choose(classes: int, class_stride: int, itemsize: int, tensors: int = 1) -> Launch:
    """The tile for a batch; ``itemsize`` is a logit's bytes, ``tensors`` how many tensors of logits are moved."""
    rung = STRIDED
    if class_stride == 1 or classes == 1:
        found = next((rung for rung in SHORT if classes <= rung.classes), None)
        if found is None:
            most, warps, registers, reason = next(rung for rung in LONG if classes <= rung[0])
            return Launch(most, 1, CHUNKS // tensors, 32 * warps, BYTES // itemsize, warps, reason, registers=registers)
        rung = found
        if rung.rows == 128 and classes <= 16:
            rung = replace(rung, width=16)
    # float64 takes two registers a number.
    return replace(rung, rows=rung.rows // 2) if itemsize == 8 else rung


WARPS = 16  # that a processor needs to keep the memory busy, at CHUNKS loads a thread
MOST_SLICES = 64  # what phase MERGE joins in one go


def slices(tile: Launch, programs: int, classes: int, processors: int) -> tuple[int, int]:
    """Into how many slices to cut the rows of ``programs`` programs, and a slice's columns: a multiple of a block's.

    As many as give each of a GPU's processors its warps, none of less than one block; one slice where there are
    programs enough, as a second launch and its scratch cost more than they save there.
    """
    blocks = -(-classes // tile.columns)
    warps = programs * tile.warps
    if blocks == 1 or 2 * warps > processors * WARPS:
        return 1, classes
    wanted = -(-processors * WARPS // warps)
    of_slice = -(-blocks // min(wanted, blocks, MOST_SLICES))
    return -(-blocks // of_slice), of_slice * tile.columns


MANY_ROWS = 16384


def merged(tile: Launch, count: int, rows: int) -> Launch | None:
    """The tile of phase MERGE, where a row's slices are its lanes; None where one launch does all.

    Also for rows of one slice where they are many and short, for then what follows a row's last logit, a few
    hundred instructions that a warp repeats for each of its rows, costs more than 40 bytes of scratch a row
    and a launch.
    """
    repeated = tile.contiguous and tile.warps == 1 and rows >= MANY_ROWS
    if count == 1 and not repeated:
        return None
    lanes = 1 << (count - 1).bit_length()
    return Launch(NO_LIMIT, 128 if count == 1 else 4, 1, lanes, 1, 4 if count == 1 else 1, "a thread to a row", False)
