"""gate_step: select at a controller's threshold and control of it, as one call; it must be those two."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sparse_kernels as sk
from sparse_kernels import ControlState, _dispatch, _routing
from sparse_kernels.backends import cpp as cpp_backend
from sparse_kernels.backends import cpp_direct
from sparse_kernels.control_law import initial_state
from sparse_kernels.ops import gate_step


def fresh_state(threshold):
    return initial_state(torch.tensor(threshold))


def step_arguments(**changes):
    torch.manual_seed(0)
    logits = torch.randn(300, 6)
    logits[7] = math.nan
    targets = torch.arange(300) % 6
    targets[11] = -100
    return {
        "logits": logits, "targets": targets, "setpoint": torch.tensor(0.2), "weights": {"loss": 1.0}, **changes,
    }  # fmt: skip


@pytest.mark.parametrize("capacity", [None, 10, 290])
@pytest.mark.parametrize("targets_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(
    "options", [{}, {"by_mass": True}, {"gate_temperature": 0.5, "p_min": 0.1, "seed": 3}], ids=str
)
def test_gate_step_is_select_then_control(capacity, targets_dtype, options):
    arguments = step_arguments()
    arguments["targets"] = arguments["targets"].to(targets_dtype)
    state, apart = fresh_state(1.5), fresh_state(1.5)
    by_mass = options.get("by_mass", False)
    draws = {name: value for name, value in options.items() if name != "by_mass"}
    law = {name: value for name, value in draws.items() if name != "seed"}
    for _ in range(3):  # the draws and the threshold move with the state
        gated, selection, packed = gate_step(state=state, capacity=capacity, **arguments, **options)
        wanted = sk.select(
            arguments["logits"], arguments["targets"], apart.value("threshold"), weights={"loss": 1.0},
            capacity=capacity, outputs=("grad_norm",) if by_mass else (), step=apart.counter("steps"), **draws,
        )  # fmt: skip
        sk.control(
            apart, wanted.gated.significance, arguments["setpoint"], labels=arguments["targets"],
            mass=wanted.gated.stats.grad_norm, overflow=wanted.selection.overflow, **law,
        )  # fmt: skip
        assert packed is None
        assert 10 < int(gated.mask.sum()) < 290
        for a, b in zip((*gated[:3], *selection), (*wanted.gated[:3], *wanted.selection), strict=True):
            if isinstance(a, torch.Tensor):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            else:
                assert a == b
        assert torch.equal(state.counters, apart.counters)
        torch.testing.assert_close(state.values, apart.values, rtol=0, atol=0, equal_nan=True)
    assert state.counter("steps") == state.counter("invalid") == 3
    assert (int(state.counter("overflow")) > 0) == (capacity == 10)


@pytest.mark.skipif(cpp_backend.unavailable_reason() is not None, reason="the C++ backend is not built")
def test_gate_step_composes_where_it_is_seen_and_where_no_backend_has_it_as_one(monkeypatch):
    states = [fresh_state(1.5) for _ in range(3)]
    served = []
    through = _dispatch.serve_fused
    monkeypatch.setattr(cpp_direct, "AVAILABLE", False)
    monkeypatch.setattr(_routing, "serve_fused", lambda op, *rest: served.append(op) or through(op, *rest))
    alone = gate_step(state=states[0], **step_arguments())
    with FlopCounterMode(display=False):
        seen = gate_step(state=states[1], **step_arguments())
    assert served == ["gate_step"]
    monkeypatch.setattr(_dispatch, "_forced", "torch")
    reference = gate_step(state=states[2], **step_arguments())
    monkeypatch.setattr(_dispatch, "_forced", None)
    for other, state in ((seen, states[1]), (reference, states[2])):
        assert torch.equal(alone.selection.index, other.selection.index)
        assert torch.equal(states[0].counters, state.counters)
        torch.testing.assert_close(states[0].values, state.values, equal_nan=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": torch.full((300,), 6)},
        {"targets": torch.full((299,), 1)},
        {"setpoint": torch.tensor([0.1, 0.2])},
        {"setpoint": torch.tensor(0.2, dtype=torch.float64)},
        {"capacity": -1},
        {"offset": torch.ones(3)},
        {"logits": torch.randn(300, 6, device="meta"), "targets": torch.zeros(300, dtype=torch.int64, device="meta")},
    ],
    ids=["bad target", "rows", "two set-points", "double", "capacity", "offset", "device"],
)
def test_gate_step_that_is_refused_leaves_the_state(changes):
    state = fresh_state(1.5)
    before = ControlState(state.values.clone(), state.counters.clone())
    with pytest.raises(ValueError) as error:  # noqa: PT011  each message is its own
        gate_step(state=state, **step_arguments(**changes))
    assert "\n" not in str(error.value)
    torch.testing.assert_close(state.values, before.values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(state.counters, before.counters)


@pytest.mark.parametrize("change", ["values", "counters"])
def test_gate_step_refuses_the_state_of_another_shape(change):
    state = fresh_state(1.5)._replace(**{change: getattr(fresh_state(1.5), change)[:3]})
    with pytest.raises(ValueError, match=f"the state's {change} must be"):
        gate_step(state=state, **step_arguments())


@pytest.mark.parametrize("way", ["direct", "cpp", "torch", "seen"])
@pytest.mark.parametrize("options", [{}, {"gate_temperature": 0.5}], ids=str)
def test_autograd_refuses_what_it_had_saved_of_the_state(monkeypatch, way, options):
    """A kernel writes where autograd does not look: the gradient would be that of another threshold."""
    if way == "cpp":
        monkeypatch.setattr(cpp_direct, "AVAILABLE", False)
    state, factor = fresh_state(1.5), torch.ones((), requires_grad=True)
    product = factor * state.value("threshold")
    counters = state.counters._version
    with (
        _dispatch.forced("torch" if way == "torch" else None),
        FlopCounterMode(display=False) if way == "seen" else (torch.enable_grad()),
    ):
        gate_step(state=state, **step_arguments(), **options)
    assert state.value("threshold") != 1.5
    assert state.counters._version > counters
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_gate_step_takes_a_state_made_for_inference():
    with torch.inference_mode():
        state = fresh_state(1.5)
        gate_step(state=state, **step_arguments())
    assert state.counter("steps") == 1
