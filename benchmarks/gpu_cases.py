"""The rows of ``gpu.py bench``: each a function that measures one thing and returns its Row, in order of worth.

``share of copy`` is the bytes that ours must move over its time, over the bandwidth of a large copy (bytes read
plus bytes written) that is timed beside it. Where a target is an upper bound, its ratio is the bound over what
was found, so that everything is wanted at 1 or above.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import cub
import peers
import torch
import work
from gpu_bench import RATE, Bench, agree, captured, case, launches, waits
from timing import Row, Side
from torch import Tensor

import sparse_kernels as sk
from sparse_training import Gate


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
