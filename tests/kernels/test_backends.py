"""The registry: what is active is what runs, and a named backend never falls back."""

import functools
import logging
import os
import platform
import subprocess
import sys
import types

import fresh
import pytest
import torch

import sparse_kernels as sk
from sparse_kernels import _dispatch
from sparse_kernels.backends import cpp_direct
from sparse_kernels.backends import cuda as cuda_backend


def test_info_names_the_active_backend_and_why_not_the_others():
    info = sk.backend_info()
    assert set(info) == {"row_stats", "gate_rows", "compact", "control", "gather_rows", "scatter_rows"}
    for entry in info.values():
        assert entry["active"] in _dispatch.BACKENDS
        assert set(entry["others"]) | {entry["active"]} >= {"torch"}
    assert "row_stats" in str(info)


@pytest.mark.skipif(
    os.environ.get("SPARSE_KERNELS_EXPECT") is None, reason="SPARSE_KERNELS_EXPECT names what must be active"
)
def test_the_expected_backend_is_active():
    """CI sets SPARSE_KERNELS_EXPECT=cpp, so that a fast path that silently went away is red."""
    wanted = os.environ["SPARSE_KERNELS_EXPECT"]
    for op in ("row_stats", "gate_rows", "compact", "gather_rows"):
        assert sk.backend_info()[op]["active"] == wanted


def test_the_active_backend_is_the_one_that_runs(monkeypatch):
    ran = []
    recorded = tuple(
        server._replace(serve=lambda call, server=server: (ran.append(server.backend), server.serve(call))[1])
        for server in _dispatch.TABLE["gate_rows"]
    )
    monkeypatch.setitem(_dispatch.TABLE, "gate_rows", recorded)
    monkeypatch.setattr(cpp_direct, "AVAILABLE", False)
    sk.gate_rows(torch.randn(4, 5), torch.tensor([0, 1, 2, 3]), torch.tensor([1.0]), weights={"loss": 1.0})
    assert ran == [sk.backend_info()["gate_rows"]["active"]]


EVERY_OPERATION = """
import torch, sparse_kernels as sk
logits, targets, weights = torch.randn(6, 5), torch.arange(6) % 5, {"loss": 1.0}
sk.row_stats(logits, targets)
state = sk.initial_state(1.0)
sk.gate_step(logits, targets, state, 0.5, weights=weights, capacity=3)
selected = sk.select(logits, targets, 1.0, weights=weights, tree=logits, capacity=3)
sk.control(state, selected.gated.significance, 0.5)
selection = sk.compact(selected.gated.mask, capacity=3)
sk.scatter_rows(sk.gather_rows(logits, selection), selection)
print(sk.backend_info())
"""


def run_with(script=EVERY_OPERATION, **variables):
    environment = {**os.environ, "TRITON_INTERPRET": "0", **variables}
    return fresh.run("-c", script, environment=environment)


@functools.cache
def run_by_default():
    return run_with().stdout


def active(table):
    """Operation and backend of each line that names one."""
    return [line.split()[:2] for line in table.splitlines() if not line.startswith(" ")]


def test_environment_forces_a_backend():
    forced = run_with(SPARSE_KERNELS_BACKEND="torch")
    assert "compact       torch (reference" in forced.stdout
    assert "not cpp: SPARSE_KERNELS_BACKEND=torch" in forced.stdout or sk.backends.cpp._missing
    assert forced.returncode == 0


@pytest.mark.parametrize("variable", ["SPARSE_KERNELS_BACKEND", "SPARSE_KERNELS_PREFER"])
@pytest.mark.parametrize("name", ["triton", "cuda", "gpu"])
def test_a_gpu_s_backend_for_the_process_leaves_cpu_tensors_and_other_operations_alone(variable, name):
    done = run_with(**{variable: name})
    assert done.returncode == 0, done.stderr
    assert active(done.stdout) == active(run_by_default())


@pytest.mark.parametrize("variable", ["SPARSE_KERNELS_BACKEND", "SPARSE_KERNELS_PREFER"])
def test_an_unknown_backend_is_one_line(variable):
    last = run_with(**{variable: "nonsense"}).stderr.splitlines()[-1]
    assert last.endswith("BackendUnavailable: unknown backend 'nonsense'; use one of cpp, triton, torch, cuda, gpu")


def test_a_preference_falls_back_where_a_demand_raises(monkeypatch, caplog):
    logits = torch.randn(2, 2, 2, 2, 2, 3).permute(4, 3, 2, 1, 0, 5)  # more dimensions than C++ walks
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    if cpp_direct._cpp is None:
        pytest.skip("the C++ backend is not built")
    monkeypatch.setattr(_dispatch, "_logged", set())
    monkeypatch.setattr(_dispatch, "_preferred", "cpp")
    with caplog.at_level(logging.INFO, logger="sparse_kernels"):
        for _ in range(2):
            sk.row_stats(logits, targets)
    assert [record.getMessage() for record in caplog.records if "cpp not used" in record.getMessage()][1:] == []
    monkeypatch.setattr(_dispatch, "_forced", "cpp")
    with pytest.raises(sk.BackendUnavailable, match="backend 'cpp' cannot serve this row_stats: logits of strides"):
        sk.row_stats(logits, targets)


def test_a_preferred_reference_serves(monkeypatch):
    monkeypatch.setattr(_dispatch, "_preferred", "torch")
    monkeypatch.setattr(sk.backends.cpp, "row_stats", lambda call: pytest.fail("C++ served"))
    sk.row_stats(torch.randn(2, 3), torch.tensor([0, 1]))
    assert sk.backend_info()["row_stats"]["active"] == "torch"


def test_the_family_says_why_each_of_it_cannot_serve(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(sk.BackendUnavailable, match="backend 'gpu' cannot serve this row_stats: triton: ") as error:
        sk.row_stats(torch.randn(2, 3), torch.tensor([0, 1]), backend="gpu")
    assert "\n" not in str(error.value)
    with pytest.raises(sk.BackendUnavailable, match="backend 'gpu' cannot serve this compact: cuda: "):
        sk.compact(torch.ones(2, dtype=torch.bool), backend="gpu")
    with pytest.raises(sk.BackendUnavailable, match="backend 'triton' has no compact; use one of cpp, cuda, torch"):
        sk.compact(torch.ones(2, dtype=torch.bool), backend="triton")


def test_a_gpu_s_tensors_are_offered_to_its_kernels_and_no_others():
    """By the table alone: C++ first on a CPU, the kernels of a GPU on one, and the reference behind both."""

    def order(op, kind):
        return [s.backend for s in _dispatch.TABLE[op] if not s.by_name and (s.kinds is None or kind in s.kinds)]

    for op in ("row_stats", "gate_rows"):
        assert order(op, "cpu") == ["cpp", "torch"]
        assert order(op, "cuda") == ["triton", "torch"]
    for op in ("compact", "control", "gather_rows", "scatter_rows"):
        assert order(op, "cpu") == ["cpp", "torch"]
        assert order(op, "cuda") == ["cuda", "torch"]
    for op in ("select", "gate_step"):
        assert order(op, "cuda") == ["cuda"]
    assert order("compact", "mps") == ["torch"]


COMPILED = "7.5 8.0 9.0a 10.0 12.0+PTX"


@pytest.mark.parametrize(
    ("capability", "runtime", "driver", "reason"),
    [
        ((7, 5), 12040, 12020, None),
        ((8, 9), 12040, 12020, None),  # machine code of 8.0
        ((9, 0), 12040, 12020, None),
        ((9, 1), 12040, 12020, "the device is 9.1: build on this machine"),  # 9.0a is for 9.0 alone
        ((7, 0), 12040, 12040, 'the device is 7.0: build on this machine, or set TORCH_CUDA_ARCH_LIST="7.0"'),
        ((12, 1), 12040, 12020, None),
        ((13, 0), 12040, 12060, None),  # PTX
        ((13, 0), 12040, 12020, "the driver cannot compile PTX of CUDA 12.4"),
    ],
)
def test_the_device_is_compared_with_what_was_compiled(capability, runtime, driver, reason):
    found = cuda_backend.architecture_reason(COMPILED, capability, runtime, driver)
    assert found is None if reason is None else reason in found


def test_the_driver_is_compared_with_the_runtime():
    assert cuda_backend.driver_reason(12040, 12020) is None
    assert cuda_backend.driver_reason(12040, 13000) is None
    assert "built with CUDA 13.0, and the driver supports up to 12.8" in cuda_backend.driver_reason(13000, 12080)
    assert cuda_backend.driver_reason(12040, 0) == "no NVIDIA driver"


def test_a_device_is_looked_at_once(monkeypatch):
    looks = []

    def versions():
        looks.append(1)
        return 13000, 12080

    extension = types.SimpleNamespace(versions=versions, architectures="9.0")
    monkeypatch.setattr(cuda_backend, "_cuda", extension, raising=False)
    monkeypatch.setattr(cuda_backend, "_missing", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 97)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for _ in range(3):
        assert "the driver supports up to 12.8" in cuda_backend.unavailable_reason()
    assert looks == [1]


def test_fallback_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(_dispatch, "_logged", set())
    logits = torch.randn(2, 2, 2, 2, 2, 3).permute(4, 3, 2, 1, 0, 5)  # more dimensions than C++ walks
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    with caplog.at_level(logging.INFO, logger="sparse_kernels"):
        for _ in range(3):
            sk.row_stats(logits, targets)
    assert len([r for r in caplog.records if "cpp not used" in r.getMessage()]) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logits": torch.ones(2, 3, dtype=torch.int32)}, "int32"),
        ({"targets": torch.ones(2)}, "float32"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"`targets` must have shape \(2,\).* got \(3,\)"),
        ({"targets": torch.tensor([0, 3])}, r"target 3 in row 1 is out of range: it must be in \[0, 2\]"),
        ({"targets": torch.tensor([-1, 0], dtype=torch.int32)}, "target -1 in row 0"),
        ({"targets": torch.zeros(2, dtype=torch.int64, device="meta")}, "meta"),
        ({"logits": torch.ones(2, 0)}, "no classes"),
        ({"logits": torch.tensor(1.0)}, "`dim` must be .* got -1"),
        ({"dim": 2}, "`dim` must be .* got 2"),
        ({"temperature": 0.0}, "`temperature` must be above 0, got 0.0"),
        ({"softcap": -1.0}, "`softcap` must be .* got -1.0"),
        ({"label_smoothing": 1.5}, "`label_smoothing` must be .* got 1.5"),
        ({"outputs": ["loss", "nonsense"]}, "nonsense"),
        ({"backend": "nonsense"}, "use one of cpp, triton, torch, cuda, gpu"),
        ({"threshold": torch.ones(2)}, "one floating element"),
        ({"threshold": torch.ones(1, device="meta")}, "`threshold` must be on cpu as the logits, got meta"),
        ({"weights": {}}, "`weights` must name"),
        ({"weights": {"argmax": 1.0}}, "argmax"),
        ({"offset": torch.ones(3)}, r"offset.*\(2,\)"),
        ({"gate_temperature": -1.0}, "`gate_temperature` must be .* got -1.0"),
        ({"p_min": 2.0}, "`p_min` must be .* got 2.0"),
    ],
)
@pytest.mark.parametrize("backend", [None, "torch"])
def test_bad_input_is_one_clear_line(settings, message, backend):
    call = {
        "logits": torch.randn(2, 3),
        "targets": torch.tensor([0, 1]),
        "threshold": torch.tensor([0.5]),
        "weights": {"loss": 1.0},
        "backend": backend,
    }
    call.update(settings)
    with pytest.raises((ValueError, TypeError), match=message) as error:
        sk.gate_rows(call.pop("logits"), call.pop("targets"), call.pop("threshold"), **call)
    assert "\n" not in str(error.value)


def test_command_ends_quietly_when_its_reader_has_seen_enough():
    """As in `python -m sparse_kernels | head -1`: the pipe is closed before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "sparse_kernels"], stdout=closed, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.stderr == ""
    assert done.returncode == 0


def test_command_prints_the_table():
    done = subprocess.run([sys.executable, "-m", "sparse_kernels"], capture_output=True, text=True, check=True)
    assert f"sparse-kernels {sk.__version__}" in done.stdout
    assert "gate_rows" in done.stdout


@pytest.mark.parametrize("name", ["portable", "avx2", "avx512", "neon"])
def test_instruction_set_is_forced_by_the_environment_or_refused(name):
    if sk._dispatch.BACKENDS["cpp"].unavailable_reason():
        pytest.skip("the C++ backend is not built")
    available = sk.backends.cpp._cpp.instruction_sets()
    environment = {**os.environ, "SPARSE_KERNELS_CPU": name}
    done = fresh.run("-m", "sparse_kernels", environment=environment)
    if name in available:
        assert f"cpp ({name}" in done.stdout
    else:
        assert done.returncode != 0
        assert name in done.stderr


def test_no_torch_library_is_linked():
    """One build serves every PyTorch: the extension must not need any of its libraries."""
    if sk._dispatch.BACKENDS["cpp"].unavailable_reason():
        pytest.skip("the C++ backend is not built")
    with open(sk.backends.cpp._cpp.__file__, "rb") as file:
        content = file.read()
    assert b"libtorch" not in content
    assert b"libc10" not in content


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="no /proc/cpuinfo to compare with")
def test_the_widest_instruction_set_is_in_use():
    if sk._dispatch.BACKENDS["cpp"].unavailable_reason() or os.environ.get("SPARSE_KERNELS_CPU"):
        pytest.skip("the C++ backend is not built, or forced to an instruction set")
    with open("/proc/cpuinfo") as file:
        flags = next((set(line.split()) for line in file if line.startswith("flags")), set())
    wanted = "avx512" if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags else "portable"
    if wanted == "portable" and {"avx2", "fma", "f16c"} <= flags:
        wanted = "avx2"
    if platform.machine() == "aarch64":
        wanted = "neon"
    assert sk.backends.cpp._cpp.instruction_set() == wanted
