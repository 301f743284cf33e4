"""Table of the comparisons: one function for each operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from sparse_kernels.self_check import control, moves, scores
from sparse_kernels.self_check.comparisons import Comparison
from sparse_kernels.self_check.scores import Setup

CASES: dict[str, Callable[[Setup], Iterator[Comparison]]] = {
    "row_stats": scores.row_stats,
    "gate_rows": scores.gate_rows,
    "compact": moves.compact,
    "gather_rows": moves.gather_rows,
    "scatter_rows": moves.scatter_rows,
    "control": control.control,
    "select": control.select,
    "gate_step": control.gate_step,
}
# Logits' dtypes, each of which has kernels of its own. The other operations move bytes or compute in float32.
SCORED = ("row_stats", "gate_rows", "select", "gate_step")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STEP_DTYPES = DTYPES[:3]  # a controller's state is float32


def dtypes(op: str) -> tuple[torch.dtype | None, ...]:
    """Return the dtypes of logits that an operation has kernels for; None for an operation without logits.

    Args:
        op: the operation.
    """
    if op not in SCORED:
        return (None,)
    return STEP_DTYPES if op in ("select", "gate_step") else DTYPES


def comparisons(
    op: str, backend: Any, device: torch.device, dtype: torch.dtype | None, *, full: bool = False, seed: int = 0
) -> Iterator[Comparison]:
    """Yield the comparisons of one operation of a backend with the float64 reference, launch by launch.

    Args:
        op: the operation.
        backend: the backend's module.
        device: to run on.
        dtype: of the logits; None for an operation without.
        full: compare everything. Default: only what the first use of a kernel can wait for.
        seed: of the inputs. Default: 0.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    yield from CASES[op](Setup(backend, device, dtype or torch.float32, generator, full))
