"""What every benchmark records, how it is timed and how it is written. Only the standard library and torch.

Only ratios are worth anything: all sides of a benchmark are timed in one process, one call of each in
turn, and compared by their medians.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
Side = Callable[[], Any]


@dataclass
class Row:
    """One benchmark: seconds of a call of each side, and how many times ours goes into each peer's."""

    case: str
    seconds: dict[str, dict[str, float]]  # side -> p20, p50, p80
    ratios: dict[str, float]  # peer -> peer's median / ours
    targets: dict[str, float]  # the ratios that must be reached, by their names
    notes: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For a terminal: the ratios, then each target and whether it was met."""
        found = [f"{self.case}: " + "  ".join(f"{name} {ratio:.2f}x" for name, ratio in self.ratios.items())]
        for name, wanted in self.targets.items():
            if name not in self.ratios:
                found.append(f"    absent {name}: wanted {wanted}")
                continue
            reached = self.ratios[name]
            found.append(f"    {'met   ' if reached >= wanted else 'MISSED'} {name}: {reached:.2f}, wanted {wanted}")
        return found + [f"    {name}: {value}" for name, value in self.notes.items()]


def quantiles(samples: list[float]) -> dict[str, float]:
    ordered = sorted(samples)

    def at(q: float) -> float:
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    return {"p20": at(0.2), "p50": statistics.median(ordered), "p80": at(0.8)}


def ratios(seconds: dict[str, dict[str, float]]) -> dict[str, float]:
    """Each peer's median over ours; of the ``compiled`` and the ``read`` sides the fastest besides."""
    found = {name: side["p50"] / seconds["ours"]["p50"] for name, side in seconds.items() if name != "ours"}
    for prefix, best in (("compiled", "best compiled"), ("read", "fastest read")):
        if some := [ratio for name, ratio in found.items() if name.startswith(prefix)]:
            found[best] = min(some)
    return {name: ratio for name, ratio in found.items() if not name.startswith("read")}


def ratios_in_pairs(samples: dict[str, list[float]]) -> dict[str, float]:
    """As :func:`ratios`, but each peer's by the median of its times over ours of the same round.

    For rounds of several levels: the medians of two such mixtures may be of different levels.
    """
    relative = {
        name: {"p50": statistics.median(peer / own for peer, own in zip(values, samples["ours"], strict=True))}
        for name, values in samples.items()
    }
    return ratios(relative)


def reads(tensor: torch.Tensor) -> dict[str, Side]:
    """Reads of every byte of ``tensor`` (contiguous), for the bandwidth that the fastest of them reaches.

    No one reduction is the fastest everywhere; all see the bytes as float32, for 16-bit ones convert.
    """
    words = tensor.detach().view(-1).view(torch.float32)
    rows = words.view(-1, words.numel() // (1024 if words.numel() % 1024 == 0 else 1))
    ones = torch.ones(rows.shape[1], device=tensor.device)
    return {
        "read: sum": lambda: words.sum(),
        "read: amax": lambda: words.amax(),
        "read: matrix-vector product": lambda: torch.mv(rows, ones),
    }


class Cpu:
    """Times calls on the processor."""

    name = "cpu"

    def prepare(self) -> None:
        """Nothing: what a call finds in the caches is what the side before it left."""

    def time(self, side: Side, calls: int = 1) -> Callable[[], float]:
        start = time.perf_counter()
        for _ in range(calls):
            side()
        seconds = (time.perf_counter() - start) / calls
        return lambda: seconds


class Cuda:
    """Times calls on the GPU by its own events, each after the L2 cache was overwritten.

    The device sleeps first, so that the launches of a call are queued before its first kernel starts: what is
    timed is the device's work, and the host's only where a call waits for the device.
    """

    name = "cuda"
    SLEEP = 400_000  # cycles: about 0.2 ms

    def __init__(self) -> None:
        size = max(64 << 20, 4 * torch.cuda.get_device_properties(0).L2_cache_size)
        self._flush = torch.empty(size, dtype=torch.int8, device="cuda")

    def prepare(self) -> None:
        self._flush.zero_()
        torch.cuda._sleep(self.SLEEP)

    def time(self, side: Side, calls: int = 1) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            side()
        end.record()

        def seconds() -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / calls

        return seconds


def interleave(
    timer: Cpu | Cuda, sides: dict[str, Side], *, rounds: int, budget: float = float("inf"), warm: int = 2
) -> dict[str, dict[str, float]]:
    """Each side's quantiles over ``rounds``, or as many (3 at least) as fit ``budget`` seconds, once ``warm``."""
    for side in sides.values():  # compile, page in
        for _ in range(warm):
            side()
    samples: dict[str, list[float]] = {name: [] for name in sides}
    began = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - began > budget:
            break
        for name, side in sides.items():
            timer.prepare()
            samples[name].append(timer.time(side)())
    return {name: quantiles(values) for name, values in samples.items()}


def record_path(device: str) -> Path:
    return RESULTS / f"{device}-{today()}.json"


def recorded(path: Path) -> set[str]:
    """The cases of a record; none where there is no such file."""
    return {row["case"] for row in json.loads(path.read_text())["rows"]} if path.exists() else set()


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")


def write_record(path: Path, machine: dict[str, Any], rows: Iterable[Row], **more: Any) -> None:
    """Write rows as JSON; those of the file that were not measured again stay. Whole or not at all."""
    record = {"created": today(), "machine": machine, "rows": []}
    if path.exists():
        record = {**json.loads(path.read_text()), "created": record["created"], "machine": machine}
    merged = {row["case"]: row for row in record["rows"]} | {row.case: asdict(row) for row in rows}
    record = {**record, **more, "rows": list(merged.values())}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)
