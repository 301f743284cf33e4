"""The Triton kernels compiled for GPUs that are not here: registers, spills, width of loads, and recompilations.

A process that interprets cannot compile, so what compiles ahead of time runs in a process of its own.
"""

import json
import os
from importlib.metadata import version
from pathlib import Path

import fresh
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
LIMIT = 1800.0  # seconds: hundreds of compilations where none is kept yet
pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT)]

# Triton 3.2's assembler ends at 90.
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120) if TRITON >= (3, 6) else (75, 80, 86, 89, 90)


since_3_6 = pytest.mark.skipif(TRITON < (3, 6), reason="Triton before 3.6: its keys are made in another way")


def kinds(request, tmp_path_factory, *arguments, **variables):
    """Return what tests/helpers/triton_kinds.py prints.

    Compilations are kept from run to run: Triton finds them by the kernel's source, the GPU and its own version.
    """
    cache = getattr(request.config, "cache", None)
    directory = cache.mkdir("triton") if cache else tmp_path_factory.mktemp("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(directory), "OMP_NUM_THREADS": "1", **variables}
    environment.pop("TRITON_INTERPRET", None)
    helpers = str(Path(__file__).parents[1] / "helpers")
    environment["PYTHONPATH"] = os.pathsep.join([helpers, *filter(None, [environment.get("PYTHONPATH")])])
    done = fresh.run("-m", "triton_kinds", *map(str, arguments), environment=environment, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def compiled(request, tmp_path_factory):
    """Kernels of the named calls, for each architecture."""
    found = kinds(request, tmp_path_factory, "named", *ARCHITECTURES)
    return {arch: found[str(arch)] for arch in ARCHITECTURES}


@pytest.fixture(scope="session")
def kinds_of_table(request, tmp_path_factory):
    """Kinds of the launch table for each architecture: some, or all."""
    every = os.environ.get("TRITON_MATRIX") == "all"
    only = "" if every else "float32, (10|127|128) classes, everything|bfloat16, 255 classes, everything"
    found = kinds(request, tmp_path_factory, "table", *ARCHITECTURES, TRITON_KINDS=only)
    return {arch: found[str(arch)] for arch in ARCHITECTURES}


@pytest.fixture(scope="session")
def keys(request, tmp_path_factory):
    """Keys by which calls with other values look up their compilation."""
    return kinds(request, tmp_path_factory, "keys")


# Threads of a processor (2,048; 1,024 for sm_75) that are not resident cost latency, which needs 512 here, or 256 where
# they have two blocks in flight.
REGISTERS = {"all eight": 255, "float64": 255}
if TRITON < (3, 6):
    REGISTERS["64 classes"] = 138  # on sm_86: 448 threads


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_for_gpus_and_fits_registers(arch, compiled):
    launches = 31 if arch > 75 or TRITON >= (3, 6) else 15  # before 3.6 there is no bfloat16 on sm_75
    assert len(compiled[arch]) == launches
    for kernel in compiled[arch]:
        most = 255 if "everything" in kernel["case"] else REGISTERS.get(kernel["case"], 128)
        assert kernel["registers"] <= most, kernel
        assert kernel["stack"] == 0, kernel


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kind_of_the_launch_table_spills(arch, kinds_of_table):
    """`make test-triton-matrix` compiles every kind, with each Triton; other runs take some of them."""
    found = kinds_of_table[arch]
    assert len(found) >= (100 if os.environ.get("TRITON_MATRIX") == "all" else 3)
    spilling = [f"{kernel['case']}: {kernel['stack']} bytes" for kernel in found if kernel["stack"]]
    assert not spilling, "\n".join(spilling)


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


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_first_block_is_loaded_before_anything_is_waited_for(arch, compiled):
    """It does not wait for the target, nor for the target's logit.

    With Triton 3.2 three of its four loads do not, and on sm_80 all of them wait for the target.
    """
    for kernel in compiled[arch]:
        if kernel["case"] in ("long", "gate's step", "all eight"):
            together = [wait.count("128") for wait in kernel["waits"]]
            if TRITON >= (3, 6):
                assert together[0] == launch.CHUNKS, kernel
            else:
                assert max(together[:2]) >= launch.CHUNKS - 1, kernel


# Loads of a thread, for all logits of a tile: their width in bits, and their number.
TILES = {
    "gate 10": ("U16", 10), "21 classes": ("32", 4), "24 classes": ("128", 4), "32 classes": ("128", 4),
    "50 classes": ("32", 8), "64 classes": ("128", 4), "short": ("128", 4), "300 classes": ("U16", 32),
    "512 classes": ("128", 4),
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits_of_whole_rows_are_loaded_together(arch, compiled):
    """On 9.0 a program waits once for the memory, elsewhere twice at times; loads one after another would each wait.

    With another Triton than the pinned one a third of them may wait on 9.0.
    """
    all_of = 1 if TRITON == (3, 6) else 2 / 3
    for kernel in compiled[arch]:
        if kernel["case"] in TILES:
            width, loads = TILES[kernel["case"]]
            together = max(wait.count(width) for wait in kernel["waits"])
            assert together >= (all_of * loads if arch == 90 else 2), kernel


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


def test_a_thread_has_rows_of_its_own_where_no_axis_is_contiguous(compiled):
    """In every Triton. The loads are single: nothing else may be concluded from what deals the rows out."""
    for kernels in compiled.values():
        for kernel in kernels:
            loads = [load for wait in kernel["waits"] for load in wait]
            if kernel["case"] == "gate 10":
                assert loads.count("U16") == launch.SHORT + 1, kernel  # and the target's logit
            elif kernel["case"] == "21 classes apart, everything, float64":
                assert "128" not in loads, kernel
            else:
                continue
            assert kernel["dealt"] == [[1, 1, 0]], kernel


def test_few_rows_fill_a_gpu(compiled):
    (first, second) = (kernel for kernel in compiled[90] if kernel["case"] == "slices")
    assert first["grid"][0] * first["grid"][1] * first["warps"] >= 132 * 8
    assert second["grid"][1] == 1


@since_3_6
def test_values_do_not_compile_anew(keys):
    found = keys["values"]
    assert len(found) == 1, "\n".join(found)


@since_3_6
@pytest.mark.parametrize(
    ("kind", "compilations"), [("gate 1000", 1), ("gate 128", 2), ("backward 1000", 2), ("backward 128", 2)]
)
def test_a_tensor_that_begins_elsewhere_does_not_compile_anew(keys, kind, compilations):
    """Except where all accesses are of 16 bytes, or single ones: to whole rows of one block, and to a gradient."""
    found = keys[kind]
    assert len(found) == compilations, "\n".join(found)
