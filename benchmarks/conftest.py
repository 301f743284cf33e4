"""Interleaved timing for every benchmark, one table at the end, and a JSON record.

pytest benchmarks --benchmark-only                     print
pytest benchmarks --benchmark-only --record            also write benchmarks/results/<device>-<date>.json, case by case
pytest benchmarks --benchmark-only --record --resume   only the cases that this record does not have yet
pytest benchmarks --small                              every line once on tiny sizes: no speed, nothing recorded
"""

from __future__ import annotations

import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Sequence
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
BUDGET = 10.0  # seconds of a case's rounds, of which there are 3 at least: all cases together take 25 minutes


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record", nargs="?", const=timing.record_path("cpu"), type=Path, metavar="FILE",
        help="write FILE, by default benchmarks/results/<device>-<date>.json",
    )  # fmt: skip
    parser.addoption("--resume", action="store_true", help="leave out the cases that the record already has")
    parser.addoption("--small", action="store_true", help="tiny sizes, one round, nothing compiled or recorded")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "keeps_freed_memory: as `sparse-train` has it; see keep_freed_memory")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--resume"):
        done = timing.recorded(config.getoption("--record") or timing.record_path("cpu"))
        items[:] = [item for item in items if not any(is_case(item, case) for case in done)]
    # Last, since there is no way back: memory that is kept, and a driver that launches nothing, under which a package's
    # Triton kernels would seem to run.
    items.sort(key=lambda item: (item.name.startswith("test_overhead_of_a_call_on_a_gpu"), kept(item)))


def kept(item: pytest.Item) -> bool:
    """Whether a benchmark's process keeps the memory that it frees."""
    return item.get_closest_marker("keeps_freed_memory") is not None


def is_case(item: pytest.Item, case: str) -> bool:
    """Whether a row of a record is a benchmark's; one of several has a name that goes on."""
    return f"{case}-".startswith(f"{item.callspec.id}-")


@pytest.fixture(autouse=True)
def _allocator(request: pytest.FixtureRequest) -> None:
    """The C library's defaults, which charge a side for the memory it takes, or memory that is kept once used.

    The second is for sides that take the same memory, of which the system takes back whose it happens to: of two
    equal copies of 5 MB one was then three times as fast, in one process in two the one, in the next the other.
    """
    if kept(request.node):
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
def interleaved(benchmark: Any, request: pytest.FixtureRequest, small: bool) -> Iterator[Callable[..., Row]]:
    """Times ``ours`` and every peer in turn, each ``calls`` times a round, in an order of its own every round.

    A side that always followed the same other would always find in the caches what that one left there. With
    ``places``, calls that give the sides the same data in other memory, the rounds are divided among them and compared
    in pairs.
    """
    made: list[Row] = []

    def run(
        ours: Callable[[], Any],
        peers: dict[str, Callable[[], Any]],
        *,
        targets: dict[str, float] | None = None,
        rounds: int = 15,
        calls: int = 1,
        places: Sequence[Callable[[], Any]] = (),
        notes: dict[str, Any] | None = None,
    ) -> Row:
        sides = {"ours": ours, **peers}
        samples: dict[str, list[float]] = {name: [] for name in sides}
        timer = timing.Cpu()
        if small:
            rounds = calls = 1
        for side in sides.values():  # compile, page in
            if timer.time(side)() < 1.0:
                side()

        def time_all() -> None:
            order, began = random.Random(0), time.perf_counter()
            for done in range(rounds):
                if done >= 3 and time.perf_counter() - began > BUDGET:
                    break
                if places:
                    places[done * len(places) // rounds]()
                for name in order.sample(list(sides), len(sides)):
                    samples[name].append(timer.time(sides[name], calls)())

        benchmark.pedantic(time_all, rounds=1)
        seconds = {name: timing.quantiles(values) for name, values in samples.items()}
        notes = {**(notes or {}), "rounds": len(samples["ours"])}
        ratios = timing.ratios_in_pairs(samples) if places else timing.ratios(seconds)
        made.append(Row(request.node.callspec.id, seconds, ratios, targets or {}, notes))
        return made[-1]

    yield run
    for row in made:  # now, because a benchmark may have added to it
        benchmark.extra_info.update(asdict(row))
    add_rows(made, request.config)


def add_rows(rows: list[Row], config: pytest.Config) -> None:
    """Keep rows for the summary, and write them where the run is recorded: what is done is not lost."""
    _rows.extend(rows)
    if rows and config.getoption("--record") and not config.getoption("--small"):
        if "flops_per_second" not in _machine:
            _machine["flops_per_second"] = flops_per_second()
        timing.write_record(config.getoption("--record"), _machine, rows)


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
    """Of a float32 matrix product, all threads: what the roofline calls the arithmetic's limit.

    The faster of PyTorch's two. MKL's leaves half of AVX-512 unused on processors that are not Intel's; oneDNN's, which
    serves convolutions of one pixel, does not.
    """
    size = 1024
    a = torch.randn(size, size)
    images = torch.randn(1, size, 32, 32).to(memory_format=torch.channels_last)
    products = {"ours": lambda: a @ a, "convolution": lambda: torch.conv2d(images, a.view(size, size, 1, 1))}
    seconds = timing.interleave(timing.Cpu(), products, rounds=15)
    return 2 * size**3 / min(side["p20"] for side in seconds.values())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _rows:
        return
    write = terminalreporter.write_line
    terminalreporter.section("how many times faster than each peer (medians, interleaved)")
    for row in _rows:
        for line in row.lines():
            write(line)
    if config.getoption("--record") and not config.getoption("--small"):
        write(f"written: {config.getoption('--record')}")
