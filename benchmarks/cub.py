"""CUB's own selection, compiled at run time with the nvcc at hand (cub_select.cu)."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peers import Missing
from torch import Tensor


def compile_library(folder: Path, *, architecture: str = "native") -> Path:
    """The shared library, from nvcc in CUDA_HOME or on PATH."""
    nvcc = shutil.which(f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc") or shutil.which("nvcc")
    if nvcc is None:
        raise Missing("CUB: no nvcc")
    target = folder / "libcub_select.so"
    source = Path(__file__).with_name("cub_select.cu")
    command = [nvcc, "-O3", "-std=c++17", f"-arch={architecture}", "-shared", "-Xcompiler", "-fPIC"]
    done = subprocess.run([*command, str(source), "-o", str(target)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing(f"CUB: nvcc failed: {done.stderr.strip().splitlines()[-1:]}")
    return target


@functools.cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:  # once loaded, the file may go
        return ctypes.CDLL(str(compile_library(Path(folder))))


def select(flags: Tensor) -> tuple[Callable[[], int], Tensor, Tensor]:
    """A call that fills what comes back beside it: int64 [rows] indices and the int32 count."""
    if not flags.is_cuda:
        raise Missing("CUB: needs a GPU")
    function = _library().cub_select
    index = torch.empty(flags.numel(), dtype=torch.int64, device=flags.device)
    count = torch.zeros((), dtype=torch.int32, device=flags.device)
    size = ctypes.c_size_t(0)

    def call(temporary: Tensor | None) -> int:
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (flags, index, count)]
        address = ctypes.c_void_p(None if temporary is None else temporary.data_ptr())
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error: int = function(*pointers, ctypes.c_int64(flags.numel()), address, ctypes.byref(size), stream)
        if error:
            raise RuntimeError(f"cub_select: cudaError {error}")
        return error

    call(None)
    temporary = torch.empty(size.value, dtype=torch.uint8, device=flags.device)
    return lambda: call(temporary), index, count
