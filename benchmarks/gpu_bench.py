"""How one row of ``gpu.py bench`` is measured: sizes, timers, agreement, CUDA graphs; and the table of all cases."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peers
import timing
import torch
from timing import Row, Side
from torch import Tensor

import sparse_kernels as sk
from sparse_kernels import _dispatch

CASES: dict[str, Callable[[Bench, str], Row]] = {}


RATE = 0.1


@dataclass
class Bench:
    """Where and how large: ``small`` sizes only show that every line runs."""

    device: torch.device
    small: bool = False
    budget: float = 12.0  # seconds for the rounds of one row
    timer: timing.Cpu | timing.Cuda = field(init=False)

    def __post_init__(self) -> None:
        self.timer = timing.Cuda() if self.device.type == "cuda" else timing.Cpu()
        self._source = torch.empty(1 << (16 if self.small else 30), dtype=torch.uint8, device=self.device)
        self._target = torch.empty_like(self._source)

    def backend(self, op: str) -> str | None:
        """The one that is to be measured on a GPU; elsewhere, whichever comes first."""
        if self.device.type != "cuda":
            return None
        return "triton" if op in ("row_stats", "gate_rows") else "cuda"

    def served(self) -> contextlib.AbstractContextManager[None]:
        """Within it the kernels for a GPU serve what is called without a name."""
        return _dispatch.forced("gpu") if self.device.type == "cuda" else contextlib.nullcontext()

    def shape(self, *sizes: int) -> tuple[int, ...]:
        return tuple(min(size, 16) for size in sizes) if self.small else sizes

    def rows(self, *sizes: int, dtype: torch.dtype, dim: int = -1) -> tuple[Tensor, Tensor]:
        """Logits of that shape and labels."""
        torch.manual_seed(0)
        sizes = self.shape(*sizes)
        dim %= len(sizes)
        logits = torch.empty(sizes, dtype=dtype, device=self.device).normal_(std=2.0)
        labels = torch.randint(0, sizes[dim], sizes[:dim] + sizes[dim + 1 :], device=self.device)
        return logits, labels

    def compiled(self, forms: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
        return peers.with_compiled(forms, **({"backend": "eager"} if self.small else {}))

    def measure(
        self,
        case: str,
        ours: Side,
        sides: dict[str, Side],
        *,
        moved: int,
        targets: dict[str, float],
        notes: dict[str, Any] | None = None,
    ) -> Row:
        """Time all sides, and a copy; ``moved``: the bytes that ours must move."""
        everything = {"ours": ours, **sides, "copy": lambda: self._target.copy_(self._source)}
        rounds, budget = (1, 0.0) if self.small else (101, self.budget)
        seconds = timing.interleave(self.timer, everything, rounds=rounds, budget=budget)
        found = timing.ratios(seconds)
        del found["copy"]
        bandwidth = 2 * self._source.numel() / seconds["copy"]["p50"]
        speed = moved / seconds["ours"]["p50"]
        found["share of copy"] = speed / bandwidth
        rates = {"bytes": moved, "bytes per second": speed, "copy, bytes per second": bandwidth}
        return Row(case, seconds, found, targets, rates | (notes or {}))


def case(name: str) -> Callable[[Callable[[Bench, str], Row]], Callable[[Bench, str], Row]]:
    def register(function: Callable[[Bench, str], Row]) -> Callable[[Bench, str], Row]:
        CASES[name] = function
        return function

    return register


def agree(name: str, ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """No speed-up is recorded unless the results agree, to a share of the largest value."""
    tolerance = 1e-4 if dtype is torch.float32 else 0.03
    largest = float(ours.float().abs().max())
    torch.testing.assert_close(
        ours.float(), theirs.float(), rtol=tolerance, atol=tolerance * largest, msg=lambda m: f"{name}: {m}"
    )


def captured(bench: Bench, call: Side) -> Side:
    """A CUDA graph's replay of the call; elsewhere the call itself."""
    if bench.device.type != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def launches(bench: Bench, call: Side) -> int | None:
    """Kernels, copies and fills that a call starts on the device; None elsewhere."""
    if bench.device.type != "cuda":
        return None
    call()  # what is done once
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def waits(bench: Bench, call: Side) -> str:
    """Whether the host waits for the device in a call: ``no``, or where."""
    if bench.device.type != "cuda":
        return "not looked for"
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return f"yes: {str(error).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no"


def run(bench: Bench, name: str) -> Row:
    """One case; what stops it becomes its note, but for a device that no longer answers."""
    wanted: dict[str, Any] = {}
    try:
        return CASES[name](bench, name)
    except sk.BackendUnavailable as error:
        wanted["not served"] = str(error)
    except peers.Missing as error:
        wanted["left out"] = str(error)
    except Exception as error:
        wanted["failed"] = f"{type(error).__name__}: {error}"[:500]
        if "CUDA error" in str(error):
            raise Lost(Row(name, {}, {}, {}, wanted)) from error
    finally:
        if bench.device.type == "cuda":
            with contextlib.suppress(Exception):
                torch.cuda.empty_cache()
    return Row(name, {}, {}, {}, wanted)


class Lost(Exception):
    """The device gives errors from here on in this process; ``row`` is the case that it happened in."""

    def __init__(self, row: Row) -> None:
        super().__init__(row.notes["failed"])
        self.row = row
