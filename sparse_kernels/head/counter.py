"""Counter of the rows that a head multiplies by its weight."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class MultipliedRows:
    """Rows that heads have multiplied by their weights while the counter was open.

    Attributes:
        scored: rows whose logits were computed for their statistics: one matrix product each.
        differentiated: rows whose gradient was taken: two products each.
        recomputed: rows whose logits were computed again for their gradient: one product each.
    """

    scored: int = 0
    differentiated: int = 0
    recomputed: int = 0

    @property
    def products(self) -> int:
        """Row-by-weight products in all; a dense head needs three a row."""
        return self.scored + self.recomputed + 2 * self.differentiated


_open: list[MultipliedRows] = []


@contextlib.contextmanager
def count_multiplied_rows() -> Iterator[MultipliedRows]:
    """Count the rows that every head of this process multiplies inside the block, its backward passes included.

    Compiled heads count too. Nothing is read from a device.

    Example:
        >>> with count_multiplied_rows() as rows:
        ...     linear_row_stats(hidden, weight, target).loss.mean().backward()
        >>> print(rows.scored, rows.differentiated)
    """
    counter = MultipliedRows()
    _open.append(counter)
    try:
        yield counter
    finally:
        _open[:] = [other for other in _open if other is not counter]


def count(*, scored: int = 0, differentiated: int = 0, recomputed: int = 0) -> None:
    """Add to every open counter.

    Args:
        scored: rows.
        differentiated: rows.
        recomputed: rows.
    """
    for counter in _open:
        counter.scored += scored
        counter.differentiated += differentiated
        counter.recomputed += recomputed
