"""With a capacity no call of the gate waits for its device: every decision and set-point, looked at without one.

Under FakeTensorMode tensors have no values, so whatever reads one (``.item()``, a shape from data, boolean indexing)
raises; under ``fullgraph=True`` it breaks the graph. Where there is a GPU, PyTorch itself tells.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from sparse_kernels import _dispatch, control_law
from sparse_kernels.backends import cuda as cuda_backend
from sparse_training.criterion import Criterion
from sparse_training.gate.gate import Gate
from sparse_training.gate.schedules import Ramp
from sparse_training.gate.significance import Significance
from sparse_training.selection.policies.gate import GatePolicy
from sparse_training.selection.types import Batch, Scores

ROWS, CLASSES, CAPACITY = 96, 7, 24
VARIANTS: dict[str, dict[str, Any]] = {
    "rate": {"rate": 0.2},
    "rate of 1": {"rate": 1.0},
    "grad-norm fraction": {"grad_norm_fraction": 0.6},
    "schedule of a rate": {"rate": Ramp(0.5, 0.1)},
    "schedule of a grad-norm fraction": {"grad_norm_fraction": Ramp(0.9, 0.5)},
    "draws": {"rate": 0.2, "temperature": 0.5, "p_min": 0.01},
    "draws by grad-norm fraction": {"grad_norm_fraction": 0.6, "temperature": 0.5},
    "floor": {"rate": 0.2, "floor": 0.1},
    "topk": {"rate": 0.2, "decision": "topk"},
    "random ties": {"rate": 0.2, "ties": "random"},
    "topk, random ties": {"rate": 0.2, "decision": "topk", "ties": "random"},
    "random ties by grad-norm fraction": {"grad_norm_fraction": 0.6, "ties": "random"},
    "other statistics": {"rate": 0.2, "significance": Significance(entropy=1.0, margin=-0.5), "label_smoothing": 0.1},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def batch(device: str = "cpu") -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    logits, targets = 2 * torch.randn(ROWS, CLASSES, generator=g), torch.arange(ROWS) % CLASSES
    logits[5], targets[7::9] = float("nan"), -100
    return logits.to(device), targets.to(device)


def step(gate: Gate, logits: Tensor, targets: Tensor, progress: float = 0.5) -> tuple[Any, ...]:
    """A training loop's use of the gate, all of it."""
    gate.set_progress(progress)
    kept = gate(logits, targets)
    rows, labels = kept.take((logits, targets))
    loss = (kept.weight * torch.nn.functional.cross_entropy(rows, labels, reduction="none")).sum() / gate.divisor()
    return kept.index, kept.weight, kept.count, kept.overflow, loss


# A PyTorch without CUDA knows no fake tensors of it either.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def without_values(gate: Gate) -> tuple[Tensor, Tensor]:
    """Within FakeTensorMode: a batch, and the gate's buffers, of which there is nothing to read."""
    for module in gate.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=DEVICE))
    return torch.empty(ROWS, CLASSES, device=DEVICE), torch.empty(ROWS, dtype=torch.int64, device=DEVICE)


@variants
def test_nothing_reads_a_value(options: dict[str, Any]) -> None:
    gate = Gate(**options, capacity=CAPACITY)
    with FakeTensorMode():
        given = without_values(gate)
        for progress in (0.0, 0.5):
            index, weight, count, overflow, loss = step(gate, *given, progress)
        assert index.shape == weight.shape == (CAPACITY,)
        assert all(x.device.type == DEVICE for x in (index, count, overflow, loss))


def test_a_policy_packs_without_reading_a_value() -> None:
    policy = GatePolicy(gate=Gate(0.2, capacity=CAPACITY))
    with FakeTensorMode():
        logits, targets = without_values(policy.gate)
        batch = Batch((logits, targets), targets, None, ROWS)
        kept = policy.select(Scores(targets, Criterion(), logits=logits), batch)
        assert kept.inputs[0].shape == (CAPACITY, CLASSES)
        assert kept.positions is not None
        assert kept.positions.shape == kept.inputs[1].shape == (CAPACITY,)


READS = (DataDependentOutputException, DynamicOutputShapeException)


@pytest.mark.parametrize("read", [lambda kept: kept.count.item(), lambda kept: kept.index[kept.weight > 0]])
def test_a_value_that_is_read_is_found(read: Any) -> None:
    """What the test above relies on."""
    gate = Gate(0.2, capacity=CAPACITY)
    with FakeTensorMode():
        kept = gate(*without_values(gate))
        with pytest.raises(READS):
            read(kept)


@variants
def test_one_graph_holds_the_call(options: dict[str, Any]) -> None:
    eager, compiled = Gate(**options, capacity=CAPACITY), Gate(**options, capacity=CAPACITY)
    torch.compiler.reset()
    call = torch.compile(step, fullgraph=True, backend="eager")
    for _ in range(3):
        for ours, wanted in zip(call(compiled, *batch()), step(eager, *batch()), strict=True):
            torch.testing.assert_close(ours, wanted, equal_nan=True)
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(dict(compiled.named_buffers())[name], buffer, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestOnGpu:
    @pytest.fixture(autouse=True, params=["torch", "cuda"])
    def backend(self, request: pytest.FixtureRequest) -> Iterator[str]:
        with _dispatch.forced(request.param):
            yield request.param

    @variants
    def test_the_host_never_waits(self, options: dict[str, Any]) -> None:
        gate, given = Gate(**options, capacity=CAPACITY).cuda(), batch("cuda")
        for _ in range(2):  # what is compiled or cached by a first call
            step(gate, *given)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(gate, *given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @variants
    def test_replays_are_calls(self, options: dict[str, Any]) -> None:
        gate, given = Gate(**options, capacity=CAPACITY).cuda(), batch("cuda")
        captured = Gate(**options, capacity=CAPACITY).cuda()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                step(captured, *given)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step(captured, *given)
        for _ in range(2):
            step(gate, *given)
        for _ in range(3):
            graph.replay()
            wanted = step(gate, *given)
            torch.cuda.synchronize()
            for ours, theirs in zip(found, wanted, strict=True):
                torch.testing.assert_close(ours, theirs, equal_nan=True)
        assert captured.step == gate.step == 5

    def test_a_step_is_three_launches_at_any_size(self, backend: str) -> None:
        if backend != "cuda":
            pytest.skip("the reference is many")
        assert cuda_backend.unavailable_reason() is None
        for rows in (512, 4096, 200_000):
            gate = Gate(0.1, capacity=rows // 4, threshold=1.0).cuda()
            logits, targets = torch.randn(rows, 10).cuda(), torch.randint(0, 10, (rows,)).cuda()
            inputs = torch.randn(rows, 64).cuda()
            gate(logits, targets).take((inputs, targets))
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                gate(logits, targets).take((inputs, targets))
                torch.cuda.synchronize()
            device = torch.autograd.DeviceType.CUDA
            names = [event.name for event in profile.events() if event.device_type == device]
            assert len(names) == 3, names

    def test_the_controller_of_either_backend_takes_the_same_way(self, backend: str) -> None:
        given, states = batch("cuda"), []
        for name in ("torch", backend):
            with _dispatch.forced(name):
                gate = Gate(0.2, capacity=CAPACITY).cuda()
                for _ in range(20):
                    gate(*given)
            states.append(gate.controller.state())
        torch.testing.assert_close(*[state.values for state in states], rtol=1e-3, atol=1e-5)
        assert torch.equal(*[state.counters for state in states])
        assert states[0].values.shape == (len(control_law.CONTROL_VALUES),)
