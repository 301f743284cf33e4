"""How the rows and columns of a batch are dealt out to programs. Triton is not imported here.

No speed is measured yet: these follow from the instructions, registers and spills that the compiler reports
for sm_75 to sm_100, and from enough loads of 16 bytes being in flight.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    @property
    def columns(self) -> int:
        """Of a block."""
        return self.chunks * self.lanes * self.width


NO_LIMIT = 2**63
# Classes next to each other in memory, several rows to a program: a block holds all classes.
SHORT = (
    Launch(16, 128, 1, 1, 16, 4, "a thread to a row: what follows a row's last logit is done once, not once a thread "
           "that shares it; the first-level cache joins the rows' loads", False),
    Launch(64, 32, 1, 1, 64, 4, "16 logits a thread; a row's sums need no barrier"),
    Launch(128, 16, 1, 1, 128, 4, "the same"),
    Launch(256, 8, 1, 1, 256, 4, "the same"),
    Launch(512, 4, 1, 1, 512, 4, "the same"),
    Launch(1024, 4, 1, 1, 1024, 4, "1,000 classes pad to 1,024; a warp to a row, 32 logits a thread"),
)  # fmt: skip
# One row to a program: most classes, warps, reason.
LONG = (
    (4096, 1, "a warp: no barrier at all, and what follows a row's last logit is done by one warp"),
    (16384, 2, "the same by two"),
    (NO_LIMIT, 4, "enough loads in flight with few programs, and few warps to repeat a row's end"),
)
# Rows next to each other in memory, as the pixels of NCHW.
STRIDED = Launch(NO_LIMIT, 128, 1, 1, 8, 4, "a thread owns a pixel, so nothing is exchanged; a warp reads 32", False)


def choose(classes: int, class_stride: int, itemsize: int) -> Launch:
    """The tile for a batch; ``itemsize`` is a logit's bytes."""
    if class_stride != 1 and classes > 1:
        return _narrowed(STRIDED, itemsize)
    for rung in SHORT:
        if classes <= rung.classes:
            return _narrowed(rung, itemsize)
    most, warps, reason = next(rung for rung in LONG if classes <= rung[0])
    return Launch(most, 1, CHUNKS, 32 * warps, BYTES // itemsize, warps, reason)


def _narrowed(rung: Launch, itemsize: int) -> Launch:
    """With half the rows for float64, whose registers come in pairs."""
    if itemsize < 8:
        return rung
    rows = max(1, rung.rows // 2)
    return Launch(rung.classes, rows, rung.chunks, rung.lanes, rung.width, rung.warps, rung.reason, rung.contiguous)


WARPS = 16  # that a processor needs to keep the memory busy, at CHUNKS loads a thread
MOST_SLICES = 64  # what phase MERGE joins in one go


def slices(tile: Launch, programs: int, classes: int, processors: int) -> tuple[int, int]:
    """Into how many slices to cut the rows of ``programs`` programs, and a slice's columns: a multiple of a block's.

    As many as give each of a GPU's processors its warps, none of less than one block; one slice where there are
    programs enough, as a second launch and its scratch cost more than they save there.
    """
    blocks = -(-classes // tile.columns)
    wanted = -(-processors * WARPS // (programs * tile.warps))
    if programs * tile.warps * 2 > processors * WARPS or blocks == 1:
        return 1, classes
    of_slice = -(-blocks // min(wanted, blocks, MOST_SLICES))
    return -(-blocks // of_slice), of_slice * tile.columns


def of_merge(count: int) -> Launch:
    """The tile of phase MERGE: a row's slices are its lanes."""
    lanes = 1 << (count - 1).bit_length()
    return Launch(NO_LIMIT, 4, 1, lanes, 1, 1, "few rows, and little of each", False)
