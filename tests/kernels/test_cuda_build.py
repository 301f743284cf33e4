"""The CUDA kernels as they are built and launched: launches of a step, the extension, sanitizers, and a GPU."""

import ctypes
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_cuda import CSRC, FLAGS, ROOT, SANITIZE, assert_same, cuda_on_cpu, gather, masks, on_gpu, scatter  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_kernels as sk
from sparse_kernels import control_law, reference
from sparse_kernels._arguments import CompactCall, GateStepCall, Settings, TreeCall
from sparse_kernels.backends import cuda as cuda_backend
from sparse_kernels.backends.triton import backend as triton_backend

pytestmark = pytest.mark.any_pytorch


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Launched:
    """In the place of a Triton kernel: it counts its launches, and keeps no row."""

    def __init__(self):
        self.count = 0

    def __getitem__(self, grid):
        return self.launch

    def launch(self, **arguments):
        self.count += 1
        for name in ("mask_ptr", "significance_ptr", "weight_ptr"):
            if arguments[name] is not None:  # not by PyTorch, which would be seen to do it
                ctypes.memset(arguments[name].data_ptr(), 0, arguments[name].nbytes)
        ctypes.memset(arguments["finished_ptr"].data_ptr(), 0, 4)


# A row is scored in one launch or two: launch.merged says which.
@pytest.mark.parametrize(
    ("rows", "classes", "launches"),
    [
        (512, 10, 3), (4096, 1000, 3), (65_536, 10, 3), (16_383, 1000, 3), (16_384, 16, 3), (16_384, 8193, 3),
        (65_536, 24, 3), (39_999, 64, 3), (40_000, 64, 4), (16_384, 128, 4),  # few threads end a row, or more
        (16_384, 17, 4), (16_384, 8192, 4), (65_536, 1000, 4),  # a warp ends a row: many of them have a launch for it
        (65_537, 10, 4), (65_537, 1000, 5),  # counted in one launch and packed in another
        (8, 151_936, 4), (1, 5000, 4),  # few long rows, in slices
    ],
)  # fmt: skip
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_the_whole_gate_is_three_launches_and_at_most_five(request, monkeypatch, rows, classes, launches, temperature):
    """Scores, compaction with control, and a gather of 32 tensors: a launch each, or two of the first two.

    The host code is what runs on a GPU; each launch is counted where it would reach the device. PyTorch allocates
    memory and views, nothing more.
    """
    extension = request.getfixturevalue("cuda_on_cpu")
    torch.use_deterministic_algorithms(False)  # or PyTorch fills what it makes
    scores = Launched()
    kernels = SimpleNamespace(row_stats_kernel=scores)
    monkeypatch.setattr(triton_backend, "_kernels", lambda: kernels)
    monkeypatch.setattr(triton_backend, "processors", lambda device: 132)
    monkeypatch.setattr(triton_backend.reference, "check_targets", lambda call: None)  # on a CPU alone
    monkeypatch.setattr(cuda_backend, "_cuda", extension, raising=False)
    monkeypatch.setattr(cuda_backend, "_enqueue", lambda function, device, *arguments: function(*arguments, 0, 0))
    cuda_backend._storage_bytes.cache_clear()
    launched = ctypes.CDLL(extension.__file__).cuda_on_cpu_launches
    before = launched()
    state = control_law.initial_state(torch.tensor(1.5))
    settings = Settings(gate_temperature=temperature, step=state.counters[0])
    call = GateStepCall(
        torch.empty(rows, classes, dtype=torch.bfloat16), torch.zeros(rows, dtype=torch.int64), (), -1, settings,
        state.values, {"loss": 1.0}, None, 50, state, torch.tensor(0.3), False,
    )  # fmt: skip
    tree = [torch.ones(rows, 3)] * 16 + [torch.ones(rows)] * 16
    with Dispatched() as seen:
        selection = cuda_backend.gate_step(call).selection
        cuda_backend.gather_rows(TreeCall(tree, selection, rows))
    assert state.counter("steps") == 1
    assert scores.count + launched() - before == launches
    assert launched() - before == (2 if rows <= 65_536 else 3)
    memory = {"aten.empty.memory_format", "aten.empty_like.default", "aten.detach.default", "aten.view.dtype"}
    assert set(seen.names) <= memory | {"aten.empty_strided.default"}, set(seen.names) - memory
    cuda_backend._storage_bytes.cache_clear()


# What is compiled.


def built():
    if not hasattr(cuda_backend, "_cuda"):
        pytest.skip(str(cuda_backend._missing))
    return cuda_backend._cuda.__file__


def test_nvcc_at_hand_means_that_the_extension_is_there():
    nvcc = shutil.which("nvcc", path=str(Path(os.environ["CUDA_HOME"]) / "bin") if "CUDA_HOME" in os.environ else None)
    if nvcc is None or "SPARSE_KERNELS_BUILD" in str(cuda_backend._missing):
        pytest.skip("no nvcc, or a build without CUDA was asked for")
    assert cuda_backend._missing is None


def test_extension_imports_alone_without_a_driver():
    script = (
        "import importlib.util, sys; "
        f"spec = importlib.util.spec_from_file_location('sparse_kernels._cuda', {built()!r}); "
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        "assert 'torch' not in sys.modules; print(module.architectures)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == cuda_backend._cuda.architectures


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_the_runtime_within_is_not_exported():
    """Exported, it would be bound to PyTorch's own, of another version; and nothing links to a driver."""
    symbols = subprocess.run(["nm", "-D", built()], capture_output=True, text=True, check=True).stdout
    assert "PyInit__cuda" in symbols
    assert not [line for line in symbols.splitlines() if line.split()[-1].lstrip("_").startswith(("cuda", "cu"))]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_every_call_by_name_says_why():
    mask, reason = masks(9, 0.5), cuda_backend.unavailable_reason()
    assert reason is not None
    with pytest.raises(sk.BackendUnavailable, match="cannot serve this compact"):
        sk.compact(mask, backend="cuda")
    for op in (sk.gather_rows, sk.scatter_rows):
        with pytest.raises(sk.BackendUnavailable, match="'cuda' cannot serve"):
            op(torch.ones(9), sk.compact(torch.ones(9, dtype=torch.bool)), backend="cuda")
    assert sk.backend_info()["compact"]["others"]["cuda"] == reason
    if cuda_backend._missing is None:
        with pytest.raises(RuntimeError, match="CUDA: cudaDeviceGetAttribute"):
            cuda_backend._cuda.compact_storage_bytes(100_000, False, 0, 0)


def cuobjdump(*arguments, file=None):
    """What the tool says of a file, or else of the extension."""
    tool = shutil.which("cuobjdump")
    found = importlib.util.find_spec("triton")
    if tool is None and found is not None:
        tool = str(Path(found.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if tool is None or not Path(tool).exists():
        pytest.skip("no cuobjdump")
    return subprocess.run([tool, *arguments, str(file or built())], capture_output=True, text=True, check=True).stdout


OWN_KERNELS = ("move_rows", "compact_tiles", "count_shares", "pack_shares", "control_states")


def test_own_kernels_spill_nothing():
    lines = cuobjdump("-res-usage").splitlines()
    found = 0
    for name, usage in itertools.pairwise(lines):
        if "Function" in name and any(own in name for own in OWN_KERNELS):
            assert " STACK:0 " in usage, (name, usage)
            assert " LOCAL:0 " in usage, (name, usage)
            found += 1
    assert found >= len(OWN_KERNELS)


def code_of(name):
    """The instructions of each own kernel of that name, for the first architecture that was compiled for."""
    built()
    architecture = cuda_backend._cuda.architectures.split()[0].removesuffix("+PTX").replace(".", "")
    return kernels_of(cuobjdump("-sass", "-arch", f"sm_{architecture}"), name)


def kernels_of(code, name):
    """The instructions of each kernel of that name in disassembled code."""
    kernels = [part.split("\n", 1) for part in code.split("Function : ")]
    pattern = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z].*?)\s*;", flags=re.MULTILINE)
    return [pattern.findall(body) for mangled, body in kernels if name in mangled]


def test_rows_move_16_bytes_at_a_time():
    """Eight loads under way before the first store, in the gather and in the scatter."""
    kernels = code_of("move_rows")
    assert len(kernels) == 2
    for kernel in kernels:
        wide = [word[:3] for word in kernel if word.startswith(("LDG", "STG")) and ".128" in word]
        assert "LDG " * 8 in " ".join(wide) + " "
        assert wide.count("STG") >= 8


def assert_fenced(kernel):
    """A block's sums are in memory before it is counted, and are read anew after the last block was."""
    at = [i for i, word in enumerate(kernel) if word.startswith("ATOM")]
    assert len(at) == 1
    before, after = kernel[: at[0]], kernel[at[0] :]
    last_store = max(i for i, word in enumerate(before) if word.startswith("STG"))
    assert any(re.match(r"MEMBAR\.\w+\.GPU", word) for word in before[last_store:]), before[last_store:]
    # The count, a shuffle to the other lanes, a fence that empties the first-level cache, and then the first load.
    order = ["SHFL", "MEMBAR", "CCTL.IVALL", "LDG"]
    shuffle, fence, empty, load = (
        next((i for i, word in enumerate(after) if word.startswith(start)), len(after)) for start in order
    )
    assert shuffle < fence < empty < load, after[: load + 1]
    assert re.match(r"MEMBAR\.\w+\.GPU", after[fence])


def test_sums_of_a_block_are_in_memory_before_it_is_counted_and_read_anew_after():
    """The fences around the only atomic, which running on a CPU cannot test."""
    (kernel,) = code_of("compact_tiles")
    assert_fenced(kernel)


@pytest.mark.slow
@pytest.mark.parametrize("left_out", [None, 0, 1])
def test_a_missing_fence_is_seen(left_out, tmp_path):
    """The assertions above fail on a source without either of the fences."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    folder = tmp_path / "cuda"
    shutil.copytree(CSRC, folder)
    source = folder / "compact_tiles.cuh"
    parts = re.split(r"^ *__threadfence\(\);\n", source.read_text(), flags=re.MULTILINE)
    assert len(parts) == 3
    if left_out is not None:
        parts[left_out : left_out + 2] = [parts[left_out] + parts[left_out + 1]]
    source.write_text("__threadfence();\n".join(parts))
    cubin = tmp_path / "compact.cubin"
    options = ["-std=c++17", "-O3", "-arch=sm_90", "-cubin", f"-I{CSRC.parent / 'include'}"]
    subprocess.run([nvcc, *options, str(folder / "compact.cu"), "-o", str(cubin)], check=True)
    (kernel,) = kernels_of(cuobjdump("-sass", file=cubin), "compact_tiles")
    if left_out is None:
        assert_fenced(kernel)
    else:
        with pytest.raises(AssertionError):
            assert_fenced(kernel)


def test_no_kernel_waits_for_another_block():
    """No grid barrier, so none deadlocks beside a kernel that holds some of the processors."""
    for name in OWN_KERNELS:
        for kernel in code_of(name):
            atomics = [word for word in kernel if word.startswith(("ATOM", "RED"))]
            assert len(atomics) == (1 if name == "compact_tiles" else 0), (name, atomics)


@pytest.mark.slow
@pytest.mark.skipif("sanitize" in FLAGS, reason="running under them")
@pytest.mark.timeout(900)
def test_under_sanitizers():
    """The tests of test_cuda.py on a CPU, with every access to memory checked."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("no sanitizers")
    environment = {
        **os.environ,
        "CUDA_ON_CPU_FLAGS": SANITIZE,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONMALLOC": "malloc",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-qxs",
        "-p",
        "no:cacheprovider",
        "-k",
        "cpu",
        str(Path(__file__).with_name("test_cuda.py")),
    ]  # -s: their report
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert " passed" in done.stdout


# What only a GPU can tell.


class TestOnGpu:
    pytestmark = on_gpu

    def test_public_calls_by_name(self):
        mask, tree = masks(5000, 0.2).cuda(), (torch.randn(5000, 7).cuda(), torch.arange(5000).cuda())
        selection = sk.compact(mask, capacity=1500, backend="cuda")
        assert_same(selection, sk.compact(mask, capacity=1500, backend="torch"))
        taken = sk.gather_rows(tree, selection, backend="cuda")
        assert_same(taken, sk.gather_rows(tree, selection, backend="torch"))
        assert_same(
            sk.scatter_rows(taken, selection, backend="cuda"), sk.scatter_rows(taken, selection, backend="torch")
        )

    @pytest.mark.parametrize("rows", [10_000, 16_000_000])
    def test_captured_in_a_graph(self, rows):
        mask, tensor = masks(rows, 0.1).cuda(), torch.randn(rows, 3).cuda()

        def step():
            selection = cuda_backend.compact(CompactCall(mask, None, rows // 5))
            taken = gather(tensor, selection)
            return selection, taken, scatter(taken, selection)

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            selection, taken, placed = step()
        for seed in (1, 2):
            mask.copy_(masks(rows, 0.15, seed))
            tensor.normal_()
            graph.replay()
            torch.cuda.synchronize()
            wanted = reference.compact(CompactCall(mask, None, rows // 5))
            assert_same(selection, wanted)
            assert torch.equal(taken, tensor[wanted.index])
            assert torch.equal(placed, torch.where(mask[:, None], tensor, 0.0))

    def test_runs_on_the_current_stream_without_waiting(self):
        mask, tensor = masks(100_000, 0.1).cuda(), torch.randn(100_000, 64).cuda()
        gather(tensor, cuda_backend.compact(CompactCall(mask, None, 20_000)))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(torch.cuda.Stream()) as stream:
                stream = torch.cuda.current_stream()
                torch.cuda._sleep(200_000_000)  # what does not wait for this stream reads the old values
                tensor.fill_(3.0)
                taken = gather(tensor, cuda_backend.compact(CompactCall(mask, None, 20_000)))
                assert not stream.query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        assert (taken == 3.0).all()

    def test_on_another_device(self):
        if torch.cuda.device_count() < 2:
            pytest.skip("one GPU")
        mask, tensor = masks(100_000, 0.1).to("cuda:1"), torch.randn(100_000, 3, device="cuda:1")
        assert torch.cuda.current_device() == 0
        selection = cuda_backend.compact(CompactCall(mask, None, 20_000))
        taken = gather(tensor, selection)
        assert torch.cuda.current_device() == 0
        assert torch.ones(3, device="cuda").sum() == 3
        assert selection.index.device == taken.device == mask.device
        assert torch.equal(taken, tensor[selection.index])

    def test_the_same_run_after_run(self):
        mask = masks(3_000_000, 0.3).cuda()
        first = cuda_backend.compact(CompactCall(mask, None, 1_000_000))
        for _ in range(10):
            assert_same(cuda_backend.compact(CompactCall(mask, None, 1_000_000)), first)
