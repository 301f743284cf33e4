"""How large a tile a program takes, for each shape of a batch. Triton is not imported here.

No speed is measured yet: these follow from the registers and spills that the compiler reports for
sm_75 to sm_100, and from a few loads of 16 bytes a thread being in flight.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """A tile, its warps, and the most classes it is for."""

    classes: int
    rows: int
    columns: int
    warps: int
    reason: str


NO_LIMIT = 2**63
# Classes next to each other in memory.
CONTIGUOUS = (
    Launch(16, 32, 16, 4, "4 logits a thread: with 16, the statistics of its many rows spilled"),
    Launch(32, 32, 32, 4, "8 logits a thread; a warp reads whole rows, one after the other"),
    Launch(64, 16, 64, 4, "the same"),
    Launch(128, 8, 128, 4, "the same: a row is a warp's or less, so its sums need no barrier"),
    Launch(256, 4, 256, 4, "the same"),
    Launch(512, 2, 512, 4, "the same"),
    Launch(1024, 2, 1024, 4, "1,000 classes pad to 1,024; 16 logits a thread"),
    Launch(2048, 1, 2048, 4, "one row a program; its sums cross 4 warps once"),
    Launch(NO_LIMIT, 1, 4096, 8, "a loop; few barriers a byte"),
)
# Rows next to each other in memory, as the pixels of NCHW: a thread sums classes by itself.
STRIDED = (Launch(NO_LIMIT, 128, 8, 4, "a thread owns a pixel, so nothing is exchanged; a warp reads 32 pixels"),)
# A thread's float64 tile takes twice the registers: half the columns, or half the rows where columns are the classes.


def choose(classes: int, class_stride: int, double: bool) -> Launch:
    """The first rung that the classes fit."""
    ladder = CONTIGUOUS if class_stride == 1 or classes == 1 else STRIDED
    found = next(rung for rung in ladder if classes <= rung.classes)
    if not double:
        return found
    rows = max(1, found.rows // 2)
    columns = found.columns if found.rows > 1 else found.columns // 2
    return Launch(found.classes, rows, columns, found.warps, found.reason)
