"""The reference on an XLA device: one program for every mask and threshold, and the CPU's results.

A program that depends on data is compiled again in every step, which takes longer than the step; and an operation
that XLA lacks is run on the host (the counters named aten::), which waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch_xla
from torch import Tensor
from torch_xla.debug import metrics

import sparse_kernels as sk
from sparse_training import Gate

ROWS, CLASSES, CAPACITY, STEPS = 256, 10, 64, 100


def compilations() -> int:
    found = metrics.metric_data("CompileTime")
    return 0 if found is None else int(found[0])


def run(step: Callable[[int], object], steps: int = STEPS) -> int:
    """Compilations after the second step; every step a program of its own, as a training loop's."""
    metrics.clear_all()
    for t in range(steps):
        result = step(t)
        torch_xla.sync(wait=True)
        del result
        if t == 1:
            before = compilations()
    assert compilations() >= 1, "nothing was compiled, so nothing ran on the device"
    return compilations() - before


def on_host() -> list[str]:
    """Operations that were run on the host; reading a scalar is one that tests do themselves."""
    return [name for name in metrics.counter_names() if name.startswith("aten::")]


def batch(t: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(t)
    return 3 * torch.randn(ROWS, CLASSES, generator=g), torch.randint(0, CLASSES, (ROWS,), generator=g)


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch_xla.device()


def test_compact_is_one_program_for_every_mask(device: torch.device) -> None:
    found = []

    def step(t: int) -> None:
        mask = torch.rand(ROWS, generator=torch.Generator().manual_seed(t)) < t / STEPS  # from none to all
        found.append((sk.compact(mask.to(device), capacity=CAPACITY), sk.compact(mask, capacity=CAPACITY)))

    assert run(step) == 0
    assert on_host() == []
    for ours, cpu in found:
        for name in ("index", "weight", "count", "overflow"):
            assert torch.equal(getattr(ours, name).cpu(), getattr(cpu, name)), name
    assert max(int(cpu.overflow) for _, cpu in found) > 100


@pytest.mark.parametrize(
    "settings",
    [{"rate": 0.1}, {"mass": 0.5}, {"rate": 0.1, "floor": 0.05}, {"rate": 0.1, "decision": "topk"},
     {"rate": 0.1, "temperature": 0.3}, {"rate": 0.1, "ties": "random"}],
    ids=["rate", "mass", "floor", "topk", "drawn", "ties"],
)  # fmt: skip
def test_the_gate_is_one_program_and_decides_as_on_the_cpu(settings: dict, device: torch.device) -> None:
    gates = [Gate(**settings, capacity=CAPACITY).to(where) for where in (device, "cpu")]
    found = []

    def step(t: int) -> None:
        inputs, targets = batch(t)
        there, here = (gate(inputs.to(gate.threshold.device), targets.to(gate.threshold.device)) for gate in gates)
        packed = there.take(inputs.to(device))
        found.append((there, here, packed, inputs, gates[0].threshold.clone(), gates[1].threshold.clone()))

    assert run(step) == 0
    assert on_host() == []
    thresholds = set()
    different = 0
    for there, here, packed, inputs, ours, cpu in found:
        torch.testing.assert_close(ours.cpu(), cpu, rtol=1e-3, atol=1e-4)
        thresholds.add(float(cpu))
        torch.testing.assert_close(packed.cpu(), inputs[there.index.cpu()], rtol=0, atol=0)
        # A row within rounding of the threshold may fall on either side.
        different += abs(int(there.count) - int(here.count))
        if int(there.count) == int(here.count):
            different += int((there.index.cpu() != here.index).any())
    assert len(thresholds) > STEPS // 2
    assert different <= STEPS // 20


def test_training_through_the_gate_is_one_program_and_learns(device: torch.device) -> None:
    torch.manual_seed(0)
    centres = 2 * torch.randn(CLASSES, 16)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, CLASSES)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gate = Gate(rate=0.25, capacity=96).to(device)
    losses = []

    def step(t: int) -> None:
        g = torch.Generator().manual_seed(t)
        targets = torch.randint(0, CLASSES, (ROWS,), generator=g)
        inputs = (centres[targets] + torch.randn(ROWS, 16, generator=g)).to(device)
        targets = targets.to(device)
        with torch.no_grad():
            logits = model(inputs)
            losses.append(torch.nn.functional.cross_entropy(logits, targets))
            kept = gate(logits, targets)
        inputs, targets = kept.take((inputs, targets))
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs), targets, reduction="none")
        ((loss * kept.weight).sum() / kept.count.clamp(min=1)).backward()
        optimizer.step()

    # The optimiser's own state begins in the first two steps.
    assert run(step) == 0
    assert on_host() == []
    first, last = float(losses[0]), float(torch.stack(losses[-10:]).mean())
    assert last < 0.4 * first
