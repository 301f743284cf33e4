"""The CUDA kernels: run on a CPU by tests/cuda_on_cpu in every run, and on a GPU where there is one.

Both run the same host and device code of csrc/cuda and the same sparse_kernels/backends/cuda.py, against the reference.
"""

import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from test_control import assert_same_step, copy_of, random_states

import sparse_kernels as sk
from sparse_kernels import ControlState, control_law, reference
from sparse_kernels._arguments import CompactCall, ControlCall, GateStepCall, SelectCall, Settings, TreeCall
from sparse_kernels.backends import cuda as cuda_backend
from sparse_kernels.backends.triton import backend as triton_backend

pytestmark = pytest.mark.any_pytorch
ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc" / "cuda"
SANITIZE = "-O0 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fsanitize-sections=cuda_shared"
# How the kernels are built for a CPU: the last test but the GPU's sets it.
FLAGS = os.environ.get("CUDA_ON_CPU_FLAGS", "-O1")

MISSING = cuda_backend.unavailable_reason()  # not built, or no GPU
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=f"the CUDA backend: {MISSING}")]


@pytest.fixture(scope="session")
def cuda_on_cpu():
    """The extension with tests/cuda_on_cpu in place of CUDA."""
    return build_cuda_on_cpu()


@functools.cache
def build_cuda_on_cpu(csrc=CSRC.parent, more=()):
    """Return the extension of a folder's sources, built with more of the compiler's options.

    Builds are kept in build/cuda_on_cpu, by all that goes into them: several files' tests, in two processes, need one.
    """
    pybind11 = pytest.importorskip("pybind11")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    emulation = ROOT / "tests" / "cuda_on_cpu"
    options = [*more, *f"-std=c++17 {FLAGS} -fPIC -fvisibility=hidden -Wall -Wextra -Werror".split()]
    options += ["-Wno-unknown-pragmas", "-Wno-clobbered"]  # unroll; getcontext returns once here
    content = hashlib.sha256(repr((options, compiler, sys.version, pybind11.__version__)).encode())
    for path in (path for folder in (csrc, emulation) for path in sorted(folder.rglob("*")) if path.is_file()):
        content.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    includes = [csrc / "include", emulation, sysconfig.get_path("include"), pybind11.get_include()]
    options += [f"-I{path}" for path in includes]
    builds = ROOT / "build" / "cuda_on_cpu"
    builds.mkdir(parents=True, exist_ok=True)
    library = builds / content.hexdigest()[:16] / "_cuda.so"
    with (builds / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            for old in sorted(builds.glob("*/"), key=os.path.getmtime)[:-5]:
                shutil.rmtree(old)
            with tempfile.TemporaryDirectory(dir=builds) as folder:
                _compile(compiler, options, csrc, Path(folder))
                library.parent.mkdir(exist_ok=True)
                (Path(folder) / "_cuda.so").replace(library)
    name = f"{library.parent.name}._cuda"  # pybind11 gives a name's first module again, whatever the file of the second
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


def _compile(compiler, options, csrc, folder):
    sources = [csrc / "bindings" / "cuda_module.cpp", *(csrc / "cuda").glob("*.cu")]
    objects = [str(folder / f"{source.name}.o") for source in sources]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # not the compiler
    running = [
        subprocess.Popen([compiler, *options, "-c", "-x", "c++", str(source), "-o", to], env=environment)
        for source, to in zip(sources, objects, strict=True)
    ]
    assert [process.wait() for process in running] == [0] * len(sources)
    link = [compiler, *FLAGS.split(), "-shared", *objects, "-o", str(folder / "_cuda.so")]
    subprocess.run(link, env=environment, check=True)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=on_gpu)])
def device(request, monkeypatch):
    """Where the kernels run: cuda_backend itself is the same."""
    if request.param == "cpu":
        monkeypatch.setattr(cuda_backend, "_cuda", request.getfixturevalue("cuda_on_cpu"), raising=False)
        monkeypatch.setattr(cuda_backend, "_enqueue", lambda function, device, *arguments: function(*arguments, 0, 0))
        cuda_backend._storage_bytes.cache_clear()
    else:
        reason = cuda_backend.unavailable_reason()
        assert reason is None, reason
    return request.param


def masks(rows, density, seed=0):
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < density


def assert_same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a.cpu(), b.cpu())
        else:
            assert a == b


def compact_both(mask, weight, capacity):
    call = CompactCall(mask, weight, capacity)
    assert_same(cuda_backend.compact(call), reference.compact(call))


# A lane, a warp's flags, a tile, the last rows dealt out in tiles, and the first in shares.
@pytest.mark.parametrize(
    ("rows", "density"),
    [(rows, density) for rows in (0, 1, 31, 33, 127, 129, 4095, 4096, 4097) for density in (0.0, 0.1, 1.0)]
    + [(30_000, 0.1), (65_536, 0.3), (65_536, 1.0), (65_537, 0.3), (200_000, 0.1)],
)
def test_compact_is_the_reference(device, rows, density):
    # Misaligned by what the seed says: the mask is counted 16 bytes at a time.
    mask = masks(rows + 16, density, rows).to(device)[rows % 17 :][:rows]
    kept = int(mask.sum())
    compact_both(mask, None, None)
    compact_both(mask, torch.rand(rows, device=device), kept // 2)
    compact_both(mask, torch.rand(rows, device=device), kept + 3000)


@hypothesis.settings(
    max_examples=25, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    flags=st.lists(st.booleans(), max_size=300),
    capacity=st.none() | st.integers(0, 320),
    stride=st.sampled_from([1, 3]),
)
def test_compact_of_any_mask(device, flags, capacity, stride):
    mask = torch.tensor([f for f in flags for _ in range(stride)], dtype=torch.bool, device=device)[::stride]
    compact_both(mask, None, capacity)


def test_any_byte_but_zero_is_a_set_flag(device):
    """A bool tensor may be a view of other bytes: the count and the ranks agree about them."""
    values = torch.tensor([0, 1, 2, 128, 255, 0, 127] * 900, dtype=torch.uint8, device=device)
    found = cuda_backend.compact(CompactCall(values.view(torch.bool), None, 6000))
    wanted = values.cpu().nonzero().squeeze(-1)
    assert found.count == len(wanted)
    assert torch.equal(found.index[: len(wanted)].cpu(), wanted)


def select(mask, capacity=None, device="cpu"):
    return reference.compact(CompactCall(mask.to(device), None, capacity))


def gather(tree, selection):
    return cuda_backend.gather_rows(TreeCall(tree, selection, selection.size))


def scatter(tree, selection):
    return cuda_backend.scatter_rows(TreeCall(tree, selection, selection.index.shape[0]))


SIZES = [1, 2, 3, 4, 8, 12, 15, 16, 17, 24, 33, 60, 64, 100, 511, 512, 513, 4095, 4096, 4097, 9000, 12_288]


@pytest.mark.parametrize("row_bytes", SIZES)
def test_rows_of_any_size_and_alignment(device, row_bytes):
    rows = 40
    selection = select(masks(rows, 0.4, row_bytes), 20, device)
    for offset in (0, 1, 2, 4, 8, 12, 16):
        buffer = torch.randint(0, 256, (rows * row_bytes + 16,), dtype=torch.uint8, device=device)
        tensor = buffer[offset:][: rows * row_bytes].view(rows, row_bytes)
        assert torch.equal(gather(tensor, selection), tensor[selection.index])
        packed = buffer[offset:][: 20 * row_bytes].view(20, row_bytes)
        assert torch.equal(scatter(packed, selection), reference.scatter_tensor(packed, selection))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 5, 7), (0,), (2, 0)])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64]
)
def test_types_and_shapes(device, dtype, shape):
    tensor = (100 * torch.rand(30, *shape)).to(dtype).to(device)
    selection = select(masks(30, 0.3), 12, device)
    taken = gather(tensor, selection)
    assert taken.dtype == dtype
    assert torch.equal(taken, tensor[selection.index])
    placed = scatter(taken, selection)
    assert placed.dtype == dtype
    assert torch.equal(placed, reference.scatter_tensor(taken, selection))


def test_many_tensors_of_a_tree(device):
    selection = select(masks(50, 0.5), 30, device)
    tree = {"name": "batch", **{i: torch.randn(50, i % 7, device=device) for i in range(70)}}  # three launches
    taken = gather(tree, selection)
    assert taken.pop("name") == "batch"
    placed = scatter(taken, selection)
    for i, rows in taken.items():
        assert torch.equal(rows, tree[i][selection.index])
        assert torch.equal(placed[i], reference.scatter_tensor(rows, selection))


def test_rows_that_lie_anywhere_are_not_copied_first(device):
    wide = torch.randn(40, 9, 6, device=device)
    images = torch.randn(40, 3, 4, 5, device=device)
    views = [
        wide[::2], wide[:20, 3:6], wide[:20, 4], wide[:1].expand(20, 9, 6), wide[:20].transpose(1, 2), wide[:20, :, 0],
        images[:20].to(memory_format=torch.channels_last), images[::2], images[:20].flip(0),
    ]  # fmt: skip
    selection = select(masks(20, 0.5), 15, device)
    taken = gather(views, selection)
    for view, rows in zip(views, taken, strict=True):
        assert torch.equal(rows, view[selection.index])
    assert taken[6].is_contiguous(memory_format=torch.channels_last)
    turned = [rows.movedim(-1, 1) for rows in taken]
    for rows, found in zip(turned, scatter(turned, selection), strict=True):
        assert torch.equal(found, reference.scatter_tensor(rows, selection))


def test_conjugated_and_negated_views_are_their_values(device):
    tensor = torch.randn(10, 3, dtype=torch.complex64, device=device)
    selection = select(masks(10, 0.5), device=device)
    for view in (tensor.conj(), tensor.conj().imag):
        assert torch.equal(gather(view, selection), view[selection.index])
        assert torch.equal(scatter(gather(view, selection), selection)[selection.index], view[selection.index])


def test_a_bad_index_reads_and_writes_nothing_out_of_bounds(device):
    tensor = torch.arange(1, 11, device=device).float().repeat(3, 1).t().contiguous()
    index = torch.tensor([3, -1, 10, 2**62, -(2**63), 9], device=device)
    selection = sk.Selection(index, torch.ones(6), torch.tensor(6, device=device), torch.tensor(0), 10)
    assert gather(tensor, selection)[:, 0].tolist() == [4, 0, 0, 0, 0, 10]
    assert scatter(tensor[:6], selection)[:, 0].tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 6]
    # Counts that no compaction gives, of a type that it does not give.
    for count, wanted in ((-5, []), (1, [3]), (100, [3, 9])):
        other = selection._replace(count=torch.tensor(count, device=device))
        assert scatter(tensor[:6], other)[:, 0].nonzero().flatten().tolist() == wanted
    narrow = selection._replace(index=torch.tensor([1, 2], dtype=torch.int32, device=device))
    assert gather(tensor, narrow)[:, 0].tolist() == [2, 3]


def test_no_rows_at_all(device):
    empty = select(torch.zeros(0, dtype=torch.bool), 4, device)
    assert torch.equal(gather(torch.ones(0, 3, device=device), empty), torch.zeros(4, 3, device=device))
    assert scatter(torch.ones(4, 3, device=device), empty).shape == (0, 3)
    none = select(masks(5, 0.0), device=device)
    assert gather(torch.ones(5, 3, device=device), none).shape == (0, 3)
    assert gather(("no", "tensors"), none) == ("no", "tensors")


def test_offsets_beyond_32_bits(device):
    row_bytes = 1 << 20
    rows = 4200 if device == "cuda" else 2**31 // row_bytes + 60
    if device == "cuda":
        tensor = torch.zeros(rows, row_bytes, dtype=torch.uint8, device=device)
    else:
        tensor = torch.from_numpy(np.zeros((rows, row_bytes), np.uint8))  # of this, only what is touched is there
    last = torch.tensor([0, rows - 3, rows - 1], device=device)
    tensor[last] = torch.tensor([[1], [2], [3]], dtype=torch.uint8, device=device)
    selection = sk.Selection(last, torch.ones(3), torch.tensor(3), torch.tensor(0), rows)
    assert torch.equal(gather(tensor, selection), tensor[last])


def test_a_selected_batch_goes_back_where_it_came_from(device):
    mask, tensor = masks(70_000, 0.1).to(device), torch.randn(70_000, 5, device=device)
    selection = cuda_backend.compact(CompactCall(mask, None, 8000))
    assert 0 < int(selection.count) < 8000
    placed = scatter(gather(tensor, selection), selection)
    assert torch.equal(placed, torch.where(mask[:, None], tensor, 0.0))


# The controller, and a gate's step in two launches.


def assert_step(before, ours, significance, setpoint, **options):
    """``ours`` is ``before`` moved by these rows, as near to the law in float64 as the reference is."""
    reference_state = copy_of(before)
    sk.control(reference_state, significance, setpoint, backend="torch", **options)
    if not significance.numel():
        assert all(torch.equal(a, b) for a, b in zip(ours, reference_state, strict=True))
        return
    labels, mass = options.get("labels"), options.get("mass")
    valid = None if labels is None else labels != options["ignore_index"]
    wide = ControlState(before.values.double(), before.counters)
    batch = control_law.summarise(
        significance.double(), valid, None if mass is None else mass.double(), wide.value("threshold"),
        options.get("gate_temperature", 0.0), options.get("p_min", 0.0),
    )  # fmt: skip
    exact = control_law.advance(wide, batch, setpoint.double(), options.get("overflow"))
    assert_same_step(before, ours, reference_state, exact)


def versions(state):
    """By them autograd knows whether what it had saved of a state is still there."""
    return [tensor._version for tensor in state]


def rows_to_score(rows, seed, device):
    """Significance with what is not finite in it, labels of which 7 is ignored, and masses."""
    g = torch.Generator().manual_seed(seed)
    significance = torch.randn(rows, generator=g).exp()
    kinds = torch.rand(rows, generator=g)
    for share, value in ((0.01, np.nan), (0.02, np.inf), (0.03, -np.inf)):
        significance[(kinds > share - 0.01) & (kinds <= share)] = value
    labels = torch.randint(0, 10, (rows,), generator=g)
    mass = torch.rand(rows, generator=g) * (torch.rand(rows, generator=g) < 0.9)
    return significance.to(device), labels.to(device), mass.to(device)


def one_state(seed, device):
    """A state as runs reach, of significance about 1."""
    state = random_states(seed, torch.ones(2000))
    return ControlState(state.values[seed].to(device).contiguous(), state.counters[seed].to(device).contiguous())


# One row, one tile, five of them, and shares; with labels of each width, masses and draws now and then.
@pytest.mark.parametrize(
    ("rows", "labels_dtype", "with_mass", "temperature"),
    [
        (0, torch.int64, False, 0.0), (1, torch.int64, False, 0.0), (700, torch.int32, True, 0.0),
        (4096, None, False, 0.5), (18_000, torch.int64, False, 0.0), (18_000, torch.int32, True, 0.5),
        (66_000, torch.int64, False, 0.0), (70_001, torch.int32, True, 0.5),
    ],
)  # fmt: skip
def test_compaction_with_a_controller(device, rows, labels_dtype, with_mass, temperature):
    significance, labels, mass = rows_to_score(rows, rows, device)
    labels = None if labels_dtype is None else labels.to(labels_dtype)
    mass = mass if with_mass else None
    state, mask = one_state(rows % 50 + 1, device), significance > 1.5
    before, setpoint = copy_of(state), torch.tensor(0.3, device=device)
    invalid = torch.full((), 99, dtype=torch.int32, device=device)
    law = {"gate_temperature": temperature, "p_min": 0.02 if temperature else 0.0}
    capacity = int(mask.sum()) // 2 + 3
    storage = cuda_backend._storage(rows, True, mask.device)
    storage[:1] = 0
    settings = Settings(ignore_index=7, **law)
    operands = cuda_backend._control(significance, settings, labels, mass, state, setpoint, invalid)
    found = cuda_backend._compact(mask, None, capacity, operands, storage, torch.empty_like(invalid))
    assert_same(found, reference.compact(CompactCall(mask, None, capacity)))
    assert invalid == (significance.isnan() & (labels != 7 if labels is not None else True)).sum()
    assert_step(
        before, state, significance, setpoint, labels=labels, ignore_index=7, mass=mass, overflow=found.overflow, **law
    )
    for _ in range(1 if rows > 65_536 else 2):  # whichever block comes last
        again, storage[:1] = copy_of(before), 0
        operands = cuda_backend._control(significance, settings, labels, mass, again, setpoint, invalid)
        assert_same(cuda_backend._compact(mask, None, capacity, operands, storage, torch.empty_like(invalid)), found)
        assert torch.equal(again.counters, state.counters)
        assert torch.equal(again.values.view(torch.int32), state.values.view(torch.int32))


@pytest.mark.parametrize("labels_dtype", [None, torch.bool, torch.int32])
def test_states_side_by_side(device, labels_dtype):
    rows, states = 1500, 5
    significance, labels, mass = (x.view(states, rows) for x in rows_to_score(states * rows, 3, device))
    labels = None if labels_dtype is None else labels != 7 if labels_dtype is torch.bool else labels.to(labels_dtype)
    many = random_states(1, torch.ones(2000))
    state = ControlState(many.values[:states].to(device), many.counters[:states].to(device))
    before = copy_of(state)
    setpoint = torch.tensor([0.1, 0.5, 1.0, 0.0, torch.nan], device=device)
    overflow = torch.tensor([5, 0, 7, 0, 3], device=device).int()
    options = {
        "labels": labels, "ignore_index": 0 if labels_dtype is torch.bool else 7, "mass": mass, "overflow": overflow,
        "gate_temperature": 0.5, "p_min": 0.02,
    }  # fmt: skip
    numbers = {name: options[name] for name in ("ignore_index", "gate_temperature", "p_min")}
    tensors = {name: options[name] for name in ("labels", "mass", "overflow")}
    versions_before = versions(state)
    cuda_backend.control(ControlCall(state, significance, setpoint, **tensors, settings=Settings(**numbers)))
    assert_step(before, state, significance, setpoint, **options)
    assert all(now > then for now, then in zip(versions(state), versions_before, strict=True))
    state = copy_of(before)
    cuda_backend.control(ControlCall(state, significance[:, :0], setpoint, None, None, None, Settings()))
    assert_step(before, state, significance[:, :0], setpoint)


def gate_step_call(rows, device, capacity, state, temperature=0.0, by_mass=False):
    torch.manual_seed(rows)
    logits, targets = 2 * torch.randn(rows, 4), torch.arange(rows) % 4
    logits[5::100] = np.nan
    targets[::9] = -100
    return GateStepCall(
        logits.to(device), targets.to(device), ("grad_norm",) if by_mass else (), -1,
        Settings(gate_temperature=temperature, p_min=0.05 if temperature else 0.0, seed=3, step=state.counters[0]),
        state.values, {"loss": 1.0}, None, capacity, state, torch.tensor(0.3, device=device), by_mass,
    )  # fmt: skip


# Five tiles: each step's count of blocks begins at 0, which only its scores' launch can have seen to.
@pytest.mark.parametrize(("rows", "temperature", "by_mass"), [(200, 0.0, False), (200, 0.5, False), (4100, 0.0, True)])
def test_gate_step_is_the_three_one_after_the_other(device, rows, temperature, by_mass):
    if triton_backend.unavailable_reason():
        pytest.skip(triton_backend.unavailable_reason())
    state = control_law.initial_state(torch.tensor(1.5, device=device))
    for _ in range(3):
        call, before = gate_step_call(rows, device, rows // 3, state, temperature, by_mass), copy_of(state)
        gated = triton_backend.gate_rows(call)
        versions_before = versions(state)
        found = cuda_backend.gate_step(call)
        assert all(now > then for now, then in zip(versions(state), versions_before, strict=True))
        assert found.packed is None
        assert 0 < int(gated.mask.sum()) < rows
        for a, b in zip(found.gated[:3], gated[:3], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert found.gated.invalid == gated.invalid == gated.significance.isnan().sum()
        assert_same(found.selection, reference.compact(CompactCall(gated.mask, gated.weight, rows // 3)))
        assert_step(
            before, state, gated.significance, call.setpoint, labels=call.targets, ignore_index=-100,
            mass=gated.stats.grad_norm, overflow=found.selection.overflow, gate_temperature=temperature,
            p_min=call.settings.p_min,
        )  # fmt: skip
    assert state.counter("steps") == 3


@pytest.mark.parametrize("capacity", [None, 40])
def test_select_scores_packs_and_gathers(device, capacity):
    if triton_backend.unavailable_reason():
        pytest.skip(triton_backend.unavailable_reason())
    torch.manual_seed(0)
    logits, targets = torch.randn(10, 4, 20, device=device), torch.arange(200, device=device).view(10, 20) % 4
    logits[3, 0, 7] = np.nan
    tree = {"x": torch.randn(200, 5, device=device), "y": targets.flatten()}
    call = SelectCall(
        logits, targets, (), 1, Settings(), torch.tensor(1.7, device=device), {"loss": 1.0}, None, tree, capacity,
    )  # fmt: skip
    gated, selection, packed = cuda_backend.select(call)
    wanted = triton_backend.gate_rows(call)
    assert torch.equal(gated.mask, wanted.mask)
    assert gated.invalid == wanted.invalid == 1
    assert_same(selection, reference.compact(CompactCall(wanted.mask.flatten(), None, capacity)))
    assert torch.equal(packed["x"], tree["x"][selection.index])
    assert torch.equal(packed["y"], tree["y"][selection.index])
