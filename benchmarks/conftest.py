"""Interleaved timing for every benchmark, one table at the end, and a JSON record.

    pytest benchmarks --benchmark-only                     print
    pytest benchmarks --benchmark-only --record            also write benchmarks/results/<device>-<date>.json

Only ratios are worth anything: all sides of a benchmark are timed in one process, one call of each
in turn, and compared by their medians.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import sparse_kernels

RESULTS = Path(__file__).parent / "results"


@dataclass
class Row:
    """One benchmark: seconds of a call of each side, and how many times ours goes into each peer's."""

    case: str
    seconds: dict[str, dict[str, float]]  # side -> p20, p50, p80
    ratios: dict[str, float]  # peer -> peer's median / ours
    targets: dict[str, float]  # the ratios that must be reached, by their names
    notes: dict[str, Any] = field(default_factory=dict)


_rows: list[Row] = []


def quantiles(samples: list[float]) -> dict[str, float]:
    ordered = sorted(samples)

    def at(q: float) -> float:
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    return {"p20": at(0.2), "p50": statistics.median(ordered), "p80": at(0.8)}


@pytest.fixture
def interleaved(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., Row]:
    """Times ``ours`` and every peer in turn, each ``calls`` times a round."""

    def run(
        ours: Callable[[], Any],
        peers: dict[str, Callable[[], Any]],
        *,
        targets: dict[str, float] | None = None,
        rounds: int = 15,
        calls: int = 1,
        notes: dict[str, Any] | None = None,
    ) -> Row:
        samples: dict[str, list[float]] = {"ours": [], **{name: [] for name in peers}}

        def time_side(name: str, side: Callable[[], Any]) -> None:
            start = time.perf_counter()
            for _ in range(calls):
                side()
            samples[name].append((time.perf_counter() - start) / calls)

        for side in (ours, *peers.values()):  # warm: compile, page in
            side()
            side()
        benchmark.pedantic(
            lambda: time_side("ours", ours),
            setup=lambda: [time_side(name, peer) for name, peer in peers.items()] and None,
            rounds=rounds,
        )
        seconds = {name: quantiles(values) for name, values in samples.items()}
        ratios = {name: seconds[name]["p50"] / seconds["ours"]["p50"] for name in peers}
        if compiled := [ratio for name, ratio in ratios.items() if name.startswith("compiled")]:
            ratios["best compiled"] = min(compiled)
        row = Row(request.node.callspec.id, seconds, ratios, targets or {}, notes or {})
        benchmark.extra_info.update(asdict(row))
        _rows.append(row)
        return row

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write benchmarks/results/<device>-<date>.json")


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sparse_kernels": sparse_kernels.__version__,
        "backends": {
            op: f"{entry['active']} ({entry['detail']})" for op, entry in sparse_kernels.backend_info().items()
        },
    }


_machine = machine()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _rows:
        return
    write = terminalreporter.write_line
    terminalreporter.section("how many times faster than each peer (medians, interleaved)")
    for row in _rows:
        ratios = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in row.ratios.items())
        write(f"{row.case}: {ratios}")
        for name, wanted in row.targets.items():
            reached = row.ratios[name]
            write(f"    {'met   ' if reached >= wanted else 'MISSED'} {name}: {reached:.2f}, wanted {wanted}")
        for name, value in row.notes.items():
            write(f"    {name}: {value}")
    if config.getoption("--record"):
        date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
        device = torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "cpu"
        path = RESULTS / f"{device}-{date}.json"
        record = {"created": date, "machine": _machine, "rows": [asdict(row) for row in _rows]}
        path.write_text(json.dumps(record, indent=1) + "\n")
        write(f"written: {path}")
