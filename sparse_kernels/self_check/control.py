"""Comparisons of ``control`` with its law in float64, and of the two operations that are several in few launches."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sparse_kernels import control_law, reference
from sparse_kernels._arguments import CompactCall, ControlCall, GateStepCall, SelectCall, Settings
from sparse_kernels.self_check.comparisons import Comparison, equal, near
from sparse_kernels.self_check.moves import selections
from sparse_kernels.self_check.scores import IGNORED, Setup, Shape, decisions, gate_call, on_device
from sparse_kernels.types import ControlState, Selected

_STEPS = 3
_LABELS = (torch.int64, torch.int32, torch.bool)  # one a step
_TINY = 1e-4  # the law's steps add up; a state is float32
_ROWS = (1, 700, 4097, 70_000)
_STEPPED = (200, 4100, 70_000)  # one block's rows, several blocks', and those counted in one launch, packed in another
_MORE_ROWS = (0, 31, 4096, 65_536, 65_537, 200_000)


def _advanced(
    state: ControlState, significance: Tensor, setpoint: Tensor, valid: Tensor | None, mass: Tensor | None,
    overflow: Tensor, settings: Settings, dtype: torch.dtype,
) -> ControlState:  # fmt: skip
    """Return the law's next state, on the CPU, in this precision."""
    if not significance.shape[-1]:  # no row to summarise: only the counters change
        after = _copied(state, torch.device("cpu"))
        control_law.control(ControlCall(after, significance, setpoint, None, None, overflow, settings))
        return ControlState(after.values.to(dtype), after.counters)
    wide = ControlState(state.values.to(dtype), state.counters)
    batch = control_law.summarise(
        significance.to(dtype), valid, None if mass is None else mass.to(dtype), wide.value("threshold"),
        settings.gate_temperature, settings.p_min,
    )  # fmt: skip
    return control_law.advance(wide, batch, setpoint.to(dtype), overflow)


def states(name: str, found: ControlState, exact: ControlState, plain: ControlState) -> list[Comparison]:
    """Return the comparisons of a state's two tensors.

    Args:
        name: of the call.
        found: on any device.
        exact: of float64 values, on the CPU.
        plain: of float32 values, on the CPU.
    """
    return [
        near(f"values of {name}", found.values, exact.values, plain.values, _TINY),
        equal(f"counters of {name}", found.counters, exact.counters),
    ]


def _copied(state: ControlState, device: torch.device) -> ControlState:
    return ControlState(state.values.to(device, copy=True), state.counters.to(device, copy=True))


def _compared(
    name: str, before: ControlState, after: ControlState, significance: Tensor, setpoint: Tensor,
    valid: Tensor | None, mass: Tensor | None, overflow: Tensor, settings: Settings,
) -> list[Comparison]:  # fmt: skip
    exact, plain = (
        _advanced(before, significance, setpoint, valid, mass, overflow, settings, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    return states(name, after, exact, plain)


def control(setup: Setup) -> Iterator[Comparison]:
    """Yield the comparisons of a few steps, for one state and for several, with and without masses and draws.

    Args:
        setup: the surroundings.
    """
    for rows in (*_ROWS, *(_MORE_ROWS if setup.full else ())):
        for shape, soft in (((), False), ((), True), ((3,), False)):
            if shape and rows > 5000:
                continue
            settings = Settings(ignore_index=1, gate_temperature=0.5 * soft, p_min=0.02 * soft)
            yield from _controlled(setup, (*shape, rows), settings, with_mass=soft or bool(shape))


def _controlled(setup: Setup, shape: tuple[int, ...], settings: Settings, with_mass: bool) -> Iterator[Comparison]:
    number = torch.arange(math.prod(shape[:-1]), device="cpu").view(shape[:-1])  # each state's inputs are its own
    setpoint, overflow = 0.3 + 0.1 * number.float(), 2 + number.int()
    state = control_law.initial_state(1.5 + 0.2 * number.float())
    moved = _copied(state, setup.device)
    for step in range(_STEPS):
        significance = torch.randn(shape, generator=setup.generator, dtype=torch.float32, device="cpu").exp()
        if shape[-1] > 600:
            significance[..., ::97], significance[..., 1::101] = math.nan, math.inf
        labels = torch.randint(0, 10, shape, generator=setup.generator, device="cpu").to(_LABELS[step])
        mass = torch.rand(shape, generator=setup.generator, dtype=torch.float32, device="cpu") if with_mass else None
        before = _copied(moved, torch.device("cpu"))
        setup.backend.control(
            ControlCall(
                moved, significance.to(setup.device), setpoint.to(setup.device), labels.to(setup.device),
                None if mass is None else mass.to(setup.device), overflow.to(setup.device), settings,
            )
        )  # fmt: skip
        name = f"control, {shape[-1]} rows, step {step}"
        valid = labels != settings.ignore_index
        yield from _compared(name, before, moved, significance, setpoint, valid, mass, overflow, settings)


def select(setup: Setup) -> Iterator[Comparison]:
    """Yield the comparisons of decisions, their packing and the packed rows of one call.

    Args:
        setup: the surroundings.
    """
    rows_of = (300, 40) if _large(setup) else (40, 14)
    for shape, temperature in ((Shape(rows_of[0], 10), 0.0), (Shape(rows_of[1], 21, 1), 0.5)):
        call = gate_call(shape, setup, temperature)
        rows = call.targets.numel()
        tree = [
            torch.arange(rows, device="cpu"),
            torch.rand(rows, 5, generator=setup.generator, dtype=torch.float32, device="cpu"),
        ]
        given = on_device(call, setup.device)
        for capacity in (None, rows // 3):
            packed = [tensor.to(setup.device) for tensor in tree]
            found: Selected = setup.backend.select(
                SelectCall(
                    given.logits, given.targets, given.outputs, given.dim, given.settings, given.threshold,
                    given.weights, given.offset, packed, capacity,
                )
            )  # fmt: skip
            yield from decisions(setup, call, found.gated)
            yield from _packed(f"select, capacity {capacity}", found, capacity)
            for tensor, taken in zip(tree, found.packed, strict=True):
                yield equal(f"packed rows of select, capacity {capacity}", taken, tensor[found.selection.index.cpu()])


def _large(setup: Setup) -> bool:
    return setup.device.type != "cpu"


def _packed(name: str, found: Selected, capacity: int | None) -> list[Comparison]:
    """Compare the selection with the reference's of the same decisions."""
    mask, weight = found.gated.mask.flatten().cpu(), found.gated.weight
    exact = reference.compact(CompactCall(mask, None if weight is None else weight.flatten().cpu(), capacity))
    return selections(name, found.selection, exact)


def gate_step(setup: Setup) -> Iterator[Comparison]:
    """Yield the comparisons of a few steps: their decisions, packing and state.

    Args:
        setup: the surroundings.
    """
    for rows in _STEPPED if _large(setup) else _STEPPED[:1]:
        for temperature, by_mass in ((0.0, False), (0.5, True)):
            state = control_law.initial_state(torch.tensor(1.5, dtype=torch.float32, device=setup.device))
            for step in range(_STEPS):
                yield from _stepped(setup, rows, state, temperature, by_mass, step)


def _stepped(
    setup: Setup, rows: int, state: ControlState, temperature: float, by_mass: bool, step: int
) -> Iterator[Comparison]:
    logits = 2 * torch.randn(rows, 5, generator=setup.generator, dtype=torch.float32, device="cpu")
    targets = torch.arange(rows, device="cpu") % 5
    logits[5::97, 2], targets[::9] = math.nan, IGNORED
    setpoint = torch.tensor(0.3, dtype=torch.float32, device="cpu")
    settings = Settings(gate_temperature=temperature, p_min=0.05 if temperature else 0.0, seed=3)
    before = _copied(state, torch.device("cpu"))
    call = GateStepCall(
        logits.to(setup.dtype).to(setup.device), targets.to(setup.device), ("grad_norm",) if by_mass else (), -1,
        settings._replace(step=state.counters[0]) if temperature else settings, state.values, {"loss": 1.0}, None,
        rows // 3, state, setpoint.to(setup.device), by_mass,
    )  # fmt: skip
    found: Selected = setup.backend.gate_step(call)
    name = f"gate_step, {rows} rows, temperature {temperature}, step {step}"
    yield from _packed(name, found, rows // 3)
    significance, mass = found.gated.significance.cpu(), found.gated.stats.grad_norm
    yield equal(f"invalid of {name}", found.gated.invalid.cpu(), significance.isnan().sum(dtype=torch.int32))
    yield from _compared(
        name, before, state, significance, setpoint, targets != IGNORED, None if mass is None else mass.cpu(),
        found.selection.overflow.cpu(), settings,
    )  # fmt: skip
