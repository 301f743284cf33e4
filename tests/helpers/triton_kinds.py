"""Calls for every kind of kernel in the launch table of the Triton backend, compiled for GPUs that are not here.

A process that interprets cannot compile, so this runs in one of its own, whose last line is JSON:

    python -m triton_kinds named 90 75 80     the calls of NAMED for these architectures
    python -m triton_kinds table 90           all kinds of the launch table
    python -m triton_kinds keys               by what Triton looks compilations up, for calls that differ in values

Each runs through the same host code as on a GPU, up to where it would launch. ``TRITON_KINDS`` is a pattern of names of
calls, ``TRITON_PROCESSES`` the number of processes at a time. Default: all calls, and a process a core.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import driver
from triton_code import accesses, dealt, waits
from triton_without_gpu import instructions, registers_and_stack, without_gpu

from sparse_kernels._arguments import GateCall, Settings, StatsCall
from sparse_kernels.backends.triton import backend as triton_backend
from sparse_kernels.types import STATISTICS

BFLOAT16, FLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
HARD = {"softcap": 30.0, "label_smoothing": 0.1}
SINCE_3_6 = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)


class Launch(NamedTuple):
    case: str
    kernel: Any
    grid: Any
    arguments: dict[str, Any]


class Caught:
    """In a kernel's place: hands what it would be launched with to ``take``."""

    def __init__(self, kernel: Any, take: Callable[..., None]) -> None:
        self.kernel, self.take = kernel, take

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda **arguments: self.take(self.kernel, grid, arguments)


class Kernels:
    def __init__(self, module: Any, take: Callable[..., None]) -> None:
        self.module, self.take = module, take

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.module, name)
        return Caught(found, self.take) if name.endswith("_kernel") else found


def catch(take: Callable[..., None]) -> None:
    forward, backward = triton_backend._kernels(), triton_backend._backward_kernels()
    triton_backend._kernels = lambda: Kernels(forward, take)
    triton_backend._backward_kernels = lambda: Kernels(backward, take)


def place(tensor: torch.Tensor, past: int) -> torch.Tensor:
    """Return the same values, that many elements past a multiple of 16 bytes."""
    return torch.cat((tensor.new_empty(past), tensor.flatten()))[past:].view(tensor.shape)


def gate(rows, classes, dtype, outputs=(), serve=triton_backend.gate_rows, past=None, **changed):
    """Call gate_rows; ``past`` places operands as those of a call that are parts of other tensors."""
    past = past or {}
    options = {"weight": 0.7} | changed
    weight = options.pop("weight")
    settings = Settings(**options)
    logits, targets = torch.empty((rows, classes), dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    threshold, offset = torch.zeros(()), None
    if past:
        logits, targets = place(logits, past.get("logits", 0)), place(targets, past.get("targets", 0))
        threshold, offset = place(threshold, past.get("threshold", 0)), place(torch.zeros(rows), past.get("offset", 0))
        settings = settings._replace(step=place(torch.zeros(1, dtype=torch.int64), past.get("step", 0)))
    serve(GateCall(logits, targets, outputs, -1, settings, threshold, {"loss": weight, "entropy": 0.3}, offset))


def uncounted(call):
    return triton_backend.gate_rows_uncounted(call, torch.empty(64, dtype=torch.int32))


def targets_of(logits, dim):
    return torch.zeros_like(logits.select(dim, 0), dtype=torch.int64)


def stats(shape, dtype, dim=-1, outputs=("loss", "entropy"), **settings):
    logits = torch.empty(shape, dtype=dtype)
    triton_backend.row_stats(StatsCall(logits, targets_of(logits, dim), outputs, dim, Settings(**settings)))


def everything(logits, dim=-1):
    """Call gate_rows for all that there is: every statistic, softcap, smoothing, offset, draws, step on the device."""
    targets = targets_of(logits, dim)
    offset = torch.zeros(targets.shape, dtype=FLOAT64 if logits.dtype is FLOAT64 else FLOAT32)
    settings = Settings(**HARD, gate_temperature=0.5, p_min=0.1, step=torch.zeros(1, dtype=torch.int64))
    weights = {name: 0.5 for name in STATISTICS if name != "argmax"}
    triton_backend.gate_rows(GateCall(logits, targets, STATISTICS, dim, settings, torch.zeros(()), weights, offset))


def scored(logits, dim=-1):
    """Call gate_rows as a gate does."""
    settings = Settings(gate_temperature=0.5)
    weights = {"loss": 0.7, "entropy": 0.3}
    call = GateCall(logits, targets_of(logits, dim), (), dim, settings, torch.zeros(()), weights, None)
    triton_backend.gate_rows(call)


def gradient(logits, dim=-1, past=None, **settings):
    past = past or {}
    targets = targets_of(logits, dim)
    saved = torch.zeros(targets.shape, dtype=FLOAT64 if logits.dtype is FLOAT64 else FLOAT32)
    out = torch.empty_like(logits)
    if past:
        logits, out = place(logits, past.get("logits", 0)), place(out, past.get("out", 0))
        targets, saved = place(targets, past.get("targets", 0)), place(saved, past.get("saved", 0))
    call = StatsCall(logits, targets, ("loss", "entropy"), dim, Settings(**settings))
    triton_backend.row_stats_backward(call, saved, saved, saved, {"loss": saved, "entropy": saved}, out)


def backward(rows, classes, dtype, **more):
    gradient(torch.empty((rows, classes), dtype=dtype), **more)


NAMED: dict[str, Callable[[], None]] = {
    "long": lambda: gate(4096, 151_936, BFLOAT16),
    "gate's step": lambda: gate(4096, 1000, FLOAT32, serve=uncounted),
    "gate 10": lambda: gate(512, 10, FLOAT16, gate_temperature=0.5),
    "backward": lambda: backward(4096, 151_936, BFLOAT16),
    "apart": lambda: gate(65536, 1000, BFLOAT16),
    "all eight": lambda: gate(4096, 151_936, BFLOAT16, STATISTICS),
    "unaligned": lambda: gate(4096, 50_257, BFLOAT16),
    "slices": lambda: gate(8, 151_936, BFLOAT16),
    "float64": lambda: gate(4096, 3000, FLOAT64, STATISTICS),
    "float64 backward": lambda: backward(4096, 3000, FLOAT64),
    "short": lambda: gate(4096, 128, FLOAT32),
    "short backward": lambda: backward(4096, 128, FLOAT32),
    "21 classes": lambda: gate(4096, 21, FLOAT32),
    "24 classes": lambda: gate(4096, 24, BFLOAT16),
    "32 classes": lambda: gate(4096, 32, FLOAT32),
    "31 classes, backward": lambda: backward(4096, 31, BFLOAT16),
    "21 classes, everything": lambda: stats((4096, 21), FLOAT32, -1, STATISTICS, **HARD),
    "21 classes, everything, float64": lambda: stats((4096, 21), FLOAT64, -1, STATISTICS, **HARD),
    "21 classes apart, everything, float64": lambda: everything(torch.empty((131_072, 42), dtype=FLOAT64)[:, ::2]),
    "50 classes": lambda: gate(4096, 50, FLOAT32),
    "50 classes, everything": lambda: stats((4096, 50), BFLOAT16, -1, STATISTICS, **HARD),
    "64 classes": lambda: gate(4096, 64, BFLOAT16),
    "300 classes": lambda: gate(4096, 300, BFLOAT16),
    "512 classes": lambda: gate(4096, 512, BFLOAT16),
    "nchw": lambda: stats((4, 21, 512, 512), FLOAT32, 1),
    "nchw unaligned": lambda: stats((4, 21, 511, 511), FLOAT32, 1),
    "nchw bfloat16": lambda: stats((4, 21, 512, 512), BFLOAT16, 1),
    "everything": lambda: stats((4096, 151_936), BFLOAT16, -1, STATISTICS, **HARD),
    "everything short": lambda: stats((4096, 64), FLOAT64, -1, STATISTICS, **HARD),
}

WIDTHS = {BFLOAT16: (32, 64, 128, 256, 512), FLOAT32: (32, 64, 128, 256), FLOAT64: (32, 64)}  # several rows a warp


def tiles(dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Yield a name, logits and the dimension of their classes for each tile that a dtype has."""

    def rows(classes: int) -> torch.Tensor:
        return torch.empty((4096, classes), dtype=dtype)

    def pixels(classes: int, side: int) -> torch.Tensor:
        return torch.empty((4, classes, side, side), dtype=dtype)

    yield "10 classes", rows(10), -1
    for width in WIDTHS[dtype]:
        yield f"{width} classes", rows(width), -1
        yield f"{width - 1} classes", rows(width - 1), -1
    yield "a warp to a row", rows(3001), -1
    yield "long rows", rows(50_257), -1
    for classes in (3, 21):
        yield f"{classes} classes of pixels", pixels(classes, 64), 1
        yield f"{classes} classes of unaligned pixels", pixels(classes, 63), 1
        yield f"{classes} classes apart", rows(2 * classes)[:, ::2], -1


MERGED = {"few slices": (1100, 50_257), "64 slices": (4, 151_936), "one slice": (65_536, 1000)}  # two launches each


def table() -> dict[str, Callable[[], None]]:
    """Return the calls of every kind by name; what asks for less has no more in registers."""
    found: dict[str, Callable[[], None]] = {}
    for dtype in WIDTHS:
        name = str(dtype).removeprefix("torch.")
        for tile, logits, dim in tiles(dtype):
            found[f"{name}, {tile}, everything"] = functools.partial(everything, logits, dim)
            found[f"{name}, {tile}, backward"] = functools.partial(gradient, logits, dim, **HARD)
            if dtype is not FLOAT64:
                found[f"{name}, {tile}, gate"] = functools.partial(scored, logits, dim)
        for slices, shape in MERGED.items():
            found[f"{name}, {slices}, everything"] = functools.partial(everything, torch.empty(shape, dtype=dtype))
    return found


# Options that follow from the architecture: the front end asks for them where a kernel has products or float8.
OF_ARCHITECTURE = {
    "arch", "supported_fp8_dtypes", "deprecated_fp8_dtypes", "deprecated_fp8_dot_operand_dtypes",
    "max_num_imprecise_acc_default",
}  # fmt: skip


def share_front_ends() -> None:
    """Let Triton translate a kernel to its first representation once for all architectures: a quarter of its work.

    A kernel that might be translated differently for another one fails: it has no driver to ask for the GPU, and no
    options and functions that follow from it.
    """
    make_ir = ASTSource.make_ir
    texts: dict[tuple[str, str], str] = {}

    def shared(self: Any, *arguments: Any) -> Any:
        *target, options, _, modules, context = arguments
        common = {name: value for name, value in vars(options).items() if name not in OF_ARCHITECTURE}
        key = self.hash(), repr(sorted(common.items()))
        if key not in texts:
            active = driver.active
            driver.set_active(SimpleNamespace())
            module = make_ir(self, *target, SimpleNamespace(**common), {}, modules, context)
            driver.set_active(active)
            texts[key] = str(module)
            return module
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(texts[key])
            file.flush()
            module = ir.parse_mlir_module(file.name, context)
        module.context = context
        return module

    ASTSource.make_ir = shared


def compile_all(what: str, names: list[str], architectures: list[int]) -> dict[int, list[dict[str, Any]]]:
    """Return what is known of each kernel of the calls, compiled for each architecture."""
    calls = CALLS[what]()
    launches: list[Launch] = []
    triton_backend.processors = lambda device: 132
    name = ""
    catch(lambda kernel, grid, arguments: launches.append(Launch(name, kernel, grid, arguments)))
    for name in names:
        calls[name]()
    share_front_ends()
    return {arch: compile_for(arch, launches) for arch in architectures}


def compile_for(arch: int, launches: list[Launch]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    cubins: list[bytes] = []
    without_gpu(arch)
    for case, kernel, grid, arguments in launches:
        if arch <= 75 and not SINCE_3_6 and arguments["logits_ptr"].dtype is BFLOAT16:
            continue  # Triton before 3.6 has no bfloat16 there
        built = kernel.warmup(grid=grid, **arguments)
        registers, stack = registers_and_stack(built.asm["cubin"])
        cubins.append(built.asm["cubin"])
        found.append({
            "case": case, "grid": grid, "registers": registers, "stack": stack, "warps": arguments["num_warps"],
            "loads": accesses("ld", built), "stores": accesses("st", built), "dealt": dealt(built),
        })  # fmt: skip
    for kernel, code in zip(found, instructions(arch, cubins), strict=True):
        kernel["waits"] = waits(code)
        kernel["single loads"] = sum("LDG" in word and ".128" not in word for word in code)
    return found


def keys() -> dict[str, list[str]]:
    """Return what Triton looks a compilation up by, for calls that differ in values, or in where operands begin."""
    from triton.runtime.jit import create_function_from_signature  # since Triton 3.6

    found: set[str] = set()
    triton_backend.processors = lambda device: 0  # few rows are not cut into slices

    def take(kernel: Any, grid: Any, arguments: dict[str, Any]) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
        found.add(str(bind(**arguments)[1:]))

    catch(take)
    for changed in (
        {}, {"rows": 1}, {"rows": 33}, {"classes": 1008}, {"temperature": 0.7}, {"ignore_index": 1},
        {"ignore_index": -(2**40)}, {"weight": 2}, {"gate_temperature": 3}, {"p_min": 0.25}, {"seed": 1},
        {"seed": 2**64 - 1}, {"step": 16}, {"step": 2**40},
    ):  # fmt: skip
        gate(**({"rows": 48, "classes": 1000, "dtype": FLOAT32, "gate_temperature": 1.0} | changed))
    by_kind = {"values": sorted(found)}
    # Rows of several blocks, and of one: there loads of 16 bytes are one compilation, and single ones another.
    for classes in (1000, 128):
        for kind, call in ("gate", functools.partial(gate, gate_temperature=1.0)), ("backward", backward):
            found.clear()
            for past in (
                {"logits": 0}, {"targets": 1}, {"threshold": 1}, {"threshold": 3}, {"offset": 1}, {"step": 1},
                {"logits": 1}, {"logits": 2}, {"logits": 3, "targets": 1, "offset": 3, "saved": 1}, {"logits": 4},
                {"out": 4}, {"saved": 1}, {"saved": 2},
            ):  # fmt: skip
                call(48, classes, FLOAT32, past=past)
            by_kind[f"{kind} {classes}"] = sorted(found)
    return by_kind


CALLS: dict[str, Callable[[], dict[str, Callable[[], None]]]] = {"named": lambda: NAMED, "table": table}
PART = 20  # calls of a process: all architectures of a call share its front end


def main(what: str, *architectures: str) -> None:
    """Print what is found, as JSON: for each architecture its kernels, or the keys of each kind of call."""
    if what == "keys":
        print(json.dumps(keys()))
        return
    names = [name for name in CALLS[what]() if re.search(os.environ.get("TRITON_KINDS", ""), name)]
    processes = int(os.environ.get("TRITON_PROCESSES", len(os.sched_getaffinity(0))))
    parts = max(processes, -(-len(names) // PART))
    jobs = [(what, names[part::parts], list(map(int, architectures))) for part in range(parts)]
    with multiprocessing.get_context("fork").Pool(processes, maxtasksperchild=1) as pool:
        found = pool.starmap(compile_all, jobs, chunksize=1)
    print(json.dumps({arch: [kernel for part in found for kernel in part[int(arch)]] for arch in architectures}))


if __name__ == "__main__":
    main(*sys.argv[1:])
