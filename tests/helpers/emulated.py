"""The CPU kernels as compiled for another processor, aarch64, and run by an emulator.

``Emulated`` has the functions of ``sparse_kernels._cpp`` that ``instruction_set`` tests call. Each sends its operands,
at their addresses here, to tests/arm/kernel_server.cpp as qemu runs it, and puts the results in their places.
"""

import ctypes
import fcntl
import functools
import math
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sparse_kernels.backends import cpp, cpp_direct
from sparse_kernels.types import WEIGHABLE

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
# setup.py's, but for optimisation: it takes longer than it saves.
FLAGS = "-std=c++17 -O1 -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror -DSPARSE_KERNELS_NEON"
FLAGS += " -ffp-contract=off -fopenmp -static"
ITEM = (4, 2, 2, 8)  # bytes of a logit, by row_stats.h's DType
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "neon")  # instruction_set.h's, in order
CALLS = (
    "set_instruction_set", "row_stats", "gate_rows", "row_stats_backward", "count_flags", "compact", "gather_rows",
    "scatter_rows",
)  # fmt: skip
IN_USE = None if cpp.unavailable_reason() else cpp._cpp.instruction_set()
MOST = 2**30  # bytes of an operand


def each(names: Sequence[str] = INSTRUCTION_SETS) -> list[Any]:
    """Return a parameter for each instruction set; all but the one in use are the same with every PyTorch."""
    return [name if name == IN_USE else pytest.param(name, marks=pytest.mark.any_pytorch) for name in names]


def unavailable_reason() -> str | None:
    """Return what is missing here to compile for aarch64 and to run it."""
    return next((f"no {tool}" for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None), None)


@functools.cache
def program() -> Path:
    """Return the server, built again if a source is newer; one process builds, others wait."""
    folder = ROOT / "build" / "arm"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [ROOT / "tests" / "arm" / "kernel_server.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    sources = [path for path in sources if "_avx" not in path.name]
    read = [*sources, *(ROOT / "csrc").rglob("*.h"), Path(__file__)]
    server = folder / "kernel_server"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not server.exists() or server.stat().st_mtime < max(path.stat().st_mtime for path in read):
            include = f"-I{ROOT / 'csrc' / 'include'}"
            subprocess.run([COMPILER, *FLAGS.split(), include, *map(str, sources), "-o", str(server)], check=True)
    return server


class Request:
    """A call's operands, in the order in which the server reads them."""

    def __init__(self, call: str) -> None:
        self.sent = [struct.pack("<q", CALLS.index(call))]
        self.places: list[tuple[int, int]] = []  # address and size of each operand in memory

    def integers(self, *values: int) -> None:
        self.sent.append(struct.pack(f"<{len(values)}q", *((value + 2**63) % 2**64 - 2**63 for value in values)))

    def reals(self, *values: float) -> None:
        self.sent.append(struct.pack(f"<{len(values)}d", *values))

    def memory(self, address: int, size: int) -> None:
        if not address:
            self.integers(-1)
            return
        if size > MOST:
            pytest.skip("no 9 GB of address space in an emulator")
        self.integers(size)
        self.sent.append(ctypes.string_at(address, size))
        self.places.append((address, size))

    def layout(self, rows: int, layout: tuple[int, ...]) -> None:
        class_stride, *strides = layout
        self.integers((len(strides) + 1) // 2, class_stride)
        for size, stride in dimensions(rows, layout):
            self.integers(size, stride)


def dimensions(rows: int, layout: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return size and stride of each dimension of the rows, from ``cpp._layout``'s numbers."""
    _, outermost, *rest = layout
    inner = list(zip(rest[::2], rest[1::2], strict=True))
    return [(rows // max(1, math.prod(size for size, _ in inner)), outermost), *inner]


def span(rows: int, classes: int, layout: tuple[int, ...]) -> int:
    """Return the number of elements from the first logit to the last."""
    if rows == 0:
        return 0
    return 1 + (classes - 1) * layout[0] + sum((size - 1) * stride for size, stride in dimensions(rows, layout))


class Emulated:
    """``sparse_kernels._cpp``'s functions, run by an emulator."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([EMULATOR, str(program())], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.in_use = "neon"

    def ask(self, request: Request) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"".join(request.sent))
        self.process.stdin.flush()
        (result,) = struct.unpack("<q", self._read(8))
        for address, size in request.places:
            ctypes.memmove(address, self._read(size), size)
        return int(result)

    def _read(self, size: int) -> bytes:
        assert self.process.stdout is not None
        found = self.process.stdout.read(size)
        assert len(found) == size, f"the emulated kernels ended with status {self.process.wait()}"
        return found

    def instruction_set(self) -> str:
        return self.in_use

    def set_instruction_set(self, name: str) -> None:
        request = Request("set_instruction_set")
        request.integers(INSTRUCTION_SETS.index(name))
        assert self.ask(request) == INSTRUCTION_SETS.index("neon")  # the widest that it has
        self.in_use = name

    def row_stats(self, *arguments: Any) -> int:
        *scored, outputs = arguments
        request = Request("row_stats")
        self._input(request, *scored)
        self._outputs(request, scored[1], scored[2], outputs)
        return self.ask(request)

    def gate_rows(self, *arguments: Any) -> int:
        *scored, outputs, mask, significance, weight, offset, weights, threshold, invalid = arguments
        _, dtype, rows, *_, settings = scored
        real = 8 if ITEM[dtype] == 8 else 4
        request = Request("gate_rows")
        self._input(request, *scored)
        self._outputs(request, dtype, rows, outputs)
        request.reals(*settings[4:6])
        seed, step = settings[6:]
        request.integers(seed, step if isinstance(step, int) else 0)  # as csrc/bindings/settings.h reads it
        request.memory(mask, rows)
        request.memory(significance, real * rows)
        request.memory(weight, 4 * rows)
        request.memory(offset, real * rows)
        request.reals(*(weights.get(name, 0.0) for name in WEIGHABLE))
        number = ctypes.c_double if real == 8 else ctypes.c_float
        request.reals(number.from_address(threshold).value)
        request.memory(invalid, 4)
        return self.ask(request)

    def row_stats_backward(self, *arguments: Any) -> None:
        *scored, gradient, layout, maximum, total, entropy, of_loss, of_entropy, zeroed = arguments
        logits, dtype, rows, classes, *_ = scored
        request = Request("row_stats_backward")
        self._input(request, *scored)
        request.layout(rows, layout)
        request.memory(0 if gradient == logits else gradient, ITEM[dtype] * span(rows, classes, layout))
        for address in (maximum, total, entropy, of_loss, of_entropy):
            request.memory(address, (8 if ITEM[dtype] == 8 else 4) * rows)
        request.integers(int(zeroed))
        self.ask(request)

    def count_flags(self, mask: int, rows: int) -> list[int]:
        request = Request("count_flags")
        request.integers(rows)
        request.memory(mask, rows)
        return [self.ask(request)]

    def compact(
        self, mask: int, weight_in: int, rows: int, counts: list[int], capacity: int, index: int, weight: int,
        count: int, overflow: int,
    ) -> None:  # fmt: skip
        request = Request("compact")
        request.integers(rows, capacity)
        request.memory(mask, rows)
        request.memory(weight_in, 4 * rows)
        request.memory(index, 8 * capacity)
        request.memory(weight, 4 * capacity)
        total = self.ask(request)
        assert not counts or total == sum(counts)
        ctypes.c_int32.from_address(count).value = min(total, capacity)
        ctypes.c_int32.from_address(overflow).value = max(0, total - capacity)

    def gather_rows(self, moves: tuple[int, ...], index: int, slots: int, rows: int) -> int:
        return self._move("gather_rows", moves, index, slots, rows, rows, slots)

    def scatter_rows(self, moves: tuple[int, ...], index: int, slots: int, rows: int) -> int:
        return self._move("scatter_rows", moves, index, slots, rows, slots, rows)

    def _move(
        self, call: str, moves: tuple[int, ...], index: int, slots: int, rows: int, in_rows: int, out_rows: int
    ) -> int:
        request = Request(call)
        request.integers(slots, rows)
        request.memory(index, 8 * slots)
        request.integers(len(moves) // 4)
        for i in range(0, len(moves), 4):
            source, stride, out, row_bytes = moves[i : i + 4]
            request.integers(stride, row_bytes)
            request.memory(source, (in_rows - 1) * stride + row_bytes if in_rows else 0)
            request.memory(out, out_rows * row_bytes)
        return self.ask(request)

    def _input(
        self, request: Request, logits: int, dtype: int, rows: int, classes: int, layout: tuple[int, ...],
        targets: int, targets_are_int32: bool, settings: tuple[Any, ...],
    ) -> None:  # fmt: skip
        request.integers(dtype, rows, classes)
        request.layout(rows, layout)
        request.memory(logits, ITEM[dtype] * span(rows, classes, layout))
        request.integers(targets_are_int32)
        request.memory(targets, (4 if targets_are_int32 else 8) * rows)
        request.reals(*settings[:3])
        request.integers(settings[3])

    def _outputs(self, request: Request, dtype: int, rows: int, outputs: tuple[int, ...]) -> None:
        addresses = outputs or (0,) * (len(WEIGHABLE) + 3)
        for place, address in enumerate(addresses):
            is_argmax = place == len(WEIGHABLE)
            request.memory(address, (8 if is_argmax or ITEM[dtype] == 8 else 4) * rows)


@functools.cache
def _server() -> Emulated:
    return Emulated()


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Let the C++ backend use an instruction set, emulated where it is NEON and this processor has none."""
    if cpp.unavailable_reason():
        pytest.skip(str(cpp.unavailable_reason()))
    with pytest.MonkeyPatch.context() as patch:
        if name not in cpp._cpp.instruction_sets():
            if name != "neon":
                pytest.skip(f"this processor has no {name}")
            if unavailable_reason():
                pytest.skip(str(unavailable_reason()))
            patch.setattr(cpp, "_cpp", _server())
            patch.setattr(cpp_direct, "AVAILABLE", False)
        before = cpp._cpp.instruction_set()
        cpp._cpp.set_instruction_set(name)
        yield
        cpp._cpp.set_instruction_set(before)
