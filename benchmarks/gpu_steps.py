"""The rows of ``gpu.py bench`` about training steps; see gpu_cases.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import peers
import timing
import torch
from gpu_bench import RATE, Bench, case
from steps import step_row
from timing import Row, Side
from torch import Tensor, nn

from sparse_training import Gate
from sparse_training.training.settings import TrainerSettings


def network(bench: Bench, name: str) -> nn.Module:
    """For 3x32x32 images and 10 classes; small, a stand-in."""
    if bench.small:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    try:
        import torchvision.models as models  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except Exception:
        models = None
    if name == "resnet-18" and models:
        made: nn.Module = models.resnet18(num_classes=10)
    elif name == "vit-s" and models:
        made = models.VisionTransformer(32, 4, 12, 6, 384, 1536, num_classes=10)
    else:
        raise peers.Missing("torchvision is not installed")
    return made


def share_of_step(bench: Bench, name: str, model_name: str) -> Row:
    """The gate, scoring forward excluded, beside a dense step of the model; both as the host sees them."""
    rows = 16 if bench.small else 1024
    model = network(bench, model_name)
    model.to(bench.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    inputs = torch.randn(rows, 3, 32, 32, device=bench.device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (rows,), device=bench.device)
    gate = Gate(rate=RATE, capacity=round(1.25 * RATE * rows), threshold=2.0).to(bench.device)

    def forward() -> Tensor:
        with torch.autocast(bench.device.type, dtype=torch.bfloat16):
            found: Tensor = model(inputs)
            return found

    def dense() -> None:
        loss = nn.functional.cross_entropy(forward().float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with torch.no_grad():
        logits = forward().float()

    def ours() -> Any:
        return gate(logits, labels).take((inputs, labels))

    row = bench.measure(name, ours, {"dense step": dense}, moved=0, targets={"1% of the step": 1.0})
    # By the host's clock: in eager mode launches cost more than the kernels.
    seconds = timing.interleave(
        _Wall(bench.device), {"ours": ours, "dense step": dense}, rounds=3 if bench.small else 31
    )
    row.seconds |= {f"{side}, host": found for side, found in seconds.items()}
    host = seconds["dense step"]["p50"] / seconds["ours"]["p50"]
    row.notes = {"dense step, by the device's clock": row.ratios["dense step"]}
    row.ratios = {"dense step": host, "1% of the step": 0.01 * host}
    return row


class _Wall(timing.Cpu):
    """The host's clock, once the device has done what was asked of it."""

    def __init__(self, device: torch.device) -> None:
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def time(self, side: Side, calls: int = 1) -> Callable[[], float]:
        self._wait()
        start = time.perf_counter()
        for _ in range(calls):
            side()
        self._wait()
        seconds = (time.perf_counter() - start) / calls
        return lambda: seconds


@case("gate-of-step-resnet-18-1024")
def resnet_share(bench: Bench, name: str) -> Row:
    with bench.served():
        return share_of_step(bench, name, "resnet-18")


@case("gate-of-step-vit-s-1024")
def vit_share(bench: Bench, name: str) -> Row:
    with bench.served():
        return share_of_step(bench, name, "vit-s")


def _trainer(bench: Bench, policy: str) -> Any:
    """A trainer on random images that rest on the device, and its loader."""
    from sparse_training.data.resident import ResidentLoader
    from sparse_training.data.splits import Split
    from sparse_training.trainer import SparseTrainer

    batch = 16 if bench.small else 1024
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4 * batch, 3, 32, 32), dtype=torch.uint8)
    split = Split(images, torch.randint(0, 10, (4 * batch,)))
    loader = ResidentLoader(split, batch_size=batch, mean=(0.5,) * 3, std=(0.25,) * 3, device=bench.device)
    model = network(bench, "resnet-18")
    amp = "bfloat16" if bench.device.type == "cuda" else None
    return (
        SparseTrainer(model, policy=policy, rate=RATE, device=bench.device, settings=TrainerSettings(amp=amp)),
        loader,
        batch,
    )


@case("step-gate-resnet-18-1024")
def gated_step(bench: Bench, name: str) -> Row:
    from sparse_training.profiling.calibration import calibrate
    from sparse_training.selection.registry import make_policy

    trainer, loader, batch = _trainer(bench, "gate")
    arms = {"gate": trainer.policy, "random": make_policy("random", rate=RATE, seed=0)}
    with bench.served():
        costs = calibrate(trainer, loader, arms, rounds=1 if bench.small else 7)
    row = step_row(name, costs, batch, RATE, 0.9)
    return Row(row.case, row.seconds, row.ratios, {"share of ceiling": 0.9}, row.notes)


@case("step-history-resnet-18-1024")
def history_step(bench: Bench, name: str) -> Row:
    """Rows that are skipped are neither loaded nor run: the ceiling is 1/r."""
    from sparse_training.profiling.calibration import calibrate

    trainer, loader, batch = _trainer(bench, "importance")
    policy = trainer.policy
    costs = calibrate(trainer, loader, {policy.name: policy}, rounds=1 if bench.small else 7)
    kept = round(RATE * batch)
    dense, history = costs.step("dense", batch, batch), costs.step(policy.name, kept, kept)
    reached = dense["total"] / history["total"]
    return Row(
        name,
        {"ours": {"p50": history["total"]}, "dense": {"p50": dense["total"]}},
        {"dense": reached, "share of 1/r": reached * RATE},
        {"share of 1/r": 0.9},
    )
