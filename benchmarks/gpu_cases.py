"""The rows of ``gpu.py bench``: each a function that measures one thing and returns its Row, in order of worth.

``share of copy`` is the bytes that ours must move over its time, over the bandwidth of a large copy (bytes read
plus bytes written) that is timed beside it. Where a target is an upper bound, its ratio is the bound over what
was found, so that everything is wanted at 1 or above.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import cub
import peers
import timing
import torch
import work
from steps import step_row
from timing import Row, Side
from torch import Tensor, nn

import sparse_kernels as sk
from sparse_kernels import backends
from sparse_training import Gate
from sparse_training.training.settings import TrainerSettings

CASES: dict[str, Callable[[Bench, str], Row]] = {}
RATE = 0.1


@dataclass
class Bench:
    """Where and how large: ``small`` sizes only show that every line runs."""

    device: torch.device
    small: bool = False
    budget: float = 12.0  # seconds for the rounds of one row
    timer: timing.Cpu | timing.Cuda = field(init=False)

    def __post_init__(self) -> None:
        self.timer = timing.Cuda() if self.device.type == "cuda" else timing.Cpu()
        self._source = torch.empty(1 << (16 if self.small else 30), dtype=torch.uint8, device=self.device)
        self._target = torch.empty_like(self._source)

    def backend(self, op: str) -> str | None:
        """The one that is to be measured on a GPU; elsewhere, whichever comes first."""
        if self.device.type != "cuda":
            return None
        return "triton" if op in ("row_stats", "gate_rows") else "cuda"

    def served(self) -> contextlib.AbstractContextManager[None]:
        """Within it the kernels for a GPU serve what is called without a name."""
        return backends.forced("cuda") if self.device.type == "cuda" else contextlib.nullcontext()

    def shape(self, *sizes: int) -> tuple[int, ...]:
        return tuple(min(size, 16) for size in sizes) if self.small else sizes

    def rows(self, *sizes: int, dtype: torch.dtype, dim: int = -1) -> tuple[Tensor, Tensor]:
        """Logits of that shape and labels."""
        torch.manual_seed(0)
        sizes = self.shape(*sizes)
        dim %= len(sizes)
        logits = torch.empty(sizes, dtype=dtype, device=self.device).normal_(std=2.0)
        labels = torch.randint(0, sizes[dim], sizes[:dim] + sizes[dim + 1 :], device=self.device)
        return logits, labels

    def compiled(self, forms: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
        return peers.with_compiled(forms, **({"backend": "eager"} if self.small else {}))

    def measure(
        self,
        case: str,
        ours: Side,
        sides: dict[str, Side],
        *,
        moved: int,
        targets: dict[str, float],
        notes: dict[str, Any] | None = None,
    ) -> Row:
        """Time all sides, and a copy; ``moved``: the bytes that ours must move."""
        everything = {"ours": ours, **sides, "copy": lambda: self._target.copy_(self._source)}
        rounds, budget = (1, 0.0) if self.small else (101, self.budget)
        seconds = timing.interleave(self.timer, everything, rounds=rounds, budget=budget)
        found = timing.ratios(seconds)
        del found["copy"]
        bandwidth = 2 * self._source.numel() / seconds["copy"]["p50"]
        speed = moved / seconds["ours"]["p50"]
        found["share of copy"] = speed / bandwidth
        rates = {"bytes": moved, "bytes per second": speed, "copy, bytes per second": bandwidth}
        return Row(case, seconds, found, targets, rates | (notes or {}))


def case(name: str) -> Callable[[Callable[[Bench, str], Row]], Callable[[Bench, str], Row]]:
    def register(function: Callable[[Bench, str], Row]) -> Callable[[Bench, str], Row]:
        CASES[name] = function
        return function

    return register


def agree(name: str, ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """No speed-up is recorded unless the results agree, to a share of the largest value."""
    tolerance = 1e-4 if dtype is torch.float32 else 0.03
    largest = float(ours.float().abs().max())
    torch.testing.assert_close(
        ours.float(), theirs.float(), rtol=tolerance, atol=tolerance * largest, msg=lambda m: f"{name}: {m}"
    )


# --- row statistics


def gate_rows_row(
    bench: Bench, name: str, sizes: tuple[int, ...], dtype: torch.dtype, targets: dict[str, float], dim: int = -1,
    packages: bool = False,
) -> Row:  # fmt: skip
    """Loss, entropy and mask against the unfused forms."""
    logits, labels = bench.rows(*sizes, dtype=dtype, dim=dim)
    threshold = torch.tensor([0.9 * math.log(logits.shape[dim])], device=bench.device)
    backend = bench.backend("gate_rows")

    def ours() -> Any:
        return sk.gate_rows(
            logits, labels, threshold, weights=peers.WEIGHTS, outputs=("loss", "entropy"), dim=dim, backend=backend
        )

    with torch.no_grad():
        found = ours()
        forms = bench.compiled(peers.GATES)
        for form, function in forms.items():
            agree(form, found.significance, function(logits, labels, threshold, dim)[1], dtype)
        sides: dict[str, Side] = {
            form: (lambda f=function: f(logits, labels, threshold, dim)) for form, function in forms.items()
        }
        left_out: dict[str, str] = {}
        functions: dict[str, Any] = {}
        if packages:
            peers.add(functions, left_out, bench.device, Liger=peers.liger, QuACK=peers.quack, TRL=peers.trl)
            for other, function in functions.items():
                theirs = function(logits, labels)
                agree(other, found.stats.loss, theirs[0] if isinstance(theirs, tuple) else theirs, dtype)
                sides[other] = lambda f=function: f(logits, labels)
        needed = work.forward(logits, dim, outputs=2, gate=True)
        wanted = {peer: ratio for peer, ratio in targets.items() if peer not in left_out}
        notes = {"flops": needed["flops"]} | ({"left out": left_out} if left_out else {})
        return bench.measure(name, ours, sides, moved=needed["bytes"], targets=wanted, notes=notes)


@case("gate_rows-bfloat16-8192x151936")
def large(bench: Bench, name: str) -> Row:
    targets = {"share of copy": 0.9, "eager": 14, "best compiled": 1.3, "Liger": 1.0, "QuACK": 1.0}
    return gate_rows_row(bench, name, (8192, 151936), torch.bfloat16, targets, packages=True)


@case("forward-backward-bfloat16-8192x151936")
def gradient(bench: Bench, name: str) -> Row:
    logits, labels = bench.rows(8192, 151936, dtype=torch.bfloat16)
    logits.requires_grad_()
    weights = torch.rand(2, len(labels), device=bench.device)
    backend = bench.backend("row_stats")

    def of(function: Callable[..., Any]) -> Tensor:
        outputs = function(logits, labels)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        given = [weight.to(outputs[0].dtype) for weight in weights][: len(outputs)]
        return torch.autograd.grad(outputs, logits, given)[0]

    def pair(logits: Tensor, labels: Tensor) -> Any:
        return sk.row_stats(logits, labels, backend=backend)[:2]

    functions, left_out = bench.compiled(peers.PAIRS), {}
    found = of(pair)
    for form, function in functions.items():
        agree(form, found, of(function), torch.bfloat16)
    del found
    peers.add(functions, left_out, bench.device, **{"QuACK (loss alone)": peers.quack, "TRL": peers.trl})
    needed = work.forward_backward(logits)
    notes = {"flops": needed["flops"]} | ({"left out": left_out} if left_out else {})
    sides: dict[str, Side] = {other: (lambda f=function: of(f)) for other, function in functions.items()}
    return bench.measure(
        name, lambda: of(pair), sides, moved=needed["bytes"], targets={"share of copy": 0.85}, notes=notes
    )


@case("row_stats-all-bfloat16-8192x151936")
def everything(bench: Bench, name: str) -> Row:
    logits, labels = bench.rows(8192, 151936, dtype=torch.bfloat16)
    backend = bench.backend("row_stats")
    needed = work.forward(logits, outputs=8, flops=work.ALL)
    with torch.no_grad():
        return bench.measure(
            name,
            lambda: sk.row_stats(logits, labels, outputs=sk.STATISTICS, backend=backend),
            {},
            moved=needed["bytes"],
            targets={"share of copy": 0.85},
            notes={"flops": needed["flops"]},
        )


@case("gate_rows-float32-1Mx10")
def ten(bench: Bench, name: str) -> Row:
    return gate_rows_row(bench, name, (1 << 20, 10), torch.float32, {"share of copy": 0.8})


@case("gate_rows-float32-1Mx21")
def pixels(bench: Bench, name: str) -> Row:
    return gate_rows_row(bench, name, (1 << 20, 21), torch.float32, {"share of copy": 0.8})


@case("gate_rows-float32-4x21x512x512")
def channels_first(bench: Bench, name: str) -> Row:
    return gate_rows_row(bench, name, (4, 21, 512, 512), torch.float32, {"share of copy": 0.8}, dim=1)


@case("gate_rows-bfloat16-65536x1000")
def thousand(bench: Bench, name: str) -> Row:
    return gate_rows_row(bench, name, (65536, 1000), torch.bfloat16, {"share of copy": 0.8})


# --- the whole gate


def captured(bench: Bench, call: Side) -> Side:
    """A CUDA graph's replay of the call; elsewhere the call itself."""
    if bench.device.type != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def launches(bench: Bench, call: Side) -> int | None:
    """Kernels, copies and fills that a call starts on the device; None elsewhere."""
    if bench.device.type != "cuda":
        return None
    call()  # what is done once
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def waits(bench: Bench, call: Side) -> str:
    """Whether the host waits for the device in a call: ``no``, or where."""
    if bench.device.type != "cuda":
        return "not looked for"
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return f"yes: {str(error).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no"


def whole_gate(bench: Bench, name: str, rows: int, classes: int) -> Row:
    """Score, threshold, compact, control and gather of 3x32x32 float32 images at a rate of 10%."""
    logits, labels = bench.rows(rows, classes, dtype=torch.float32)
    rows = len(labels)
    inputs = torch.randn(rows, 3, 32, 32, device=bench.device)
    threshold = torch.tensor([0.9 * math.log(classes)], device=bench.device)
    capacity = max(1, round(1.25 * RATE * rows))
    gate = Gate(rate=RATE, capacity=capacity, threshold=float(threshold)).to(bench.device)
    rate = torch.tensor(RATE, device=bench.device)

    def ours() -> Any:
        return gate(logits, labels).take((inputs, labels))

    def unfused() -> Any:
        with torch.no_grad():
            mask, _ = peers.unfused(logits, labels, threshold)
            rate.lerp_(mask.float().mean(), 0.1)
            threshold.mul_(torch.exp(0.1 * (rate - RATE)))
            index = mask.nonzero().squeeze(-1)
            return inputs[index], labels[index]

    kept = inputs[0].numel() * inputs.element_size() + labels.element_size()
    moved = work.forward(logits, outputs=0, gate=True)["bytes"] + round(2 * RATE * rows * kept)
    started, waited = launches(bench, ours), waits(bench, ours)
    row = bench.measure(
        name,
        captured(bench, ours),
        {"eager": unfused, "ours without a graph": ours},
        moved=moved,
        targets={"eager": 8.0, "20 us beyond the bytes": 1.0, "3 launches": 1.0},
        notes={"launches": started, "host waits": waited},
    )
    own = moved / row.notes["copy, bytes per second"]
    row.ratios["20 us beyond the bytes"] = 20e-6 / max(row.seconds["ours"]["p50"] - own, 1e-9)
    if started:
        row.ratios["3 launches"] = 3 / started
    return row


@case("gate-512x10")
def gate_ten(bench: Bench, name: str) -> Row:
    with bench.served():
        return whole_gate(bench, name, 512, 10)


@case("gate-4096x1000")
def gate_thousand(bench: Bench, name: str) -> Row:
    with bench.served():
        return whole_gate(bench, name, 4096, 1000)


@case("gate-262144x10")
def gate_large(bench: Bench, name: str) -> Row:
    """More rows than are packed in tiles: the launches must be no more."""
    with bench.served():
        return whole_gate(bench, name, 1 << 18, 10)


# --- packing


@case("gather-bfloat16-1Mx2048")
def gather(bench: Bench, name: str) -> Row:
    """A tenth of a million rows of 4 KB."""
    return gather_row(bench, name, 2048, {"share of copy": 0.85})


def gather_row(bench: Bench, name: str, columns: int, targets: dict[str, float]) -> Row:
    torch.manual_seed(0)
    source = torch.empty(bench.shape(1 << 20, columns), dtype=torch.bfloat16, device=bench.device).normal_()
    mask = torch.rand(len(source), device=bench.device) < RATE
    selection = sk.compact(mask, backend="torch")
    index, backend = selection.index, bench.backend("gather_rows")

    def ours() -> Any:
        return sk.gather_rows(source, selection, backend=backend)

    sides: dict[str, Side] = {
        "index_select": lambda: source.index_select(0, index),
        "x[mask]": lambda: source[mask],
    }
    assert all(torch.equal(ours(), side()) for side in sides.values())
    moved = len(index) * (2 * source.shape[1] * source.element_size() + index.element_size())
    return bench.measure(name, ours, sides, moved=moved, targets=targets)


@case("gather-bfloat16-1Mx2047")
def gather_misaligned(bench: Bench, name: str) -> Row:
    """The same, but that no two rows lie alike to 16 bytes."""
    return gather_row(bench, name, 2047, {})


@case("compact-16M-flags")
def flags(bench: Bench, name: str) -> Row:
    """Into as many slots as a gate of that rate has, a quarter more than it keeps."""
    return compact_row(bench, name, 1.25 * RATE, {"CUB": 1.0})


@case("compact-16M-flags-into-a-quarter")
def flags_padded(bench: Bench, name: str) -> Row:
    """Most of what is written is padding, which CUB called bare does not write."""
    return compact_row(bench, name, 0.25, {})


def compact_row(bench: Bench, name: str, share: float, targets: dict[str, float]) -> Row:
    torch.manual_seed(0)
    (rows,) = (1 << 10,) if bench.small else (1 << 24,)
    mask = torch.rand(rows, device=bench.device) < RATE
    backend, slots = bench.backend("compact"), round(share * rows)

    def ours() -> Any:
        return sk.compact(mask, capacity=slots, backend=backend)

    found, expected = ours(), mask.nonzero().squeeze(-1)
    assert torch.equal(found.index[: len(expected)], expected)
    sides: dict[str, Side] = {"nonzero": lambda: mask.nonzero()}
    notes: dict[str, Any] = {}
    try:
        sides["CUB"], index, count = cub.select(mask.view(torch.uint8))
        sides["CUB"]()
        assert torch.equal(index[: int(count)], expected)
    except peers.Missing as missing:
        notes["left out"] = {"CUB": str(missing)}
    notes["launches"] = launches(bench, ours)
    targets = {side: least for side, least in targets.items() if side in sides}
    moved = rows + slots * 12  # flags, and the index and the weight of every slot
    return bench.measure(name, ours, sides, moved=moved, targets=targets, notes=notes)


# --- training steps


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
    from sparse_training.selection.registry import uses_rate
    from sparse_training.trainer import SparseTrainer

    batch = 16 if bench.small else 1024
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4 * batch, 3, 32, 32), dtype=torch.uint8)
    split = Split(images, torch.randint(0, 10, (4 * batch,)))
    loader = ResidentLoader(split, batch_size=batch, mean=(0.5,) * 3, std=(0.25,) * 3, device=bench.device)
    model = network(bench, "resnet-18")
    amp = "bfloat16" if bench.device.type == "cuda" else None
    return (
        SparseTrainer(
            model,
            policy=policy,
            rate=RATE if uses_rate(policy) else None,
            device=bench.device,
            settings=TrainerSettings(amp=amp),
        ),
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
    from sparse_training.errors import UserError
    from sparse_training.profiling.calibration import calibrate

    try:
        trainer, loader, batch = _trainer(bench, "history")
    except UserError as error:
        raise sk.BackendUnavailable(str(error)) from error
    costs = calibrate(trainer, loader, {"history": trainer.policy}, rounds=1 if bench.small else 7)
    kept = round(RATE * batch)
    dense, history = costs.step("dense", batch, batch), costs.step("history", kept, kept)
    reached = dense["total"] / history["total"]
    return Row(
        name,
        {"ours": {"p50": history["total"]}, "dense": {"p50": dense["total"]}},
        {"dense": reached, "share of 1/r": reached * RATE},
        {"share of 1/r": 0.9},
    )


def run(bench: Bench, name: str) -> Row:
    """One case; what stops it becomes its note, but for a device that no longer answers."""
    wanted: dict[str, Any] = {}
    try:
        return CASES[name](bench, name)
    except sk.BackendUnavailable as error:
        wanted["not served"] = str(error)
    except peers.Missing as error:
        wanted["left out"] = str(error)
    except Exception as error:
        wanted["failed"] = f"{type(error).__name__}: {error}"[:500]
        if "CUDA error" in str(error):
            raise Lost(Row(name, {}, {}, {}, wanted)) from error
    finally:
        if bench.device.type == "cuda":
            with contextlib.suppress(Exception):
                torch.cuda.empty_cache()
    return Row(name, {}, {}, {}, wanted)


class Lost(Exception):
    """The device gives errors from here on in this process; ``row`` is the case that it happened in."""

    def __init__(self, row: Row) -> None:
        super().__init__(row.notes["failed"])
        self.row = row
