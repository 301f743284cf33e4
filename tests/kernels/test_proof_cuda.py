"""Proof of the CUDA kernels, run on a CPU by tests/cuda_on_cpu: a fault planted in each is caught."""

import ctypes
import os
from types import SimpleNamespace

import pytest
import torch
from proof_parts import forget, kept, no_check, unproved, warned
from test_cuda import cuda_on_cpu  # noqa: F401  a fixture

pytest.importorskip("triton")

import sparse_kernels as sk
from sparse_kernels.backends import cuda as cuda_backend
from sparse_kernels.self_check import proof

pytestmark = [
    pytest.mark.any_pytorch,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # NumPy, on NaN and inf
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="nothing is interpreted"),
]
WEIGHTS = {"loss": 1.0}


@pytest.fixture(autouse=True)
def process(monkeypatch, tmp_path, cuda_on_cpu):  # noqa: F811
    unproved(monkeypatch, tmp_path)
    monkeypatch.setattr(proof, "LIMIT", float("inf"))  # each CUDA thread is a fiber
    monkeypatch.setattr(cuda_backend, "_cuda", cuda_on_cpu, raising=False)
    monkeypatch.setattr(cuda_backend, "_enqueue", lambda function, device, *arguments: function(*arguments, 0, 0))
    monkeypatch.setattr(cuda_backend, "_tensor_unsupported_reason", lambda tensor: None)
    cuda_backend._storage_bytes.cache_clear()


def flags():
    return torch.tensor([True, False, True, True, False])


def selection():
    return sk.compact(flags(), capacity=4, backend="torch")


def stepped(operation):
    """The state after the operation, as one of its results."""
    before = sk.initial_state(1.0)
    return operation(before), before


def functions():
    """The extension's, by name."""
    return {name: getattr(cuda_backend._cuda, name) for name in dir(cuda_backend._cuda) if not name.startswith("_")}


CALLS = {
    "compact": lambda **more: sk.compact(flags(), capacity=4, **more),
    "gather_rows": lambda **more: sk.gather_rows(torch.arange(15.0).view(5, 3), selection(), **more),
    "scatter_rows": lambda **more: sk.scatter_rows(torch.arange(12.0).view(4, 3), selection(), **more),
    "control": lambda **more: stepped(lambda s: sk.control(s, torch.arange(9.0), 0.3, **more)),
    "select": lambda **more: sk.select(*scored(), 1.5, weights=WEIGHTS, capacity=4, tree=torch.arange(9), **more),
    "gate_step": lambda **more: stepped(lambda s: sk.gate_step(*scored(), s, 0.3, weights=WEIGHTS, capacity=4, **more)),
}


def scored():
    torch.manual_seed(0)
    return torch.randn(9, 4), torch.arange(9) % 4


def leaves(result):
    return [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]


def assert_same(found, right):
    for a, b in zip(leaves(found), leaves(right), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("op", CALLS)
def test_what_agrees_serves_and_its_verdict_is_kept(op, monkeypatch, tmp_path, caplog):
    right = CALLS[op](backend="torch")
    found = CALLS[op]()
    assert warned(caplog) == []
    assert_same(found, right)
    dtype = " float32" if op in ("select", "gate_step") else ""
    assert kept(tmp_path)[f"cuda {op}{dtype}"] == ""
    forget(monkeypatch)
    no_check(monkeypatch)
    calls = []
    name = {"select": "compact", "gate_step": "compact"}.get(op, op)
    through = getattr(cuda_backend._cuda, name)
    watched = functions()
    watched[name] = lambda *arguments: (calls.append(name), through(*arguments))[1]
    monkeypatch.setattr(cuda_backend, "_cuda", SimpleNamespace(**watched))
    assert_same(CALLS[op](), right)
    assert calls  # the kernel serves


def add(address, kind, amount=1):
    """Spoil one number of what a kernel wrote, if it did."""
    if address:
        kind.from_address(address).value += amount


# Arguments of the extension's functions, as cuda.py passes them.
FAULTS = {
    "index of compact": ("compact", "compact", lambda a: a[3] and add(a[4], ctypes.c_int64)),
    "weight of compact": ("compact", "compact", lambda a: a[3] and add(a[5], ctypes.c_float)),
    "count of compact": ("compact", "compact", lambda a: add(a[6], ctypes.c_int32)),
    "overflow of compact": ("compact", "compact", lambda a: add(a[7], ctypes.c_int32)),
    "gather_rows": ("gather_rows", "gather_rows", lambda a: add(a[0][0][1], ctypes.c_uint8)),
    "scatter_rows": ("scatter_rows", "scatter_rows", lambda a: add(a[0][0][1], ctypes.c_uint8)),
    "values of control": ("control", "control", lambda a: add(a[0][4], ctypes.c_float, 0.01)),
    "counters of control": ("control", "control", lambda a: add(a[0][5], ctypes.c_int64)),
    "index of select": ("select", "compact", lambda a: a[3] and add(a[4], ctypes.c_int64)),
    "invalid of": ("select", "compact", lambda a: a[8] and add(a[8][7], ctypes.c_int32)),
    "packed rows of select": ("select", "gather_rows", lambda a: add(a[0][0][1], ctypes.c_uint8)),
    "index of gate_step": ("gate_step", "compact", lambda a: a[3] and add(a[4], ctypes.c_int64)),
    "values of gate_step": ("gate_step", "compact", lambda a: a[8] and add(a[8][4], ctypes.c_float, 0.01)),
    "counters of gate_step": ("gate_step", "compact", lambda a: a[8] and add(a[8][5], ctypes.c_int64)),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_planted_fault_is_caught_and_the_reference_serves(what, monkeypatch, caplog, tmp_path):
    op, function, spoil = FAULTS[what]
    right = CALLS[op](backend="torch")
    through = getattr(cuda_backend._cuda, function)

    def faulty(*arguments):
        through(*arguments)
        spoil(arguments)

    monkeypatch.setattr(cuda_backend, "_cuda", SimpleNamespace(**{**functions(), function: faulty}))
    no_other = [name for name in ("compact", "gather_rows", "control") if name == function and name != op]
    for other in no_other:  # the parts that the call is made of then are faulty, too
        proof.record(torch.device("cpu"), {("cuda", other, None): "faulty"})
    for _ in range(2):
        assert_same(CALLS[op](), right)
    message = next(m for m in warned(caplog) if f"do not serve {op}" in m)
    assert what in message
    assert sum(f"do not serve {op}" in m for m in warned(caplog)) == 1
    dtype = " float32" if op in ("select", "gate_step") else ""
    assert what in kept(tmp_path)[f"cuda {op}{dtype}"]


@pytest.mark.parametrize("error", ["CUDA: compact: no kernel image is available", "CUDA: too many resources requested"])
def test_a_kernel_that_does_not_launch_raises_nothing(error, monkeypatch, caplog):
    def fail(*arguments):
        raise RuntimeError(error)

    monkeypatch.setattr(cuda_backend, "_cuda", SimpleNamespace(**{**functions(), "compact": fail}))
    assert_same(CALLS["compact"](), CALLS["compact"](backend="torch"))
    (message,) = warned(caplog)
    assert error in message
    with pytest.raises(RuntimeError, match="CUDA: "):
        CALLS["compact"](backend="cuda")
