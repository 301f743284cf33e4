"""The Triton kernels compiled for GPUs that are not here: registers, spills, width of loads, and recompilations.

A process that interprets cannot compile, so what compiles ahead of time runs in a process of its own.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton")

from sparse_kernels.backends.triton import launch


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("class_stride", [1, 100])
def test_launches_fit_triton_and_slices_cover_a_row(itemsize, class_stride):
    for classes in (1, 2, 10, 17, 33, 1000, 2049, 50_257, 200_000):
        for tensors in (1, 2):
            tile = launch.choose(classes, class_stride, itemsize, tensors)
            for size in (tile.rows, tile.chunks, tile.lanes, tile.width, tile.warps):
                assert size & (size - 1) == 0
                assert size > 0
            assert tile.rows * tile.columns <= 4096
            for programs in (1, 20, 10_000):
                count, columns = launch.slices(tile, programs, classes, 132)
                assert (count - 1) * columns < classes <= count * columns
                assert count == 1 or (columns % tile.columns == 0 and count <= launch.MOST_SLICES)
                assert count == 1 or programs < 10_000
    assert launch.slices(launch.choose(151_936, 1, 2), 8, 151_936, 132)[0] > 30
    assert launch.merged(launch.choose(1000, 1, 2), 1, 4096) is None  # a gate of three launches


@pytest.mark.parametrize("rows", [100, 200, 300, 600])
def test_programs_of_few_long_rows_fill_whole_waves(rows):
    """Nine tenths of the time of a GPU's processors is loads: a last wave takes as long as a full one."""
    tile = launch.choose(151_936, 1, 2)
    count, columns = launch.slices(tile, rows, 151_936, 132)
    room, blocks = 132 * launch.WARPS // tile.warps, -(-151_936 // tile.columns)
    waves = -(-rows * count // room)
    assert rows * blocks >= 0.89 * room * waves * (columns // tile.columns)


TRITON = tuple(map(int, version("triton").split(".")[:2]))
pytestmark = pytest.mark.slow  # compiles for four GPUs


# Other GPUs than 90 that some kernels are compiled for; Triton 3.2's assembler ends at 90.
OTHERS = (75, 80, 86, 89, 100, 120) if TRITON >= (3, 6) else (75, 80, 86, 89)

# Runs without the interpreter, through the same host code as a call on a GPU, up to where it would launch.
AHEAD_OF_TIME = """
import json, multiprocessing, os, re
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton_without_gpu import disassembled, instructions, without_gpu
from sparse_kernels.backends.triton import backend as triton_backend
from sparse_kernels._arguments import GateCall, Settings, StatsCall
from sparse_kernels.types import STATISTICS

class Caught:
    # In a kernel's place: hands what it would be launched with to `take`.
    def __init__(self, kernel, take):
        self.kernel, self.take = kernel, take
    def __getitem__(self, grid):
        return lambda **arguments: self.take(self.kernel, grid, arguments)

class Kernels:
    def __init__(self, module, take):
        self.module, self.take = module, take
    def __getattr__(self, name):
        found = getattr(self.module, name)
        return Caught(found, self.take) if name.endswith("_kernel") else found

def catch(take):
    forward, backward = triton_backend._kernels(), triton_backend._backward_kernels()
    triton_backend._kernels = lambda: Kernels(forward, take)
    triton_backend._backward_kernels = lambda: Kernels(backward, take)

def place(tensor, past):
    # The same values, that many elements past a multiple of 16 bytes.
    return torch.cat((tensor.new_empty(past), tensor.flatten()))[past:].view(tensor.shape)

def gate(rows, classes, dtype, outputs=(), serve=triton_backend.gate_rows, past=None, **changed):
    past = past or {}
    options = dict(temperature=1.0, softcap=0.0, smoothing=0.0, ignore=-100, weight=0.7, gate=0.0, p_min=0.0, seed=0,
                   step=0) | changed
    settings = Settings(options["temperature"], options["softcap"], options["smoothing"], options["ignore"],
                        options["gate"], options["p_min"], options["seed"], options["step"])
    logits, targets = torch.empty((rows, classes), dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    threshold, offset = torch.zeros(()), None
    if past:  # as those of a call whose operands are parts of other tensors
        logits, targets = place(logits, past.get("logits", 0)), place(targets, past.get("targets", 0))
        threshold, offset = place(threshold, past.get("threshold", 0)), place(torch.zeros(rows), past.get("offset", 0))
        settings = settings._replace(step=place(torch.zeros(1, dtype=torch.int64), past.get("step", 0)))
    serve(GateCall(
        logits, targets, outputs, -1, settings, threshold, {"loss": options["weight"], "entropy": 0.3}, offset))

def uncounted(call):
    return triton_backend.gate_rows_uncounted(call, torch.empty(64, dtype=torch.int32))

def stats(shape, dtype, dim=-1, outputs=("loss", "entropy"), **settings):
    targets = torch.zeros(shape[:1] + shape[2:] if dim == 1 else shape[:-1], dtype=torch.int64)
    triton_backend.row_stats(StatsCall(torch.empty(shape, dtype=dtype), targets, outputs, dim, Settings(**settings)))

def backward(rows, classes, dtype, past=None):
    past = past or {}
    targets = torch.zeros(rows, dtype=torch.int64)
    saved = torch.zeros(rows, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    logits = torch.empty((rows, classes), dtype=dtype)
    out = torch.empty_like(logits)
    if past:
        logits, out = place(logits, past.get("logits", 0)), place(out, past.get("out", 0))
        targets, saved = place(targets, past.get("targets", 0)), place(saved, past.get("saved", 0))
    call = StatsCall(logits, targets, ("loss", "entropy"), -1, Settings())
    triton_backend.row_stats_backward(call, saved, saved, saved, {"loss": saved, "entropy": saved}, out)

HARD = {"softcap": 30.0, "label_smoothing": 0.1}
CASES = {
    "long": lambda: gate(4096, 151_936, torch.bfloat16),
    "gate's step": lambda: gate(4096, 1000, torch.float32, serve=uncounted),
    "gate 10": lambda: gate(512, 10, torch.float16, gate=0.5),
    "backward": lambda: backward(4096, 151_936, torch.bfloat16),
    "apart": lambda: gate(65536, 1000, torch.bfloat16),
    "all eight": lambda: gate(4096, 151_936, torch.bfloat16, STATISTICS),
    "unaligned": lambda: gate(4096, 50_257, torch.bfloat16),
    "slices": lambda: gate(8, 151_936, torch.bfloat16),
    "float64": lambda: gate(4096, 3000, torch.float64, STATISTICS),
    "float64 backward": lambda: backward(4096, 3000, torch.float64),
    "short": lambda: gate(4096, 128, torch.float32),
    "short backward": lambda: backward(4096, 128, torch.float32),
    "21 classes": lambda: gate(4096, 21, torch.float32),
    "24 classes": lambda: gate(4096, 24, torch.bfloat16),
    "32 classes": lambda: gate(4096, 32, torch.float32),
    "31 classes, backward": lambda: backward(4096, 31, torch.bfloat16),
    "21 classes, everything": lambda: stats((4096, 21), torch.float32, -1, STATISTICS, **HARD),
    "21 classes, everything, float64": lambda: stats((4096, 21), torch.float64, -1, STATISTICS, **HARD),
    "50 classes, everything": lambda: stats((4096, 50), torch.bfloat16, -1, STATISTICS, **HARD),
    "nchw": lambda: stats((4, 21, 512, 512), torch.float32, 1),
    "nchw unaligned": lambda: stats((4, 21, 511, 511), torch.float32, 1),
    "nchw bfloat16": lambda: stats((4, 21, 512, 512), torch.bfloat16, 1),
    "everything": lambda: stats((4096, 151_936), torch.bfloat16, -1, STATISTICS, **HARD),
    "everything short": lambda: stats((4096, 64), torch.float64, -1, STATISTICS, **HARD),
}

# The rest on one GPU alone: it differs little from one to the next. Triton 3.2 has no bfloat16 for sm_75.
SOME = ("long", "gate's step", "gate 10", "backward", "all eight", "everything", "nchw", "21 classes")
since_3_6 = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)

def some(arch):
    return SOME if arch > 75 or since_3_6 else ("gate's step", "gate 10", "nchw", "21 classes")

def dealt(built):
    # For each tile of logits that is loaded or stored: columns a thread has in a row, threads beside it, its fastest.
    text = built.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\\w+) = #\\w+\\.blocked<\\{(.*)\\}>$", text, flags=re.MULTILINE))
    used = re.findall(r"tt\\.(?:load|store) .*tensor<\\d+x\\d+x\\d+x\\d+x!tt\\.ptr<\\w+>, (#\\w+)>", text)
    found = []
    for name in sorted(set(used) & set(layouts)):
        parts = dict(re.findall(r"(\\w+) = \\[([\\d, ]+)\\]", layouts[name]))
        last = {key: [int(value) for value in parts[key].split(",")] for key in parts}
        found.append((last["sizePerThread"][-1], last["threadsPerWarp"][-1], last["order"][0]))
    return found

def accesses(access, built):
    # The number of wide and of other accesses in each stretch of code without a label, if there are any.
    stretches = re.split(r"^\\$L__BB\\w+:", built.asm["ptx"], flags=re.MULTILINE)
    every = [re.findall(access + r"\\.global[.\\w]*", stretch) for stretch in stretches]
    wide = [sum(bool(re.search(r"\\.v(4\\.b32|2\\.b64)", one)) for one in found) for found in every]
    return [(w, len(found) - w) for w, found in zip(wide, every, strict=True) if found]

def in_flight(code):
    # Of machine instructions: loads of 16 bytes before the first exponential, if there is one.
    first = next((i for i, word in enumerate(code) if "MUFU.EX2" in word), len(code))
    loads = ["LDG" in word and ".128" in word for word in code]
    return sum(loads[:first])

def compile_all(arch, names):
    found = []
    without_gpu(arch)
    triton_backend.processors = lambda device: 132
    def take(kernel, grid, arguments):
        built = kernel.warmup(grid=grid, **arguments)
        usage = disassembled(built.asm["cubin"], "-res-usage")
        code = instructions(built.asm["cubin"])
        registers, stack = re.search(r"REG:(\\d+) STACK:(\\d+)", usage).groups()
        found.append({"case": name, "grid": grid, "registers": int(registers), "stack": int(stack),
                      "warps": arguments["num_warps"], "loads": accesses("ld", built), "stores": accesses("st", built),
                      "in flight": in_flight(code), "dealt": dealt(built),
                      "single loads": sum("LDG" in word and ".128" not in word for word in code)})
    catch(take)
    for name in names or CASES:
        CASES[name]()
    return found

def keys():
    # What Triton would look a compilation up by, for calls that differ in values, or in where their operands begin.
    from triton.runtime.jit import create_function_from_signature
    found = set()
    triton_backend.processors = lambda device: 0  # few rows are not cut into slices
    def take(kernel, grid, arguments):
        bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
        found.add(str(bind(**arguments)[1:]))
    catch(take)
    for changed in ({}, {"rows": 1}, {"rows": 33}, {"classes": 1008}, {"temperature": 0.7},
                    {"ignore": 1}, {"ignore": -2**40}, {"weight": 2}, {"gate": 3}, {"p_min": 0.25},
                    {"seed": 1}, {"seed": 2**64 - 1}, {"step": 16}, {"step": 2**40}):
        gate(**({"rows": 48, "classes": 1000, "dtype": torch.float32, "gate": 1.0} | changed))
    by_kind = {"values": sorted(found)}
    # Rows of several blocks, and of one: there loads of 16 bytes are one compilation, and single ones another.
    for classes in (1000, 128):
        for kind, call in ("gate", gate), ("backward", backward):
            found.clear()
            for past in ({"logits": 0}, {"targets": 1}, {"threshold": 1}, {"threshold": 3}, {"offset": 1}, {"step": 1},
                         {"logits": 1}, {"logits": 2}, {"logits": 3, "targets": 1, "offset": 3, "saved": 1},
                         {"logits": 4}, {"out": 4}, {"saved": 1}, {"saved": 2}):
                call(48, classes, torch.float32, past=past, **({"gate": 1.0} if kind == "gate" else {}))
            by_kind[f"{kind} {classes}"] = sorted(found)
    return by_kind

def run(job):
    return [job[0], compile_all(*job)] if job else ["keys", keys()]

jobs = [(90, ()), *((arch, some(arch)) for arch in OTHERS), *([None] if since_3_6 else [])]
with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0)), maxtasksperchild=1) as pool:
    print(json.dumps(pool.map(run, jobs, chunksize=1)))
"""


since_3_6 = pytest.mark.skipif(TRITON < (3, 6), reason="Triton before 3.6: its keys are made in another way")


@pytest.fixture(scope="session")
def ahead_of_time(request, tmp_path_factory):
    """Compiled kernels for each GPU, and the keys by which calls with other values look up their compilation.

    Compilations are kept from run to run: Triton finds them by the kernel's source, the GPU and its own version.
    """
    cache = getattr(request.config, "cache", None)
    directory = cache.mkdir("triton") if cache else tmp_path_factory.mktemp("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(directory), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    helpers = str(Path(__file__).parents[1] / "helpers")
    environment["PYTHONPATH"] = os.pathsep.join([helpers, *filter(None, [environment.get("PYTHONPATH")])])
    script = f"OTHERS = {OTHERS}\n{AHEAD_OF_TIME}"
    done = subprocess.run([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, check=True)
    found = dict(json.loads(done.stdout.splitlines()[-1]))
    return found, found.pop("keys", None)


@pytest.fixture(scope="session")
def compiled(ahead_of_time):
    return ahead_of_time[0]


# Threads of a processor (2,048; 1,024 for sm_75) that are not resident cost latency, which needs 512 here, or 256 where
# they have two blocks in flight.
REGISTERS = {"all eight": 255, "float64": 255}


@pytest.mark.parametrize("arch", [90, *OTHERS])
def test_compiles_for_gpus_and_fits_registers(arch, compiled):
    # "apart" and "slices" are two launches.
    assert len(compiled[arch]) == (26 if arch == 90 else 4 if arch == 75 and TRITON < (3, 6) else 8)
    for kernel in compiled[arch]:
        assert kernel["registers"] <= (255 if "everything" in kernel["case"] else REGISTERS.get(kernel["case"], 128)), (
            kernel
        )
        assert kernel["stack"] == 0, kernel


# Bytes of a logit.
ROWS = {
    "long": 2, "all eight": 2, "everything": 2, "unaligned": 2, "slices": 2, "gate's step": 4, "float64": 8,
    "backward": 2, "float64 backward": 8,
}  # fmt: skip


def test_rows_are_moved_16_bytes_at_a_time(compiled):
    """For any number of classes if a row is a program's. The few columns at its ends are a single load a thread."""
    for case in ROWS:
        kernel = next(kernel for kernel in compiled[90] if kernel["case"] == case)  # before its merge
        chunks = launch.CHUNKS // 2 if "backward" in case else launch.CHUNKS
        wide = [mix for mix in kernel["loads"] if mix[0]]
        assert wide[-1] == [chunks, 0], kernel  # the loop
        assert [mix[0] for mix in wide] == [chunks, chunks], kernel  # and the block before it
        if "backward" in case:
            assert kernel["stores"] == [[0, 1], [chunks, 0]], kernel
        else:  # an edge, the target and its logit, a threshold; some of them once for each layout
            assert kernel["single loads"] <= 7, kernel
    for kernel in compiled[90]:
        if kernel["case"] == "apart":
            assert [mix[0] for mix in kernel["loads"] if mix[0]] in ([], [launch.CHUNKS]), kernel
        if kernel["case"] in ("short", "short backward"):
            assert sum(mix[0] for mix in kernel["loads"]) == launch.CHUNKS, kernel
        if kernel["case"] == "nchw" and TRITON >= (3, 6):
            assert [mix[0] for mix in kernel["loads"] if mix[0]] == [launch.CHUNKS, launch.CHUNKS], kernel


@pytest.mark.parametrize("arch", [90, *OTHERS])
def test_the_first_block_is_loaded_before_anything_is_computed(arch, compiled):
    """It does not wait for the target, nor for the target's logit: those would come before the first exponential."""
    for kernel in compiled[arch]:
        if kernel["case"] in ("long", "gate's step", "all eight"):
            assert kernel["in flight"] >= launch.CHUNKS, kernel


@pytest.mark.parametrize(
    ("case", "columns", "threads"),
    [("21 classes", 1, 32), ("24 classes", 8, 4), ("32 classes", 4, 8), ("31 classes, backward", 1, 32)],
)
def test_threads_side_by_side_move_neighbours_of_a_row(case, columns, threads, compiled):
    """Rows of 17 to 32 classes as well: 16 bytes a thread where rows are aligned, or else a logit."""
    for kernels in compiled.values():
        for kernel in kernels:
            if kernel["case"] == case:
                assert kernel["dealt"] == [[columns, threads, 3]], kernel


def test_few_rows_fill_a_gpu(compiled):
    (first, second) = (kernel for kernel in compiled[90] if kernel["case"] == "slices")
    assert first["grid"][0] * first["grid"][1] * first["warps"] >= 132 * 8
    assert second["grid"][1] == 1


@since_3_6
def test_values_do_not_compile_anew(ahead_of_time):
    found = ahead_of_time[1]["values"]
    assert len(found) == 1, "\n".join(found)


@since_3_6
@pytest.mark.parametrize(
    ("kind", "compilations"), [("gate 1000", 1), ("gate 128", 2), ("backward 1000", 2), ("backward 128", 2)]
)
def test_a_tensor_that_begins_elsewhere_does_not_compile_anew(ahead_of_time, kind, compilations):
    """Except where all accesses are of 16 bytes, or single ones: to whole rows of one block, and to a gradient."""
    found = ahead_of_time[1][kind]
    assert len(found) == compilations, "\n".join(found)
