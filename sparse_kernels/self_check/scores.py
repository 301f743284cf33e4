"""Comparisons of ``row_stats``, its gradient and ``gate_rows``: adversarial rows in each tile of the kernels.

The inputs are made, and the reference computed, on the CPU: the device's own arithmetic takes no part in its check.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_kernels import reference
from sparse_kernels._arguments import GateCall, Settings, StatsCall
from sparse_kernels.self_check.comparisons import Comparison, equal, near
from sparse_kernels.types import DIFFERENTIABLE, STATISTICS, GatedRows, RowStats

IGNORED = -100
ADVERSARIAL = 13  # rows of ``rows()`` before the plain ones
TINY = {torch.float64: 1e-12}  # else 1e-5: the roundings of one-pass sums and of a GPU's own exponential
_PLAIN = Settings()
_SCALED = Settings(temperature=0.7, label_smoothing=0.1)
_CAPPED = Settings(temperature=0.7, softcap=20.0)
# Each statistic by a weight of its own, so that swapped ones differ.
_WEIGHTS = {
    "loss": 0.7, "entropy": 0.3, "grad_norm": 0.1, "sum_squares": -0.4, "max_prob": 0.9, "margin": -0.6,
    "logsumexp": 0.05,
}  # fmt: skip


class Shape(NamedTuple):
    """A batch to compare: plain rows follow the adversarial ones until there are ``rows``."""

    rows: int
    classes: int
    dim: int = -1


class Setup(NamedTuple):
    """Surroundings of a comparison."""

    backend: Any
    """The backend's module."""
    device: torch.device
    dtype: torch.dtype
    """Of the logits."""
    generator: torch.Generator
    """On the CPU; all inputs come from it."""
    full: bool
    """Compare everything; else only what the first use of a kernel can wait for."""


def rows(shape: Shape, setup: Setup) -> tuple[Tensor, Tensor]:
    """Return logits [rows, classes] of the dtype and targets [rows], on the CPU.

    Args:
        shape: of the batch.
        setup: dtype and generator.
    """
    count, classes = shape.rows, shape.classes
    logits = 3 * torch.randn(count, classes, generator=setup.generator, dtype=torch.float64, device="cpu")
    targets = torch.randint(0, classes, (count,), generator=setup.generator, device="cpu")
    last = classes - 1
    targets[0], targets[-1] = last, 0
    if count >= ADVERSARIAL:
        logits[1, :], logits[1, 0], targets[1] = 0.0, 30.0, 0  # confident and right
        logits[2, :], logits[2, last], targets[2] = 0.0, 30.0, 0  # confident and wrong
        logits[3] += 100.0
        logits[4, 1::2], targets[4] = -torch.inf, 0  # half masked
        logits[5, :last], targets[5] = -torch.inf, last  # all but one masked: probability exactly 1
        logits[6, last], targets[6] = -torch.inf, last  # a masked target: the loss is infinite
        logits[7] = 1.0  # equal
        logits[8], targets[8] = torch.nan, IGNORED
        logits[9, last] = torch.nan
        logits[10, 0] = torch.inf
        logits[11] = -torch.inf
        logits[12] = torch.finfo(setup.dtype).min / 2  # finite when divided by a temperature
    return logits.to(setup.dtype), targets


def _placed(shape: Shape, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the batch with its classes in ``shape.dim``: for dim 1, images [1, classes, rows, 1]."""
    if shape.dim == -1:
        return logits, targets
    return logits.t().contiguous()[None, :, :, None], targets[None, :, None]


def _shapes(setup: Setup) -> Sequence[Shape]:
    """Return batches for the tiles of the kernels, the most used first.

    Interpreted programs take milliseconds each, so a CPU gets few rows. On a GPU there are rows enough for every
    processor, or else long rows are cut into slices, which the batches of two rows are.
    """
    gpu = setup.device.type != "cpu"
    base = 40 if gpu else ADVERSARIAL + 1
    some = [Shape(base, 10), Shape(1100 if gpu else base, 1001), Shape(2, 9001), Shape(40, 21, 1)]
    if gpu:
        some.append(Shape(300, 8200))  # a block of 4 warps a row, and rows for every processor
    if not setup.full:
        return some
    more = [1, 2, 17, 33, 64, 100, 129, 257, 512, 513, 4097]
    some += [Shape(base, classes) for classes in more] + [Shape(2, 32_000), Shape(2, 151_936)]
    if gpu:
        some += [Shape(16_500, 40), Shape(70_000, 10), Shape(2000, 1000), Shape(70_000, 21, 1)]
    return some


def row_stats(setup: Setup) -> Iterator[Comparison]:
    """Yield the comparisons of every statistic and of the gradient, a batch at a time.

    Args:
        setup: the surroundings.
    """
    for number, shape in enumerate(_shapes(setup)):
        settings = (_PLAIN, _SCALED, _CAPPED)[number % 3]
        capped = settings.softcap != 0
        name = f"{shape.rows} x {shape.classes}" + (", classes in dim 1" if shape.dim == 1 else "")
        logits, targets = _placed(shape, *rows(shape, setup))
        call = StatsCall(logits, targets, STATISTICS, shape.dim, settings)
        given = replace(call, logits=logits.to(setup.device), targets=targets.to(setup.device))
        exact = reference.row_stats(replace(call, logits=logits.double()))
        plain = reference.row_stats(call)
        with_gradient = number != 1 or setup.full
        if not with_gradient:
            yield from _statistics(name, setup, setup.backend.row_stats(given), exact, plain, capped)
            continue
        found, maximum, total = setup.backend.row_stats_saving(given)
        yield from _statistics(name, setup, found, exact, plain, capped)
        yield _gradient(name, setup, call, given, (maximum, total, found.entropy), _present(exact.loss).isfinite())
    if setup.device.type != "cpu":  # there a bad target is an error, before any kernel runs
        yield from _bad_targets(setup)


def _bad_targets(setup: Setup) -> Iterator[Comparison]:
    """Compare rows whose target is out of range: NaN, and nothing is read beyond the row."""
    logits, _ = rows(Shape(4, 10), setup)
    targets = torch.tensor([0, 10, -1, 2**40], device="cpu")
    call = StatsCall(logits.to(setup.device), targets.to(setup.device), STATISTICS, -1, _PLAIN)
    found = setup.backend.row_stats(call)
    yield equal("NaN of bad targets", _present(found.loss).isnan(), targets != 0)
    yield equal(
        "argmax of bad targets", _present(found.argmax)[1:], torch.full((3,), -1, dtype=torch.int64, device="cpu")
    )


def _statistics(
    name: str, setup: Setup, found: RowStats, exact: RowStats, plain: RowStats, capped: bool
) -> Iterator[Comparison]:
    for output in STATISTICS:
        ours, right, same = (getattr(stats, output) for stats in (found, exact, plain))
        if output == "argmax":
            if not capped:  # with a softcap, rounding decides which of two logits is the larger
                yield equal(f"argmax of {name}", ours, right)
        else:
            yield near(f"{output} of {name}", ours, right, same, TINY.get(setup.dtype, 1e-5))


def _gradient(
    name: str, setup: Setup, call: StatsCall, given: StatsCall, saved: tuple[Tensor, Tensor, Tensor], finite: Tensor
) -> Comparison:
    """Compare the gradient of the rows whose loss is finite: of the others it has no meaning."""
    random = torch.rand(2, *finite.shape, generator=setup.generator, dtype=torch.float64, device="cpu")
    random = torch.where(finite, random, 0.0).to(saved[0].dtype)
    upstream = dict(zip(DIFFERENTIABLE, random, strict=True))
    out = torch.empty_like(given.logits)
    given_upstream = {output: gradient.to(setup.device) for output, gradient in upstream.items()}
    setup.backend.row_stats_backward(replace(given, outputs=DIFFERENTIABLE), *saved, given_upstream, out)
    exact, plain = (
        _reference_gradient(call, call.logits.to(dtype), {output: g.to(accumulator) for output, g in upstream.items()})
        for dtype, accumulator in ((torch.float64, torch.float64), (setup.dtype, saved[0].dtype))
    )
    ours, right, same = (torch.where(finite.unsqueeze(call.dim), x.cpu(), 0.0) for x in (out, exact, plain))
    tiny = 1e-12 if setup.dtype is torch.float64 else 4 * max(torch.finfo(setup.dtype).eps, 2e-6)
    return near(f"gradient of {name}", ours, right, same, tiny)


def _reference_gradient(call: StatsCall, logits: Tensor, upstream: dict[str, Tensor]) -> Tensor:
    with torch.enable_grad():
        return reference.differentiable_gradient(call, logits.detach().requires_grad_(), upstream).detach()


def gate_rows(setup: Setup) -> Iterator[Comparison]:
    """Yield the comparisons of a threshold's decisions and of drawn ones.

    Args:
        setup: the surroundings.
    """
    gpu = setup.device.type != "cpu"
    shapes = [Shape(200 if gpu else 40, 10), Shape(1100 if gpu else ADVERSARIAL, 1001)]
    if setup.full:
        shapes += [Shape(20, 100), Shape(2, 9001), Shape(30, 21, 1), *([Shape(16_500, 40)] if gpu else [])]
    for shape in shapes:
        for temperature in (0.0, 0.5):
            yield from gated(setup, gate_call(shape, setup, temperature), setup.backend.gate_rows)
    yield _limits(setup)


def _limits(setup: Setup) -> Comparison:
    """Compare decisions at and beside the threshold, where significance is exactly the offset, and of ignored rows."""
    logits, targets = rows(Shape(6, 10), setup)
    targets[4:] = IGNORED
    above = -1.0 + 2.0**-24  # the next number of float32
    offset = torch.tensor([-1.0, above, -2.0, 3.0, 3.0, -2.0], dtype=torch.float32, device="cpu")
    threshold = torch.tensor([-1.0], dtype=torch.float32, device="cpu")
    call = GateCall(logits, targets, (), -1, _PLAIN, threshold, {"loss": 0.0}, offset)
    found = setup.backend.gate_rows(on_device(call, setup.device))
    return equal("mask at the threshold", found.mask, reference.gate_rows(call).mask)


def gate_call(shape: Shape, setup: Setup, temperature: float) -> GateCall:
    """Return a call on the CPU, in the middle of whose rows the threshold lies.

    Args:
        shape: of the batch.
        setup: dtype and generator.
        temperature: of the gate; 0 for a threshold.
    """
    logits, targets = _placed(shape, *rows(shape, setup))
    settings = Settings(gate_temperature=temperature, p_min=0.1 if temperature else 0.0, seed=2**40 + 7, step=2**33 + 1)
    offset = torch.rand(targets.shape, generator=setup.generator, dtype=torch.float32, device="cpu")
    threshold = torch.tensor([1.3 + 1.3 * math.log(shape.classes)], dtype=torch.float32, device="cpu")
    return GateCall(logits, targets, ("grad_norm",), shape.dim, settings, threshold, _WEIGHTS, offset)


def on_device(call: GateCall, device: torch.device) -> Any:
    """Return the call with its tensors on the device.

    Args:
        call: on the CPU.
        device: to move to.
    """
    return replace(
        call,
        logits=call.logits.to(device),
        targets=call.targets.to(device),
        threshold=call.threshold.to(device),
        offset=None if call.offset is None else call.offset.to(device),
    )


def gated(setup: Setup, call: GateCall, serve: Any) -> Iterator[Comparison]:
    """Yield the comparisons of one call.

    Args:
        setup: the surroundings.
        call: on the CPU.
        serve: the backend's function.
    """
    yield from decisions(setup, call, serve(on_device(call, setup.device)))


def decisions(setup: Setup, call: GateCall, found: GatedRows) -> Iterator[Comparison]:
    """Yield the comparisons of the decisions of one call; a row within rounding of its limit may fall on either side.

    Args:
        setup: the surroundings.
        call: on the CPU.
        found: of the same call on the device.
    """
    name = f"of gate_rows, {call.targets.numel()} x {call.classes}, temperature {call.settings.gate_temperature}"
    tiny = TINY.get(setup.dtype, 1e-5)
    exact, plain = reference.gate_rows(replace(call, logits=call.logits.double())), reference.gate_rows(call)
    yield near(f"significance {name}", found.significance, exact.significance, plain.significance, tiny)
    margin = 1e-4 * (1 + call.threshold.abs())
    sure = (exact.significance.nan_to_num(posinf=1e9) - call.threshold).abs() > margin
    if call.settings.gate_temperature:
        low, high = (_shifted(call, by) for by in (-margin, margin))
        sure = low.mask == high.mask
        weights = [torch.where(sure, _present(made.weight).cpu(), 0.0) for made in (found, exact, plain)]
        yield near(f"weight {name}", weights[0], weights[1].double(), weights[2], 1e-3)
    yield equal(f"mask {name}", torch.where(sure, found.mask.cpu(), exact.mask), exact.mask)
    yield equal(f"invalid {name}", found.invalid, exact.invalid)
    for output in call.outputs:
        right, same = getattr(exact.stats, output), getattr(plain.stats, output)
        yield near(f"{output} {name}", getattr(found.stats, output), right, same, tiny)


def _shifted(call: GateCall, by: Tensor) -> GatedRows:
    return reference.gate_rows(replace(call, logits=call.logits.double(), threshold=call.threshold + by))


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
