"""Triton's compiler for GPUs that are not here: the host code of a call runs on CPU tensors, up to the launch.

A process that interprets cannot compile: this is for processes without TRITON_INTERPRET. Nothing here depends on the
version of Triton, from 3.2 on.
"""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

INSTRUCTION = 16  # bytes, from 7.0 on
EXECUTED = 4  # flag of a section in an ELF file


class Driver:
    """Triton's driver of a GPU that is not here: what is launched is handed to ``launch``, and nothing runs."""

    def __init__(self, arch: int, launch: Callable[..., None] = lambda *arguments: None) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 2**20, "multiprocessor_count": 132},
            load_binary=lambda *arguments: (1, 1, 0, 0) + (() if triton.__version__ < "3.3" else (1024,)),
            unload_module=lambda module: None,
        )
        self.launch = launch

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # by which a process keeps what it has compiled

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return self.launch


def without_gpu(arch: int, launch: Callable[..., None] = lambda *arguments: None) -> None:
    """Compile from now on for ``arch``; a launch calls ``launch`` with all that Triton's own launcher is given."""
    driver.set_active(Driver(arch, launch))


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _printed(name: str, *options: str, of: bytes) -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(of)
        file.flush()
        return subprocess.run([tool(name), *options, file.name], capture_output=True, text=True, check=True).stdout


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """Return a thread's registers, and the bytes that it spills."""
    printed = _printed("cuobjdump", "-res-usage", of=cubin)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", printed).groups()  # type: ignore[union-attr]
    return int(registers), int(stack)


def instructions(arch: int, cubins: list[bytes]) -> list[list[str]]:
    """Return kernels' machine instructions in the order in which they lie in memory, each with its predicate.

    All in one run: the disassembler takes a quarter of a second to begin. It goes on counting from kernel to kernel,
    which shows in the targets of branches.
    """
    if not cubins:
        return []
    codes = [_code(cubin) for cubin in cubins]
    printed = _printed("nvdisasm", "--binary", f"SM{arch}{'a' if arch >= 90 else ''}", of=b"".join(codes))
    every = iter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", printed, flags=re.MULTILINE))
    found = [list(itertools.islice(every, len(code) // INSTRUCTION)) for code in codes]
    assert next(every, None) is None
    assert [len(code) for code in codes] == [INSTRUCTION * len(listed) for listed in found]
    return found


def _code(cubin: bytes) -> bytes:
    """Return what an ELF file's sections of instructions hold."""
    (offset,), (size, count) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, offset + size * number) for number in range(count)]
    return b"".join(cubin[start:][:length] for _, _, flags, _, start, length in sections if flags & EXECUTED)
