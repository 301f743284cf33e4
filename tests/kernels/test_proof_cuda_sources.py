"""The self-check against mistakes in the CUDA kernels' own source: each is made in a copy, run on a CPU, and caught.

One build of the copy has them all, beside what is right: ``planted`` says which of them it makes.
"""

import ctypes
import os
import shutil

import pytest
import torch
from test_cuda import CSRC, build_cuda_on_cpu

pytest.importorskip("triton")

from sparse_kernels.backends import cuda as cuda_backend
from sparse_kernels.self_check import cases, control

pytestmark = [
    pytest.mark.any_pytorch,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # NumPy, on NaN and inf
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="nothing is interpreted"),
]
OUTPUT, SHARES, TILES = "cuda/compact_output.cuh", "cuda/compact_shares.cuh", "cuda/compact_tiles.cuh"
SUMS, STATES, MOVES = "cuda/control_sums.cuh", "cuda/control.cu", "cuda/gather_kernels.cuh"
LAW = "include/sparse_kernels/control_law.h"
COUNTED = "row_counts(args, part + row)"
FIRST_SHARE = "control_sum_of(scratch.block_sums, 1)"
ZERO_WEIGHT, ONE_WEIGHT = "args.packed.weight[slot] = 0.0f", "args.packed.weight[slot] = 1.0f"

# Of the source: the operation whose check must see it, the file, the expression that stands there once, and the
# mistake. None reads or writes out of bounds, and none waits for ever.
FAULTS = {
    "the last slot left empty": ("compact", OUTPUT, "slot >= packed.capacity", "slot + 1 >= packed.capacity"),
    "weights of one": ("compact", OUTPUT, "packed.weight_in ? packed.weight_in[row] : 1.0f", "1.0f"),
    "overflow of one": ("compact", OUTPUT, "total > args.packed.capacity", "total > args.packed.capacity + 1"),
    "weight of padding": ("compact", OUTPUT, ZERO_WEIGHT, ONE_WEIGHT),
    "first slot of padding": ("compact", OUTPUT, "int64_t(kept) + thread", "int64_t(kept) + thread + 1"),
    "order of a warp's rows": ("compact", TILES, "((1u << lane) - 1u)", "~((2u << lane) - 1u)"),
    "warps before this one": ("compact", TILES, "lane < warp", "lane <= warp"),
    "head of an unaligned mask": ("compact", TILES, "mask[begin + thread] != 0", "false"),
    "last distance of the ranks": ("compact", SHARES, "distance < kWarp", "distance < kWarp / 2"),
    "order of a step's rows": ("compact", SHARES, "int(origin + staged[i])", "int(origin + staged[kept - 1 - i])"),
    "blocks before this one": ("compact", SHARES, "i < block ? count : 0", "i <= block ? count : 0"),
    "bits of a step fetched late": ("compact", SHARES, "step + 1 < end", "step + 2 < end"),
    "source of rows apart": ("gather_rows", MOVES, "tensor.in_stride", "tensor.row_bytes"),
    "later chunks of a row": ("gather_rows", MOVES, "(chunk - slot * chunks) * kChunk", "0"),
    "shift by eight bytes": ("gather_rows", MOVES, "word[k + 2]", "word[k + 1]"),
    "bytes behind the last word": ("gather_rows", MOVES, "head + body + lane", "bytes"),
    "first tensor of a launch": ("gather_rows", MOVES, "t + 1 < table.count", "t + 2 < table.count"),
    "padding scattered": ("scatter_rows", MOVES, "slot >= *table.kept", "slot > *table.kept"),
    "scattered to its slot": ("scatter_rows", MOVES, "(kScatter ? row : slot)", "slot"),
    "set-point of another state": ("control", STATES, "args.setpoint += state", "args.setpoint += 0"),
    "overflow of another state": ("control", STATES, "overflow[state]", "overflow[0]"),
    "labels of the first state": ("control", STATES, "first * args.label_bytes", "0"),
    "labels of four bytes": ("control", SUMS, "args.label_bytes == 4", "args.label_bytes == 5"),
    "rows of mass one": ("control", SUMS, "inside && args.mass", "false"),
    "labels of a thread's later rows": ("control", SUMS, COUNTED, COUNTED.replace("row)", "row % kThreads)")),
    "ignored rows counted": ("control", SUMS, "label != args.ignore_index", "true"),
    "greatest of two": ("control", LAW, "fmaxf(sums.high, other.high)", "sums.high"),
    "squares of masses": ("control", LAW, "sums.mass_sq += other.mass_sq", "sums.mass_sq += other.mass"),
    "sign of the error": ("control", LAW, "filter.k_p * batch.error + drift", "drift - filter.k_p * batch.error"),
    "gain of the drift": ("control", LAW, "filter.k_i * batch.error", "filter.k_p * batch.error"),
    "rows of NaN not counted": ("select", SUMS, "int32_t(sums.invalid)", "0"),
    "overflow not counted": ("gate_step", LAW, "counters[kOverflow] += overflow", "counters[kOverflow] += 0"),
}  # fmt: skip
# Of several blocks: rows enough for them are scored in an interpreter, too.
LARGE_FAULTS = {
    "sums of the first block alone": ("gate_step", TILES, "int(gridDim.x)", "1"),
    "a step for each block": ("gate_step", TILES, "atomicAdd(scratch.blocks_finished, 1u)", "gridDim.x - 1"),
    "rows of a tile summed": ("gate_step", TILES, "tile + kTile < args.rows", "false"),
    "sums of all shares before": ("gate_step", SHARES, "from > 0 ? from : 0", "0"),
    "sums of the first share alone": ("gate_step", SHARES, "control_sum_of(scratch.block_sums, blocks)", FIRST_SHARE),
    "a step for each share": ("gate_step", SHARES, "block == 0 && warp == 0", "warp == 0"),
    "overflow of shares not counted": ("gate_step", SHARES, "overflow_of(args, total)", "0"),
}  # fmt: skip
ALL = {**FAULTS, **LARGE_FAULTS}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """The extension built from the copy, and its switch: 0, or the number of a mistake from 1 on."""
    folder = tmp_path_factory.mktemp("faulty") / "csrc"
    shutil.copytree(CSRC.parent, folder)
    for number, (_, name, right, wrong) in enumerate(ALL.values(), 1):
        file = folder / name
        source = file.read_text()
        assert source.count(right) == 1, (name, right, source.count(right))
        file.write_text(source.replace(right, choice(number, right, wrong)))
    switch = folder / "include" / "planted.h"
    switch.write_text('#pragma once\nextern "C" {\n__attribute__((visibility("default"))) inline int planted = 0;\n}\n')
    module = build_cuda_on_cpu(folder, ("-include", "planted.h"))
    return module, ctypes.c_int.in_dll(ctypes.CDLL(module.__file__), "planted")


def choice(number, right, wrong):
    """Return the expression that is the mistake where its number is planted."""
    return f"(planted == {number} ? ({wrong}) : ({right}))"


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch, faulty):
    monkeypatch.setattr(cuda_backend, "_cuda", faulty[0], raising=False)
    monkeypatch.setattr(cuda_backend, "_enqueue", lambda function, device, *arguments: function(*arguments, 0, 0))
    cuda_backend._storage_bytes.cache_clear()
    yield
    faulty[1].value = 0
    cuda_backend._storage_bytes.cache_clear()


def disagreement(op):
    """Return the first call of the self-check that disagrees, or None."""
    (dtype, *_) = cases.dtypes(op)
    found = cases.comparisons(op, cuda_backend, torch.device("cpu"), dtype)
    return next((comparison.what for comparison in found if not comparison.agrees), None)


@pytest.mark.parametrize("op", ["gather_rows", "scatter_rows", "control", "select", "gate_step"])
def test_without_a_mistake_the_copy_agrees(op):
    assert disagreement(op) is None


@pytest.mark.parametrize("what", FAULTS)
def test_a_mistake_is_caught(what, faulty):
    faulty[1].value = list(ALL).index(what) + 1
    assert disagreement(FAULTS[what][0])


@pytest.mark.slow
@pytest.mark.parametrize("what", LARGE_FAULTS)
def test_a_mistake_between_blocks_is_caught(what, faulty, monkeypatch):
    monkeypatch.setattr(control, "_large", lambda setup: True)  # as on a GPU
    faulty[1].value = list(ALL).index(what) + 1
    assert disagreement("gate_step")
