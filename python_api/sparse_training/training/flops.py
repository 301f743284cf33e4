"""Counts of floating-point operations.

PyTorch's own counter counts matrix products, convolutions and attention, forward and backward, two operations per
multiply-add, scoring included. Counting slows a step down several times. So only the first steps of each kind are
counted, until two numbers of rows are known; the others follow from these, because a model's operations are linear in
its rows.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Run compiled models eagerly: the counter does not see the kernels of a compiled graph."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and set_stance would import the compiler
        return contextlib.nullcontext()
    eager: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager


class Operations:
    """Floating-point operations by kind of work, counted for the first two numbers of rows and interpolated after.

    Attributes:
        known: for each kind of work, the counted operations by number of rows.
        total: operations so far, by kind: "score" and "train".
    """

    def __init__(self) -> None:
        self.known: dict[str, dict[int, int]] = {}
        self.total: dict[str, float] = {}

    @contextmanager
    def of(self, kind: str, rows: int, part: str = "") -> Iterator[None]:
        """Count the work done in this context.

        Args:
            kind: "score" or "train".
            rows: number of rows that the work is on.
            part: separates works of one kind that cost differently, such as the scoring of two policies.
        """
        known = self.known.setdefault(f"{kind} {part}", {})
        if rows not in known and len(known) < 2:
            with _uncompiled(), FlopCounterMode(display=False) as counter:
                yield
            known[rows] = int(counter.get_total_flops())
        else:
            yield
        self.total[kind] = self.total.get(kind, 0.0) + self._expected(known, rows)

    @staticmethod
    def _expected(known: Mapping[int, int], rows: int) -> float:
        if rows in known or len(known) < 2:
            return float(known.get(rows, 0))
        (a, at_a), (b, at_b) = known.items()
        return at_a + (at_b - at_a) * (rows - a) / (b - a)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, for a checkpoint."""
        return {"known": self.known, "total": self.total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self.known = {kind: dict(known) for kind, known in state["known"].items()}
        self.total = dict(state["total"])
