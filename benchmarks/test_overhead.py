"""What stands around the kernel in a small call: nearly all of its time is the host's.

"operator" is the same work through the dispatcher, as a compiled program calls it; "kernel" is the backend's own
function on a call checked beforehand, so its ratio is the share of the public call that is not checks and routing.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import sparse_kernels as sk
from sparse_kernels import _dispatch, ops
from sparse_kernels._arguments import CompactCall, GateCall, GateStepCall, Settings, StatsCall, TreeCall
from sparse_kernels.backends import cpp as cpp_backend
from sparse_kernels.backends import cuda as cuda_backend
from sparse_kernels.backends import current
from sparse_kernels.backends.triton import backend as triton_backend
from sparse_kernels.self_check import proof

OPS = torch.ops.sparse_kernels
ROWS, CLASSES = 128, 10
OUTPUTS = ["loss", "entropy"]
WEIGHTS = {"loss": 0.7, "entropy": 0.3}
LAUNCHES: list[str] = []  # one for all tests: Triton keeps a kernel with the first one's launcher
SETTINGS = (-1, 1.0, 0.0, 0.0, -100)  # dim, temperature, softcap, label_smoothing, ignore_index


def sides(op):
    """The public call, the operator, the backend's function."""
    logits, targets = torch.randn(ROWS, CLASSES), torch.randint(0, CLASSES, (ROWS,))
    threshold, mask = torch.tensor([2.0]), torch.rand(ROWS) < 0.1
    selection, tree = sk.compact(mask), [logits, targets]
    if op == "row_stats":
        call = StatsCall(logits, targets, OUTPUTS, -1, Settings())
        return (
            lambda: sk.row_stats(logits, targets),
            lambda: OPS.row_stats(logits, targets, OUTPUTS, *SETTINGS, False, False, "cpp"),
            lambda: cpp_backend.row_stats(call),
        )
    if op == "gate_rows":
        call = GateCall(logits, targets, (), -1, Settings(), threshold, WEIGHTS, None)
        gate = (threshold, list(WEIGHTS), list(WEIGHTS.values()), None, [])
        return (
            lambda: sk.gate_rows(logits, targets, threshold, weights=WEIGHTS),
            lambda: OPS.gate_rows(logits, targets, *gate, *SETTINGS, 0.0, 0.0, 0, 0, None, "cpp"),
            lambda: cpp_backend.gate_rows(call),
        )
    if op == "compact":
        call = CompactCall(mask, None, None)
        return (
            lambda: sk.compact(mask),
            lambda: OPS.compact(mask, None, None, "cpp"),
            lambda: cpp_backend.compact(call),
        )
    call = TreeCall(tree, selection, selection.size)
    return (
        lambda: sk.gather_rows(tree, selection),
        lambda: OPS.gather_rows(tree, selection.index, selection.count, selection.size, "cpp"),
        lambda: cpp_backend.gather_rows(call),
    )


@pytest.mark.skipif(cpp_backend.unavailable_reason() is not None, reason="the C++ backend is not built")
@pytest.mark.parametrize(
    "op", [pytest.param(op, id=f"overhead-{op}") for op in ("row_stats", "gate_rows", "compact", "gather_rows")]
)
def test_overhead_of_a_small_call(interleaved, op):
    torch.manual_seed(0)
    ours, operator, kernel = sides(op)
    interleaved(ours, {"operator": operator, "kernel": kernel}, targets={"operator": 1.5}, rounds=51, calls=100)


@pytest.mark.skipif(cpp_backend.unavailable_reason() is not None, reason="the C++ backend is not built")
@pytest.mark.parametrize("op", [pytest.param("row_stats", id="overhead-gradient")])
def test_overhead_of_a_small_gradient(interleaved, op):
    """Forward and backward of loss and entropy, eager, against the same through the operators."""
    torch.manual_seed(0)
    logits, targets = torch.randn(ROWS, CLASSES, requires_grad=True), torch.randint(0, CLASSES, (ROWS,))

    def gradient(loss, entropy):
        return torch.autograd.grad((loss, entropy), logits, (ones, ones))[0]

    def ours():
        stats = sk.row_stats(logits, targets)
        return gradient(stats.loss, stats.entropy)

    def operator():
        return gradient(*OPS.row_stats(logits, targets, OUTPUTS, *SETTINGS, True, False, "cpp")[:2])

    def unfused():
        log_p = torch.log_softmax(logits, dim=-1)
        loss = -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return gradient(loss, -(log_p.exp() * log_p).sum(dim=-1))

    ones = torch.ones(ROWS)
    assert torch.equal(ours(), operator())
    torch.testing.assert_close(ours(), unfused())
    interleaved(ours, {"operator": operator, "eager": unfused}, rounds=51, calls=50)


@pytest.mark.parametrize(
    "op",
    [
        pytest.param("gate_rows", id="overhead-triton"),
        pytest.param("gate_step", id="overhead-gate-on-gpu"),
        pytest.param("public", id="overhead-public-gate-on-gpu"),
    ],
)
def test_overhead_of_a_call_on_a_gpu(interleaved, monkeypatch, op):
    """From the backend's function, or the public one, to the launchers of Triton and of the CUDA kernels.

    The launchers do nothing here, and PyTorch's current device and stream are constants. All other host code is a
    GPU's, but for the targets, which are checked on a CPU alone. One row: softmax is all call too.
    """
    without = pytest.importorskip("triton_without_gpu")
    if triton_backend.interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    logits, targets = torch.randn(1, CLASSES), torch.zeros(1, dtype=torch.int64)
    launches = LAUNCHES
    launches.clear()
    monkeypatch.setattr(triton_backend.reference, "check_targets", lambda call: None)
    extension = SimpleNamespace(compact=lambda *arguments: launches.append("compact"))
    monkeypatch.setattr(cuda_backend, "_cuda", extension, raising=False)
    monkeypatch.setattr(cuda_backend, "_storage_bytes", lambda *arguments: 1024)
    monkeypatch.setattr(current, "stream_address", lambda index: 0)
    without.without_gpu(90, lambda *arguments: launches.append("scores"))
    state = sk.initial_state(torch.tensor(1.5))
    settings = Settings(gate_temperature=0.5, step=state.counters[0])
    setpoint, threshold = torch.tensor(0.3), torch.tensor(2.0)

    def ours():
        if op == "gate_rows":
            return triton_backend.gate_rows(GateCall(logits, targets, (), -1, settings, threshold, WEIGHTS, None))
        gate = (logits, targets, (), -1, settings, state.values, WEIGHTS, None)
        return cuda_backend.gate_step(GateStepCall(*gate, 1, state, setpoint, False))

    def public():
        return sk.gate_step(logits, targets, state, setpoint, weights=WEIGHTS, capacity=1, gate_temperature=0.5)

    if op == "public":  # which finds the kernels able and proved, as on the second call on a GPU
        servers = [server for server in _dispatch.TABLE["gate_step"] if server.backend == "cuda"]
        monkeypatch.setitem(_dispatch.TABLE, "gate_step", (servers[0]._replace(kinds=None),))
        monkeypatch.setattr(cuda_backend, "_tensor_unsupported_reason", lambda tensor: None)
        monkeypatch.setattr(triton_backend, "interpreted", lambda: True)
        monkeypatch.setitem(proof._known, ("cuda", "gate_step", torch.float32, logits.device), proof.AGREED)
        monkeypatch.setattr(ops, "may_be_direct", lambda *arguments: False)
    try:
        softmax = {"softmax": lambda: torch.softmax(logits, -1)}
        limit = {"softmax": 0.035} if op == "public" else {}  # 25 us where softmax takes 0.88
        interleaved(public if op == "public" else ours, softmax, targets=limit, rounds=51, calls=100)
    finally:
        if torch.cuda.is_available():  # else there is no driver to go back to
            without.driver.reset_active()
    assert set(launches) == ({"scores"} if op == "gate_rows" else {"scores", "compact"})
