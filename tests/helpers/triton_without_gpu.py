"""Triton's compiler for GPUs that are not here: the host code of a call runs on CPU tensors, up to the launch.

A process that interprets cannot compile: this is for processes without TRITON_INTERPRET. Nothing here depends on the
version of Triton, from 3.2 on.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


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
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return self.launch


def without_gpu(arch: int, launch: Callable[..., None] = lambda *arguments: None) -> None:
    """Compile from now on for ``arch``; a launch calls ``launch`` with all that Triton's own launcher is given."""
    driver.set_active(Driver(arch, launch))


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def disassembled(cubin: bytes, *options: str) -> str:
    """Return what cuobjdump says of a kernel: its machine code with ``-sass``, its registers with ``-res-usage``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("cuobjdump"), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(cubin: bytes) -> list[str]:
    """Return a kernel's machine instructions in the order in which they lie in memory, each with its predicate."""
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", disassembled(cubin, "-sass"), flags=re.MULTILINE)
