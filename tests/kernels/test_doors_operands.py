"""What a caller brings besides plain logits: each tensor is read by its values, or refused; no address is wild.

What once was a segmentation fault runs in a process of its own.
"""

import math

import fresh
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparse_kernels as sk
from sparse_kernels import _tracing
from sparse_kernels.backends import cpp as cpp_backend
from sparse_kernels.control_law import initial_state
from sparse_kernels.sum_tree import SumTree, uniform_double

BACKENDS = ["torch"] + ([] if cpp_backend.unavailable_reason() else ["cpp"])
WEIGHTS = {"loss": 0.7, "entropy": 0.3}


class Wrapped(Tensor):
    """A subclass whose memory may mean anything."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def negated(tensor: Tensor) -> Tensor:
    """The same values, whose bytes are their negatives."""
    view = torch._neg_view(-tensor)
    assert view.is_neg()
    return view


def imaginary(tensor: Tensor) -> Tensor:
    """The same values by public means: the imaginary part of a conjugate."""
    view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert view.is_neg()
    return view


def same(a, b):
    leaves_a, leaves_b = torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b)
    assert len(leaves_a) == len(leaves_b)
    for x, y in zip(leaves_a, leaves_b, strict=True):
        if isinstance(x, Tensor):
            torch.testing.assert_close(x.as_subclass(Tensor), y.as_subclass(Tensor), equal_nan=True)
        else:
            assert x == y


def survives(code: str) -> str:
    """Run in a process of its own; what it prints."""
    lines = "import numpy as np, torch\nimport sparse_kernels as sk\nfrom sparse_kernels.sum_tree import *\n"
    done = fresh.run("-c", lines + code)
    assert done.returncode == 0, f"died with {done.returncode}: {done.stderr[-800:]}"
    return done.stdout


@pytest.mark.parametrize("dtype", ["int64", "int32", "int16", "uint8"])
def test_a_sum_tree_takes_indices_of_any_integer_dtype(dtype):
    shown = survives(
        f"leaves = torch.ones(300_000)\ntree = SumTree(leaves)\nindex = torch.arange(0, 100).to(torch.{dtype})\n"
        "leaves[:100] = 3.0\ntree.update(index)\nprint(tree.total)\n"
        "same = torch.equal(uniform_double(index, seed=1, step=2), uniform_double(index.long(), seed=1, step=2))\n"
        "print(same)\nprint(tree.find(torch.tensor([0.0, 299.5, 300.5])).tolist())\n"
        "print(tree.find(torch.tensor([0.0, 299.5, 300.5], dtype=torch.float64)).tolist())\n"
    )
    assert shown.split("\n")[:4] == ["300200.0", "True", "[0, 99, 100]", "[0, 99, 100]"]


def test_a_history_sampler_takes_the_numbers_that_a_data_set_gives():
    shown = survives(
        "from sparse_training import HistorySampler\n"
        "samplers = [HistorySampler(200_000, batch_size=64, rate=0.5) for _ in range(2)]\n"
        "index = np.arange(0, 200_000, 50, dtype=np.int32)\nlosses = torch.rand(len(index))\n"
        "index = torch.as_tensor(index)\nsamplers[0].update(index, losses)\nsamplers[1].update(index.long(), losses)\n"
        "for sampler in samplers:\n    print(sum(map(int, next(iter(sampler)))))\n"
    )
    first, second = shown.split()
    assert first == second


@pytest.mark.parametrize("cpp", [False, True] if "cpp" in BACKENDS else [False])
def test_a_sum_tree_refuses_what_is_no_index(cpp):
    tree = SumTree(torch.ones(100), cpp=cpp)
    for index in (torch.tensor([1.0]), torch.tensor([True]), torch.tensor([1j])):
        with pytest.raises(TypeError, match="`index` must be integers, got torch"):
            tree.update(index)
        with pytest.raises(TypeError, match="`rows` must be integers, got torch"):
            uniform_double(index, seed=0, step=0, cpp=cpp)
    with pytest.raises(TypeError, match="`targets` must be floating, got torch"):
        tree.find(torch.tensor([1]))
    for zeros in (torch._efficientzerotensor(3, dtype=torch.int64), [0, 0, 0], np.zeros(3, np.int32)):
        tree.update(zeros)
        same(uniform_double(zeros, seed=1, step=2, cpp=cpp), uniform_double(torch.zeros(3).long(), seed=1, step=2))
    same(tree.find(negated(torch.tensor([5.5], dtype=torch.float64))), torch.tensor([5]))
    with pytest.raises(ValueError, match="`leaves` must be on the CPU, no negated view"):
        SumTree(torch._efficientzerotensor(100), cpp=cpp)


@pytest.mark.parametrize("which", ["targets", "threshold", "offset", "step"])
@pytest.mark.parametrize("how", ["subclass", "zeros"])
def test_an_operand_without_an_address_is_served_by_its_values(which, how):
    shown = survives(
        "class Wrapped(torch.Tensor):\n    __torch_function__ = torch._C._disabled_torch_function_impl\n"
        "kinds = {'targets': torch.int64, 'step': torch.int64}\n"
        f"which, how = {which!r}, {how!r}\nlogits = torch.randn(5000, 16)\n"
        "call = dict(targets=torch.zeros(5000, dtype=torch.int64), threshold=torch.zeros(()),\n"
        "            offset=torch.zeros(5000), step=torch.zeros((), dtype=torch.int64))\n"
        "plain = sk.gate_rows(logits, weights={'loss': 1.0}, gate_temperature=0.5, **call)\n"
        "zeros = torch._efficientzerotensor(call[which].shape, dtype=kinds.get(which, torch.float32))\n"
        "call[which] = zeros if how == 'zeros' else call[which].as_subclass(Wrapped)\n"
        "seen = sk.gate_rows(logits, weights={'loss': 1.0}, gate_temperature=0.5, **call)\n"
        "torch.testing.assert_close(seen.significance.as_subclass(torch.Tensor), plain.significance)\n"
        "if which == 'targets':\n"
        "    a, b = (sk.row_stats(logits, t).loss for t in (call['targets'], torch.zeros(5000, dtype=torch.int64)))\n"
        "    torch.testing.assert_close(a.as_subclass(torch.Tensor), b)\n"
        "print('same')\n"
    )
    assert "same" in shown


VIEWS = [negated, imaginary]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_negated_view_is_read_with_its_sign(backend, view):
    torch.manual_seed(0)
    logits, targets = torch.randn(64, 10), torch.randint(10, (64,))
    threshold, offset = torch.tensor(1.5), torch.randn(64)

    def gate(logits, threshold, offset):
        gated = sk.gate_rows(logits, targets, threshold, weights=WEIGHTS, offset=offset, backend=backend)
        selected = sk.select(logits, targets, threshold, weights=WEIGHTS, offset=offset, backend=backend)
        return gated, selected

    plain = gate(logits, threshold, offset)
    same(gate(logits, view(threshold), offset), plain)
    same(gate(logits, threshold, view(offset)), plain)
    same(gate(view(logits), threshold, offset), plain)
    mask, weight = torch.rand(64) < 0.5, torch.rand(64)
    same(sk.compact(mask, weight=view(weight), backend=backend), sk.compact(mask, weight=weight, backend=backend))
    selection = sk.compact(mask)
    same(selection.take({"x": view(offset), "y": [view(logits)]}), selection.take({"x": offset, "y": [logits]}))
    states = [initial_state(torch.tensor(0.5)) for _ in range(2)]
    significance, mass, setpoint = torch.rand(64) - 0.3, torch.rand(64), torch.tensor(0.2)
    sk.control(states[0], significance, setpoint, mass=mass, backend=backend)
    sk.control(states[1], view(significance), view(setpoint), mass=view(mass), backend=backend)
    same(states[1], states[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_negated_integers_are_read_with_their_sign(backend):
    logits, targets = torch.randn(8, 10), torch.arange(8)
    same(sk.row_stats(logits, negated(targets), backend=backend), sk.row_stats(logits, targets))
    gated = [
        sk.gate_rows(logits, t, torch.tensor(1.5), weights=WEIGHTS, gate_temperature=1.0, step=step, backend=backend)
        for t, step in ((targets, torch.tensor(3)), (negated(targets), negated(torch.tensor(3))))
    ]
    same(*gated)
    selection = sk.compact(targets % 2 == 0)
    by_hand = selection._replace(index=negated(selection.index), count=negated(selection.count))
    for move, rows in ((sk.gather_rows, targets), (sk.scatter_rows, targets[:4])):
        same(move(rows, by_hand, backend=backend), move(rows, selection))
        same(move(negated(rows), selection, backend=backend), move(rows, selection))
    same(sk.gather_rows(targets, by_hand), sk.gather_rows(targets, selection))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_negated_state_is_updated_or_refused(backend):
    plain = initial_state(torch.tensor(0.5))
    state = sk.ControlState(negated(plain.values), plain.counters.clone())
    significance, setpoint = torch.rand(64), torch.tensor(0.2)
    if backend == "cpp":
        with pytest.raises(sk.BackendUnavailable, match="negated view"):
            sk.control(state, significance, setpoint, backend=backend)
        assert state.counter("steps") == 0
        return
    sk.control(state, significance, setpoint, backend=backend)
    sk.control(plain, significance, setpoint, backend=backend)
    same(state, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_is_no_whole_number_is_refused(backend):
    logits, targets = torch.randn(8, 10), torch.arange(8)
    for step in (torch.tensor(1.5), torch.tensor(1.0), torch.tensor([1, 2]), torch.tensor(True), 1.5, "1"):
        with pytest.raises(TypeError, match="`step` must be an int"):
            sk.gate_rows(
                logits, targets, torch.tensor(1.0), weights=WEIGHTS, gate_temperature=1.0, step=step, backend=backend
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_and_meta_operands_are_refused_by_name(backend):
    logits, targets, mask = torch.randn(8, 10), torch.arange(8), torch.ones(8).bool()
    setpoint = torch.tensor(0.2)
    for call, name in (
        (lambda: sk.row_stats(logits.to_sparse(), targets, backend=backend), "logits"),
        (lambda: sk.row_stats(logits, targets.to_sparse(), backend=backend), "targets"),
        (lambda: sk.compact(mask.to_sparse(), backend=backend), "mask"),
        (lambda: sk.compact(mask, weight=torch.ones(8).to_sparse(), backend=backend), "weight"),
        (lambda: sk.control(sk.initial_state(), torch.ones(8).to_sparse(), setpoint, backend=backend), "significance"),
    ):
        with pytest.raises(TypeError, match=f"`{name}` must be a dense .* got torch.sparse_coo"):
            call()
    with pytest.raises(ValueError, match="`targets` must be on cpu as the logits, got meta"):
        sk.row_stats(logits, targets.to("meta"), backend=backend)
    with pytest.raises(ValueError, match="`tree` must be on cpu as the selection, got meta"):
        sk.gather_rows(logits.to("meta"), sk.compact(mask), backend=backend)


def test_every_operand_is_asked_for_its_address(monkeypatch):
    """The dispatcher, in one place, shows each tensor of a call to what knows which have an address."""
    seen: set[int] = set()
    ask = _tracing.tensors_unsupported_reason

    def watch(tensors):
        tensors = list(tensors)
        seen.update(id(tensor) for tensor in tensors)
        return ask(tensors)

    monkeypatch.setattr("sparse_kernels._dispatch.tensors_unsupported_reason", watch)
    if "cpp" not in BACKENDS:
        pytest.skip("the reference takes no addresses")
    logits, targets, threshold, offset = torch.randn(8, 10), torch.arange(8), torch.tensor(1.0), torch.ones(8)
    step, mask, weight, rows = torch.tensor(3), torch.ones(8).bool(), torch.rand(8), torch.rand(8, 2)
    state, setpoint, labels = sk.initial_state(), torch.tensor(0.2), torch.ones(8, dtype=torch.int64)
    overflow, selection = torch.tensor(1, dtype=torch.int32), sk.compact(mask)
    drawn = {"weights": WEIGHTS, "gate_temperature": 1.0, "step": step, "offset": offset, "dim": 1}
    sk.row_stats(logits, targets)
    sk.select(logits, targets, threshold, tree=[rows], **drawn)
    sk.compact(mask, weight=weight[:], backend="cpp")
    monkeypatch.setattr("sparse_kernels.backends.cpp_direct.AVAILABLE", False)
    sk.compact(mask, weight=weight)
    sk.gather_rows(rows, selection)
    sk.scatter_rows(rows, selection)
    sk.control(state, offset, setpoint, labels=labels, mass=weight, overflow=overflow)
    sk.gate_step(logits, targets, state, setpoint, weights=WEIGHTS)
    operands = [
        logits, targets, threshold, offset, step, mask, weight, rows, *state, setpoint, labels, overflow,
        selection.index, selection.count,
    ]  # fmt: skip
    assert all(id(tensor) in seen for tensor in operands), [id(tensor) in seen for tensor in operands]


FORMS = {
    "plain": lambda t: t,
    "negated": negated,
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "subclass": lambda t: t.as_subclass(Wrapped),
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=t.is_floating_point()),
}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_form_of_an_operand_changes_no_value(data):
    """Negated, strided, subclassed or a parameter, in any place and combination: the values count, on each backend."""
    form = {
        name: data.draw(st.sampled_from(sorted(FORMS)), name) for name in ("logits", "targets", "threshold", "rows")
    }
    backend = data.draw(st.sampled_from([None, *BACKENDS]))
    draws = data.draw(st.sampled_from([0.0, 0.7]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    n = data.draw(st.integers(0, 40))
    logits, rows = torch.randn(n, 7, generator=generator), torch.randn(n, 3, generator=generator)
    targets, threshold = torch.randint(7, (n,), generator=generator), torch.tensor(1.0)

    def call(backend, logits, targets, threshold, rows):
        with torch.no_grad():
            stats = sk.row_stats(logits, targets, outputs=sk.STATISTICS, backend=backend)
            selected = sk.select(
                logits, targets, threshold, weights=WEIGHTS, tree=rows, gate_temperature=draws, backend=backend
            )
        return stats, selected

    plain = {"logits": logits, "targets": targets, "threshold": threshold, "rows": rows}
    formed = {name: FORMS[form[name]](tensor) for name, tensor in plain.items()}
    refused = "subclass" in form.values() and backend == "cpp"
    try:
        seen = call(backend, **formed)
    except sk.BackendUnavailable as error:
        assert refused
        assert "has no address" in str(error)  # noqa: PT017
        return
    assert not refused
    same(seen, call("torch", **plain))
    assert not math.isnan(float(seen[1].selection.count))
