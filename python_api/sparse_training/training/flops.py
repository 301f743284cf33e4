"""Floating-point operations, counted."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """A compiled graph calls kernels that the counter does not see."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and asking would import the compiler
        return contextlib.nullcontext()
    eager: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager


class Operations:
    """Floating-point operations by kind of work, counted for its first numbers of rows and then known.

    Attributes:
        total: operations so far, by kind.
    """

    def __init__(self) -> None:
        self.known: dict[str, dict[int, int]] = {}  # kind -> rows -> operations
        self.total: dict[str, float] = {}

    @contextmanager
    def of(self, kind: str, rows: int, part: str = "") -> Iterator[None]:
        """Around work of that kind on so many rows; ``part`` tells apart what differs within a kind."""
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
        return {"known": self.known, "total": self.total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.known = {kind: dict(known) for kind, known in state["known"].items()}
        self.total = dict(state["total"])
