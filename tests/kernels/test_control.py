"""``control``: every backend takes the same step from any state, and the packed state is what it says.

What the law achieves is in tests/training/test_controller.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_kernels import BackendUnavailable, ControlState, control
from sparse_kernels._arguments import ControlCall, Settings
from sparse_kernels.backends import cpp as cpp_backend
from sparse_kernels.backends import cuda as cuda_backend
from sparse_kernels.control_law import advance, initial_state, summarise
from sparse_kernels.types import CONTROL_COUNTERS, CONTROL_VALUES

MISSING = cpp_backend.unavailable_reason()
needs_cpp = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
STATES = 2000


def random_states(seed: int, scale: Tensor) -> ControlState:
    """States such as runs reach, and some that they hardly do; ``scale`` [STATES] is the significance's."""
    g = torch.Generator().manual_seed(seed)

    def log_uniform(low: float, high: float) -> Tensor:
        return torch.exp(math.log(low) + math.log(high / low) * torch.rand(STATES, generator=g))

    def sometimes(share: float) -> Tensor:
        return torch.rand(STATES, generator=g) < share

    state = initial_state(scale * torch.randn(STATES, generator=g).exp())
    running = ~sometimes(0.1)
    pp, dd = log_uniform(1e-4, 4.0), log_uniform(1e-8, 1e-3)
    values = {
        "drift": 0.02 * torch.randn(STATES, generator=g),
        "position_variance": pp,
        "covariance": (pp * dd).sqrt() * (2 * torch.rand(STATES, generator=g) - 1),
        "drift_variance": dd,
        "unit": torch.where(sometimes(0.1), 0.0, scale * log_uniform(1e-2, 1.0)),
        "error": 0.3 * torch.randn(STATES, generator=g),
        "error_variance": log_uniform(1e-5, 1e-1),
        "surprise": torch.where(sometimes(0.3), 12 * torch.rand(STATES, generator=g), 0.0),
        "misses": torch.rand(STATES, generator=g),
        "rate": torch.rand(STATES, generator=g),
    }
    for name, value in values.items():
        view = state.value(name)
        view.copy_(torch.where(running, value, view))
    state.value("threshold").masked_fill_(sometimes(0.1), -math.inf)
    state.counters.copy_(torch.randint(0, 1000, state.counters.shape, generator=g))
    state.counter("steps").masked_fill_(sometimes(0.1), 2**40)  # beyond float32
    return state


def copy_of(state: ControlState) -> ControlState:
    return ControlState(state.values.clone(), state.counters.clone())


def assert_same_step(before: ControlState, ours: ControlState, reference: ControlState, exact: ControlState) -> None:
    """Counters equal, and values no further from float64's than the float32 reference's own error."""
    assert torch.equal(ours.counters, reference.counters)
    for k, name in enumerate(CONTROL_VALUES):
        a, b, c = (state.values[..., k].double() for state in (ours, reference, exact))
        assert torch.equal(a.isfinite(), c.isfinite()), name
        # What a value is added to sets its rounding, and so does what it comes from.
        size = torch.maximum(c.abs(), before.values[..., k].double().abs())
        if name in ("threshold", "unit"):
            size = torch.maximum(size, exact.values[..., 0].double().abs().nan_to_num(0.0, 0.0, 0.0))
        size = size + (1e-9 if "variance" in name else 1e-3)
        error, own = ((a - c).abs() / size).nan_to_num(0.0), ((b - c).abs() / size).nan_to_num(0.0)
        assert error.max() <= 8 * own.max() + 2e-6, (name, int(error.argmax()), error.max(), own.max())


def step_everywhere(
    state: ControlState, significance: Tensor, setpoint: Tensor, *, labels: Tensor | None = None,
    mass: Tensor | None = None, overflow: Tensor | None = None, temperature: float = 0.0, p_min: float = 0.0,
) -> None:  # fmt: skip
    ours, reference = copy_of(state), copy_of(state)
    for backend, moved in (("cpp", ours), ("torch", reference)):
        control(
            moved, significance, setpoint, labels=labels, ignore_index=7, mass=mass, overflow=overflow,
            gate_temperature=temperature, p_min=p_min, backend=backend,
        )  # fmt: skip
    valid = None if labels is None else labels != 7
    wide = ControlState(state.values.double(), state.counters)
    wide_mass = None if mass is None else mass.double()
    batch = summarise(significance.double(), valid, wide_mass, wide.value("threshold"), temperature, p_min)
    assert_same_step(state, ours, reference, advance(wide, batch, setpoint.double(), overflow))


@needs_cpp
@pytest.mark.parametrize("with_mass", [False, True], ids=["rate", "mass"])
@pytest.mark.parametrize(("temperature", "p_min"), [(0.0, 0.0), (0.5, 0.0), (2.0, 0.03)])
@pytest.mark.parametrize("rows", [1, 17, 256, 300, 1000])
def test_cpp_takes_the_reference_step(rows: int, temperature: float, p_min: float, with_mass: bool) -> None:
    g = torch.Generator().manual_seed(rows)
    scale = 10 ** torch.randint(-3, 4, (STATES,), generator=g).float()
    state = random_states(rows, scale)
    significance = scale[:, None] * torch.randn((STATES, rows), generator=g).exp()
    significance[:200] -= 2 * scale[:200, None]  # of either sign
    significance[200:300] = significance[200:300, :1]  # all equal
    kinds = torch.rand((STATES, rows), generator=g)
    for share, value in ((0.02, math.nan), (0.03, math.inf), (0.04, -math.inf)):
        significance[300:600] = torch.where(kinds[300:600] < share, value, significance[300:600])
        kinds = torch.where(kinds < share, 1.0, kinds)
    significance[600:620], significance[620:640], significance[640:660] = math.nan, math.inf, -math.inf
    setpoint = torch.rand(STATES, generator=g) * 0.98 + 0.01
    setpoint[::50] = 1.0
    labels = torch.randint(0, 10, (STATES, rows), generator=g)
    labels[700:720] = 7  # all ignored
    mass = None
    if with_mass:
        mass = 10 ** torch.randint(-12, 3, (STATES, 1), generator=g).float() * torch.rand((STATES, rows), generator=g)
        mass[:100, ::3], mass[100:110], mass[110:120, ::2] = 0.0, 0.0, math.nan
    overflow = torch.randint(0, 100, (STATES,), dtype=torch.int32, generator=g)
    step_everywhere(
        state, significance, setpoint, labels=labels, mass=mass, overflow=overflow, temperature=temperature, p_min=p_min
    )


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
@pytest.mark.parametrize("rows", [5, 700])
def test_labels_of_every_type_leave_the_same_rows_out(dtype: torch.dtype, rows: int) -> None:
    g = torch.Generator().manual_seed(0)
    significance = torch.randn((3, rows), generator=g).exp()
    valid = torch.rand((3, rows), generator=g) < 0.7
    labels = valid if dtype is torch.bool else torch.where(valid, 3, -100).to(dtype)
    state, plain = initial_state(torch.ones(3)), initial_state(torch.ones(3))
    for backend in ("cpp", "torch"):
        control(
            state, significance, torch.full((3,), 0.2), labels=labels, backend=backend,
            ignore_index=0 if dtype is torch.bool else -100,
        )  # fmt: skip
        control(plain, torch.where(valid, significance, math.nan), torch.full((3,), 0.2), backend=backend)
    torch.testing.assert_close(state.values, plain.values, rtol=1e-6, atol=0)
    assert state.counter("invalid").sum() == 0
    assert plain.counter("invalid").sum() == 2 * (~valid).sum()


@needs_cpp
def test_many_rows_are_split_among_threads_and_sum_alike() -> None:
    g = torch.Generator().manual_seed(0)
    significance = torch.randn((2, 300_001), generator=g).exp()
    significance[:, ::1000] = math.nan
    state = initial_state(torch.tensor([1.0, 5.0]))
    state.value("unit").fill_(0.5)
    step_everywhere(state, significance, torch.tensor([0.1, 0.5]))


@needs_cpp
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_backends_steer_a_run_alike(temperature: float) -> None:
    g = torch.Generator().manual_seed(0)
    batches = torch.randn((200, 128), generator=g).exp()
    ours, reference = initial_state(torch.tensor(-math.inf)), initial_state(torch.tensor(-math.inf))
    for batch in batches:
        control(ours, batch, torch.tensor(0.2), gate_temperature=temperature, backend="cpp")
        control(reference, batch, torch.tensor(0.2), gate_temperature=temperature, backend="torch")
    torch.testing.assert_close(ours.values, reference.values, rtol=1e-3, atol=1e-5)


def backends() -> list[str]:
    return ["torch"] if cpp_backend.unavailable_reason() else ["torch", "cpp"]


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize(
    "rows", [torch.empty(0), torch.full((64,), math.nan), torch.full((64,), 0.5)], ids=["empty", "NaN", "ignored"]
)
def test_a_batch_without_a_valid_row_moves_the_counters_alone(backend: str, rows: Tensor) -> None:
    state = initial_state(torch.tensor(2.0))
    control(state, torch.rand(64), torch.tensor(0.1), backend=backend)
    before = copy_of(state)
    ignored = rows.numel() > 0 and not rows.isnan().any()
    control(state, rows, torch.tensor(0.1), labels=torch.full(rows.shape, -100 if ignored else 1), backend=backend)
    assert torch.equal(state.values, before.values)
    expected = dict(zip(CONTROL_COUNTERS, before.counters.tolist(), strict=True))
    expected["steps"] += 1
    expected["invalid"] += int(rows.isnan().sum())
    assert dict(zip(CONTROL_COUNTERS, state.counters.tolist(), strict=True)) == expected


@pytest.mark.parametrize("backend", backends())
def test_a_set_point_of_one_keeps_everything_and_less_starts_afresh(backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    state = initial_state(torch.tensor(-math.inf))

    def run(setpoint: float, batches: int) -> None:
        for _ in range(batches):
            control(state, torch.randn(512, generator=g).exp(), torch.tensor(setpoint), backend=backend)

    run(0.3, 50)
    run(1.0, 3)
    assert state.value("threshold") == -math.inf
    assert state.value("rate").isfinite()
    run(0.1, 50)
    rate = torch.special.ndtr(-state.value("threshold").log())
    assert rate.item() == pytest.approx(0.1, abs=0.02)
    assert state.counter("saturated") == 0


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("bad", [0.0, -0.0, -1.0, -math.inf, math.nan, 1e-45])
@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_one_bad_set_point_is_recovered_from(backend: str, bad: float, temperature: float) -> None:
    g = torch.Generator().manual_seed(0)
    state = initial_state(torch.tensor(1.0))

    def run(setpoint: float, batches: int) -> None:
        for _ in range(batches):
            batch = torch.randn(512, generator=g).exp()
            control(state, batch, torch.tensor(setpoint), gate_temperature=temperature, backend=backend)

    run(0.3, 50)
    before = copy_of(state)
    run(bad, 1)
    assert state.values.isfinite().all()
    assert state.counter("steps") == 51
    if math.isnan(bad):  # no measurement
        assert torch.equal(state.values, before.values)
        assert torch.equal(state.counters[1:], before.counters[1:])
    else:
        assert state.value("threshold") > before.value("threshold")
    run(0.3, 60)
    assert state.values.isfinite().all()
    assert not torch.equal(state.values, before.values)
    batch = torch.randn(100_000, generator=g).exp() - state.value("threshold")
    rate = (batch / temperature).sigmoid().mean() if temperature else (batch > 0).float().mean()
    assert rate.item() == pytest.approx(0.3, abs=0.05)


@needs_cpp
@pytest.mark.parametrize("bad", [0.0, -1.0, -math.inf, math.nan, 1e-45, 1e-13, 2.0, math.inf])
def test_cpp_takes_the_reference_step_from_a_bad_set_point(bad: float) -> None:
    scale = torch.ones(STATES)
    before, rows = random_states(3, scale), torch.randn(STATES, 64, generator=torch.Generator().manual_seed(1)).exp()
    setpoint, steps = torch.full((STATES,), bad), []
    for backend in ("cpp", "torch"):
        state = copy_of(before)
        control(state, rows, setpoint, backend=backend)
        steps.append(state)
    assert torch.equal(steps[0].counters, steps[1].counters)
    torch.testing.assert_close(steps[0].values, steps[1].values, rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("through_the_operator", [False, True])
def test_autograd_refuses_what_it_had_saved_of_a_state(backend: str, through_the_operator: bool) -> None:
    state = initial_state(torch.tensor(1.0))
    factor = torch.ones((), requires_grad=True)
    product = factor * state.value("threshold")  # saves the threshold for its gradient
    counters = state.counters._version
    if through_the_operator and backend != "torch":
        arguments = state.values, state.counters, torch.rand(64), torch.tensor(0.1)
        torch.ops.sparse_kernels.control(*arguments, None, -100, None, None, 0.0, 0.0, backend)
    else:
        control(state, torch.rand(64), torch.tensor(0.1), backend=backend)
    assert state.value("threshold") != 1.0
    assert state.counters._version > counters
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("backend", backends())
def test_a_state_made_for_inference_has_no_version(backend: str) -> None:
    with torch.inference_mode():
        state = initial_state(torch.tensor(1.0))
        control(state, torch.rand(64), torch.tensor(0.1), backend=backend)
    assert state.counter("steps") == 1


@pytest.mark.parametrize("backend", backends())
def test_an_empty_batch_counts_its_overflow(backend: str) -> None:
    for threshold, counted in ((1.0, 5), (-math.inf, 0)):
        state, overflow = initial_state(torch.tensor(threshold)), torch.tensor(5, dtype=torch.int32)
        control(state, torch.empty(0), torch.tensor(0.1), overflow=overflow, backend=backend)
        assert state.counters.tolist() == [1, 0, 0, counted]


@pytest.mark.parametrize("backend", backends())
def test_overflow_counts_but_for_the_batch_of_an_automatic_start(backend: str) -> None:
    state = initial_state(torch.tensor(-math.inf))
    for _ in range(3):
        overflow = torch.tensor(5, dtype=torch.int32)
        control(state, torch.rand(64), torch.tensor(0.1), overflow=overflow, backend=backend)
    assert state.counter("overflow") == 10
    assert state.counter("steps") == 3


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("share", [0.3, 0.9])
@pytest.mark.parametrize("spread", [0.1, 0.7])
def test_a_share_of_mass_is_held(backend: str, share: float, spread: float) -> None:
    """Rows of log-normal significance that count by it: the share above t is known in closed form."""
    g = torch.Generator().manual_seed(0)
    states = 10
    state, setpoint = initial_state(torch.full((states,), -math.inf)), torch.full((states,), share)
    shares = []
    for t in range(120):
        batch = torch.exp(spread * torch.randn((states, 512), generator=g))
        if t >= 50:
            shares.append(torch.special.ndtr(spread - state.value("threshold").double().log() / spread))
        control(state, batch, setpoint, mass=batch, backend=backend)
    assert torch.stack(shares).mean().item() == pytest.approx(share, abs=0.01)
    assert state.value("rate").mean().item() == pytest.approx(share, abs=0.02)
    assert state.counter("saturated").max() == 0


@pytest.mark.parametrize("backend", backends())
def test_equal_masses_are_a_rate_whatever_they_are(backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    plain, weighted = initial_state(torch.tensor(1.0)), initial_state(torch.tensor(1.0))
    for _ in range(30):
        batch = torch.randn(300, generator=g).exp()
        control(plain, batch, torch.tensor(0.2), backend=backend)
        control(weighted, batch, torch.tensor(0.2), mass=torch.full_like(batch, 1e-8), backend=backend)
    torch.testing.assert_close(plain.values, weighted.values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("again", [False, True], ids=["fresh", "the same"])
def test_an_automatic_start_lands_below_a_bound_that_rows_reach(backend: str, again: bool) -> None:
    """A hundredth of the rows is at the greatest value, and no threshold there has a row above it."""
    g = torch.Generator().manual_seed(0)
    batch = 10 + torch.rand((1, 1024), generator=g)
    state, rates = initial_state(torch.full((1,), -math.inf)), []
    for _ in range(60):
        batch = batch if again else 10 + torch.rand((1, 1024), generator=g)
        batch[:, 0], batch[:, 1:12] = 0.0, 11.0
        rates.append((batch > state.value("threshold")[:, None]).float().mean().item())
        control(state, batch, torch.tensor(0.1), backend=backend)
    assert sum(rates[30:]) / 30 == pytest.approx(0.1, abs=0.01)


def test_rows_of_minus_infinity_do_not_hold_an_automatic_start_up() -> None:
    state = initial_state(torch.tensor(-math.inf))
    for backend in backends():
        control(state, torch.cat((torch.rand(100), torch.full((9,), -math.inf))), torch.tensor(0.1), backend=backend)
        assert 0.0 <= state.value("threshold") <= 1.0


def test_nothing_is_read_back() -> None:
    # Tensors without storage: .item(), bool() or a data-dependent shape would raise.
    state = ControlState(*(tensor.to("meta") for tensor in initial_state(torch.zeros(()))))
    significance, mass = torch.empty(512, device="meta"), torch.empty(512, device="meta")
    labels = torch.empty(512, dtype=torch.int64, device="meta")
    control(state, significance, torch.empty((), device="meta"), labels=labels, mass=mass, gate_temperature=1.0)


@pytest.mark.parametrize("backend", [None, "torch"])
def test_compiles_into_one_graph(backend: str | None) -> None:
    eager, compiled = initial_state(torch.tensor(1.0)), initial_state(torch.tensor(1.0))
    graph = torch.compile(control, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        batch = torch.rand(64)
        control(eager, batch, torch.tensor(0.2), backend=backend)
        graph(compiled, batch, torch.tensor(0.2), backend=backend)
    assert torch.equal(eager.values, compiled.values)
    assert torch.equal(eager.counters, compiled.counters)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"significance": torch.zeros(8, dtype=torch.int64)}, "`significance` must be floating .*, got torch.int64"),
        ({"state": ControlState(torch.zeros(3), torch.zeros(4, dtype=torch.int64))}, "the state's values must be"),
        ({"state": ControlState(torch.zeros(11), torch.zeros(4))}, "the state's counters must be"),
        ({"setpoint": torch.tensor([0.1, 0.2])}, "`setpoint` must be"),
        ({"labels": torch.zeros(7, dtype=torch.int64)}, "`labels` must be"),
        ({"labels": torch.zeros(8)}, "`labels` must be"),
        ({"mass": torch.zeros(7)}, "`mass` must be"),
        ({"overflow": torch.zeros(2, dtype=torch.int32)}, "`overflow` must be"),
        ({"significance": torch.zeros(8, device="meta")}, "must be on meta as the significance, got cpu"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    call = {
        "state": initial_state(torch.tensor(1.0)),
        "significance": torch.zeros(8),
        "setpoint": torch.tensor(0.1),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        control(**call)  # type: ignore[arg-type]


def test_cpp_by_name_says_why_not() -> None:
    state = initial_state(torch.tensor(1.0))
    control(state, torch.zeros(8, dtype=torch.float64), torch.tensor(0.1))  # by default the reference takes it
    with pytest.raises(BackendUnavailable):
        control(state, torch.zeros(8, dtype=torch.float64), torch.tensor(0.1), backend="cpp")


@pytest.mark.parametrize("backend", [cpp_backend, cuda_backend], ids=["cpp", "cuda"])
def test_compiled_kernels_refuse_what_they_cannot_read_or_move(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    """On every device: here each tensor passes for one of theirs."""
    monkeypatch.setattr(backend, "_tensor_unsupported_reason", lambda tensor: None)
    state = initial_state(torch.ones(3))

    def refused(state: ControlState, dtype: torch.dtype = torch.float32) -> str | None:
        call = ControlCall(state, torch.zeros(3, 8, dtype=dtype), torch.full((3,), 0.1), None, None, None, Settings())
        reason: str | None = backend.control_unsupported_reason(call)
        return reason

    assert refused(state) is None
    assert refused(state, torch.float64) == "significance is torch.float64; it serves float32"
    for name, tensor in zip(state._fields, state, strict=True):
        strided = torch.stack((tensor, tensor), 1)[:, 0]
        assert refused(state._replace(**{name: strided})) == "a state that is not contiguous cannot be updated in place"
    for shape in ((3, 8), state.values.shape):  # the significance, the state
        monkeypatch.setattr(
            backend, "_tensor_unsupported_reason", lambda tensor, shape=shape: "why" * (tensor.shape == shape) or None
        )
        assert refused(state, torch.float64) == "why"


def test_a_state_that_is_not_contiguous_is_moved_by_the_reference() -> None:
    state = initial_state(torch.ones(3))
    strided = ControlState(*(torch.stack((tensor, tensor), 1)[:, 0] for tensor in state))
    significance, setpoint = torch.arange(24.0).reshape(3, 8), torch.full((3,), 0.1)
    for moved in (state, strided):
        control(moved, significance, setpoint, backend="torch" if moved is state else None)
    assert torch.equal(strided.values, state.values)
    assert torch.equal(strided.counters, state.counters)
