"""Interleaved timing for every benchmark, one table at the end, and a JSON record.

pytest benchmarks --benchmark-only                     print
pytest benchmarks --benchmark-only --record            also write benchmarks/results/<device>-<date>.json
pytest benchmarks --small                              every line once on tiny sizes: no speed, nothing recorded
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peers
import pytest
import timing
import torch
from timing import Row

import sparse_kernels
from sparse_kernels import keep_freed_memory

_rows: list[Row] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write benchmarks/results/<device>-<date>.json")
    parser.addoption("--small", action="store_true", help="tiny sizes, one round, nothing compiled or recorded")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "keeps_freed_memory: as `sparse-train` has it; see keep_freed_memory")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("keeps_freed_memory") is not None)  # there is no way back


@pytest.fixture(autouse=True)
def _allocator(request: pytest.FixtureRequest) -> None:
    """The C library's defaults, which charge a side for the memory it takes, or memory that is kept once used.

    The second is for sides that take the same memory, of which the system takes back whose it happens to: of two
    equal copies of 5 MB one was then three times as fast, in one process in two the one, in the next the other.
    """
    if request.node.get_closest_marker("keeps_freed_memory"):
        keep_freed_memory()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(request: pytest.FixtureRequest) -> bool:
    """Whether the benchmark only has to run, not to measure."""
    return bool(request.config.getoption("--small"))


@pytest.fixture
def with_compiled(small: bool) -> Callable[..., Any]:
    """``peers.with_compiled``, without code generation where nothing is measured."""
    return lambda forms: peers.with_compiled(forms, **({"backend": "eager"} if small else {}))


@pytest.fixture
def interleaved(benchmark: Any, request: pytest.FixtureRequest, small: bool) -> Callable[..., Row]:
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
        timer = timing.Cpu()
        if small:
            rounds = calls = 1

        def time_side(name: str, side: Callable[[], Any]) -> None:
            samples[name].append(timer.time(side, calls)())

        for side in (ours, *peers.values()):  # warm: compile, page in
            side()
            side()
        benchmark.pedantic(
            lambda: time_side("ours", ours),
            setup=lambda: [time_side(name, peer) for name, peer in peers.items()] and None,
            rounds=rounds,
        )
        seconds = {name: timing.quantiles(values) for name, values in samples.items()}
        row = Row(request.node.callspec.id, seconds, timing.ratios(seconds), targets or {}, notes or {})
        benchmark.extra_info.update(asdict(row))
        _rows.append(row)
        return row

    return run


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
        "peers": peers.versions(),
        "backends": {
            op: f"{entry['active']} ({entry['detail']})" for op, entry in sparse_kernels.backend_info().items()
        },
    }


_machine = machine()


def flops_per_second() -> float:
    """Of a float32 matrix product, all threads: what the roofline calls the arithmetic's limit."""
    a = torch.randn(1024, 1024)
    seconds = timing.interleave(timing.Cpu(), {"ours": lambda: a @ a}, rounds=15)["ours"]["p20"]
    return 2 * 1024**3 / seconds


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _rows:
        return
    write = terminalreporter.write_line
    terminalreporter.section("how many times faster than each peer (medians, interleaved)")
    for row in _rows:
        for line in row.lines():
            write(line)
    if config.getoption("--record") and not config.getoption("--small"):
        path = timing.record_path("cpu")
        timing.write_record(path, _machine | {"flops_per_second": flops_per_second()}, _rows)
        write(f"written: {path}")
