"""Calls like an earlier one: what was found out then is not asked again, and nothing else is taken for granted."""

import gc
import weakref

import pytest
import torch
from proof_parts import unproved
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_kernels as sk
from sparse_kernels import ControlState, _arguments, _dispatch, _known, _routing, ops
from sparse_kernels.backends import cpp as cpp_backend
from sparse_kernels.backends import cpp_direct
from sparse_kernels.backends.triton import backend as triton_backend
from sparse_kernels.ops import gate_step
from sparse_kernels.self_check import proof

WEIGHTS = {"loss": 0.7, "entropy": 0.3}
BACKENDS = ["torch"] + ([] if cpp_backend.unavailable_reason() else ["cpp"])


@pytest.fixture(autouse=True)
def no_direct_calls(monkeypatch):
    """As for tensors of a GPU."""
    monkeypatch.setattr(cpp_direct, "AVAILABLE", False)


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(12, 5, generator=g), torch.arange(12) % 5


def step_with(backend, seed=0, **changes):
    """The results of one step, and the state after it."""
    logits, targets = batch(seed)
    state = changes.pop("state", None) or sk.initial_state(1.0)
    given = {"logits": logits, "targets": targets, "setpoint": torch.tensor(0.3), "weights": WEIGHTS, "capacity": 4}
    return gate_step(state=state, backend=backend, **given | changes), state


def gated_with(backend, seed=0, **changes):
    logits, targets = batch(seed)
    given = {"logits": logits, "targets": targets, "threshold": torch.tensor(1.0), "weights": WEIGHTS}
    return sk.gate_rows(backend=backend, **given | changes)


def stats_with(backend, seed=0, **changes):
    logits, targets = batch(seed)
    return sk.row_stats(backend=backend, **{"logits": logits, "targets": targets} | changes)


def outcome(function, *arguments, **options):
    """The tensors and numbers that a call gives, or its error."""
    try:
        found = function(*arguments, **options)
    except Exception as error:
        return type(error).__name__, str(error)
    return [leaf for leaf in torch.utils._pytree.tree_leaves(found) if leaf is not None]


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            assert a == b


FUNCTIONS = {"gate_step": step_with, "gate_rows": gated_with, "row_stats": stats_with}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_later_call_gives_what_it_would_give_alone(function, backend):
    for seed in range(3):
        found = outcome(function, backend, seed)
        _known._kinds.clear()
        assert_same(found, outcome(function, backend, seed))


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the reference is many")
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_what_was_found_out_is_not_asked_again(monkeypatch, function):
    asked = []
    for module, name in ((_arguments, "vetted"), (_dispatch, "tensors_unsupported_reason")):
        ask = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, ask=ask, name=name: (asked.append(name), ask(*given))[1])
    function("cpp")
    assert set(asked) == {"vetted", "tensors_unsupported_reason"}
    asked.clear()
    function("cpp", seed=1)
    assert asked == []


def negated(tensor):
    return torch._neg_view(-tensor)


LOGITS, TARGETS = batch()
OF_ROWS = {
    "integers": {"logits": LOGITS.long()},
    "no classes": {"logits": LOGITS[:, :0]},
    "no rows": {"logits": LOGITS[:0], "targets": TARGETS[:0]},
    "fewer rows": {"logits": LOGITS[:3], "targets": TARGETS[:3]},
    "float64": {"logits": LOGITS.double()},
    "columns": {"logits": LOGITS.T.contiguous().T},
    "rows apart": {"logits": torch.cat((LOGITS, LOGITS), 1)[:, :5]},
    "another dim": {"logits": LOGITS.T.contiguous(), "dim": 0},
    "no dim": {"dim": 2},
    "a number for a dim": {"dim": 1.0},
    "True for a dim": {"dim": True},
    "sparse": {"logits": LOGITS.to_sparse()},
    "compressed": {"logits": LOGITS.to_sparse_csr()},
    "nested": {"logits": torch.nested.nested_tensor([LOGITS[:6], LOGITS[6:]])},
    "a list": {"logits": LOGITS.tolist()},
    "negated": {"logits": negated(LOGITS)},
    "a parameter": {"logits": torch.nn.Parameter(LOGITS)},
    "zeros without memory": {"logits": torch._efficientzerotensor((12, 5))},
    "elsewhere": {"logits": LOGITS.to("meta")},
    "targets elsewhere": {"targets": TARGETS.to("meta")},
    "float targets": {"targets": TARGETS.float()},
    "int32 targets": {"targets": TARGETS.int()},
    "a list of targets": {"targets": TARGETS.tolist()},
    "too few targets": {"targets": TARGETS[:5]},
    "a target out of range": {"targets": TARGETS + 3},
    "smoothing of 2": {"label_smoothing": 2.0},
    "smoothed": {"label_smoothing": 0.1},
}
OF_GATES = {
    "no weights": {"weights": {}},
    "no mapping": {"weights": None},
    "an unknown weight": {"weights": {"los": 1.0}},
    "NaN for a weight": {"weights": {"loss": float("nan"), "entropy": 0.3}},
    "a text for a weight": {"weights": {"loss": "1", "entropy": 0.3}},
    "other weights": {"weights": {"loss": -0.7, "entropy": 3}},
    "other statistics": {"weights": {"margin": 0.7, "max_prob": 0.3}},
    "an offset": {"offset": torch.linspace(0.0, 2.0, 12)},
    "a negated offset": {"offset": negated(torch.linspace(0.0, 2.0, 12))},
    "an offset of integers": {"offset": TARGETS},
    "an offset of another shape": {"offset": torch.zeros(12, 1)},
    "drawn": {"gate_temperature": 0.5},
    "a temperature below 0": {"gate_temperature": -1.0},
}
OF_ROW_STATS = {
    "a name": {"outputs": "margin"},
    "a list of names": {"outputs": ["loss", "argmax"]},
    "an unknown name": {"outputs": ("loss", "los")},
    "names without a hash": {"outputs": (["loss"],)},
    "a softcap": {"softcap": 2.0},
}
OF_GATE_ROWS = {
    "a number": {"threshold": 1.0},
    "two thresholds": {"threshold": torch.ones(2)},
    "an integer": {"threshold": torch.tensor(1)},
    "a negated threshold": {"threshold": negated(torch.tensor(1.0))},
    "a step": {"gate_temperature": 0.5, "step": 3},
    "a tensor for a step": {"gate_temperature": 0.5, "step": torch.tensor(3)},
    "an offset's place": {"gate_temperature": 0.5, "step": torch.ones(12)},
    "outputs": {"outputs": ("loss", "margin")},
}
OF_GATE_STEP = {  # a state is written, so each call has its own
    "no slot": {"capacity": 0},
    "no capacity": {"capacity": None},
    "a capacity below 0": {"capacity": -1},
    "a number for a capacity": {"capacity": 4.0},
    "a number for a set-point": {"setpoint": 0.3},
    "a set-point of 0": {"setpoint": 0.0},
    "a set-point in float64": {"setpoint": torch.tensor(0.3, dtype=torch.float64)},
    "two set-points": {"setpoint": torch.tensor([0.3, 0.4])},
    "by mass": {"by_mass": True},
    "an unknown keyword": {"reduction": "mean"},
    "a class's weight": {"weight": torch.ones(5)},
    "a plain tuple": {"state": lambda: tuple(sk.initial_state(1.0))},
    "a state in float64": {"state": lambda: ControlState(torch.zeros(11, dtype=torch.float64), torch.zeros(4).long())},
    "a state with gaps": {"state": lambda: ControlState(torch.zeros(22)[::2], torch.zeros(4).long())},
    "a negated state": {"state": lambda: ControlState(negated(torch.zeros(11)), torch.zeros(4).long())},
    "two states": {"state": lambda: ControlState(torch.zeros(2, 11), torch.zeros(2, 4).long())},
    "a state elsewhere": {"state": lambda: sk.initial_state(torch.zeros((), device="meta"))},
}
CHANGES = [
    pytest.param(function, changed, id=f"{function}-{name}")
    for function, several in (
        ("row_stats", OF_ROWS | OF_ROW_STATS), ("gate_rows", OF_ROWS | OF_GATES | OF_GATE_ROWS),
        ("gate_step", OF_ROWS | OF_GATES | OF_GATE_STEP),
    )
    for name, changed in several.items()
]  # fmt: skip


@pytest.fixture
def without_findings(monkeypatch):
    """Calls a function with every call checked and routed anew."""

    def call(function, *arguments, **options):
        with monkeypatch.context() as patch:
            for module in (ops, _routing):
                patch.setattr(module, "known_of", lambda *_: None)
            return function(*arguments, **options)

    return call


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("function", "changed"), CHANGES)
def test_whatever_comes_after_a_good_call_is_served_or_refused_as_if_alone(
    function, changed, backend, without_findings
):
    function = FUNCTIONS[function]

    def own():
        return {name: given() if name == "state" else given for name, given in changed.items()}

    for dim in (-1, 1, 1):
        function(backend, dim=dim)
    alone = without_findings(outcome, function, backend, **own())
    for _ in range(2):
        assert_same(outcome(function, backend, **own()), alone)
    assert_same(outcome(function, backend), without_findings(outcome, function, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_offset_is_not_taken_for_a_step(backend):
    logits, targets, threshold, one = torch.ones(1, 3), torch.zeros(1).long(), torch.tensor(1.0), torch.tensor([3])
    given = {"weights": WEIGHTS, "gate_temperature": 0.5, "backend": backend}
    for _ in range(2):
        sk.gate_rows(logits, targets, threshold, step=one, **given)
    with pytest.raises(ValueError, match="`offset` must be floating"):
        sk.gate_rows(logits, targets, threshold, offset=one, **given)


def test_a_layout_that_a_kernel_cannot_read_is_seen():
    if "cpp" not in BACKENDS:
        pytest.skip("the reference is many")
    wide = torch.randn(2, 3, 2, 3, 2, 3, 2, 3, 4, 5)
    apart, targets = wide[:, :2, :, :2, :, :2, :, :2, :2], torch.zeros(2, 2, 2, 2, 2, 2, 2, 2, 2, dtype=torch.int64)
    for _ in range(2):
        sk.row_stats(apart.contiguous(), targets, backend="cpp")
    with pytest.raises(sk.BackendUnavailable, match="too many dimensions"):
        sk.row_stats(apart, targets, backend="cpp")


@pytest.mark.skipif(triton_backend.unavailable_reason() is not None, reason="nothing is interpreted")
@pytest.mark.parametrize("function", [stats_with, gated_with])
def test_a_plan_is_that_of_the_layout_and_the_settings(function, without_findings):
    """Triton's plans are found by what a kind of call leaves open: start, statistics and settings."""
    wide = torch.randn(12 * 32 + 1)  # rows that are loaded by 16 bytes, but for those that begin elsewhere
    changes = [{}, {"logits": LOGITS.T.contiguous().T}, {"logits": wide[:-1].view(12, 32)}, {"dim": 1}]
    changes += [{"logits": wide[1:].view(12, 32)}, {"label_smoothing": 0.5}, {"softcap": 2.0}]
    if function is gated_with:
        changes += [{"weights": {"margin": 1.0}}, {"gate_temperature": 0.5}, {"offset": torch.linspace(0, 1, 12)}]
    for _ in range(2):
        for changed in changes:
            alone = without_findings(outcome, function, "triton", **changed)
            assert_same(outcome(function, "triton", **changed), alone)


@pytest.mark.skipif(triton_backend.unavailable_reason() is not None, reason="nothing is interpreted")
def test_draws_have_a_plan_of_their_own():
    """What Triton compiled for a call without draws has no place for their tensors."""
    for temperature in (0.0, 0.5, 0.0, 0.5):
        gated_with("triton", gate_temperature=temperature)
    (known,) = _known._kinds.values()
    assert len(known.plans) == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_is_refused_leaves_the_state(backend):
    for bad in (OF_GATES["NaN for a weight"], OF_GATE_STEP["a capacity below 0"], OF_ROWS["a target out of range"]):
        state = sk.initial_state(1.0)
        step_with(backend, state=state)
        before = [tensor.clone() for tensor in state]
        with pytest.raises(ValueError, match="must be"):
            step_with(backend, state=state, **bad)
        assert_same([*state], before)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the reference is many")
def test_modes_transforms_and_compilers_see_a_known_call():
    logits, targets = batch()

    def mask(logits):
        return sk.gate_rows(logits, targets, torch.tensor(1.0), weights=WEIGHTS, backend="cpp").mask

    wanted = [mask(logits), mask(logits)][1]
    with Seen() as seen:
        assert torch.equal(mask(logits), wanted)
    assert "sparse_kernels::gate_rows" in seen.names
    mapped = torch.func.vmap(lambda part: sk.gate_rows(part, targets, 1.0, weights=WEIGHTS).mask)
    assert torch.equal(mapped(torch.stack([logits, logits])), torch.stack([wanted, wanted]))
    assert torch.equal(torch.compile(mask, fullgraph=True, backend="eager")(logits), wanted)
    assert torch.equal(mask(logits), wanted)


def test_demands_tables_and_verdicts_are_followed_in_each_call(monkeypatch, tmp_path):
    unproved(monkeypatch, tmp_path)
    ran = []
    recorded = tuple(
        server._replace(serve=lambda call, server=server: (ran.append(server.backend), server.serve(call))[1])
        for server in _dispatch.TABLE["gate_rows"]
    )
    part = ("triton", "gate_rows", torch.float32, torch.device("cpu"))
    monkeypatch.setitem(proof._known, part, proof.AGREED)
    gated_with(None)
    monkeypatch.setitem(_dispatch.TABLE, "gate_rows", recorded)
    gated_with(None)
    with _dispatch.forced("torch"):
        gated_with(None)
    monkeypatch.setitem(proof._known, part, "differs")
    gated_with(None)
    monkeypatch.setitem(proof._known, part, proof.AGREED)
    gated_with(None)
    gated_with("torch")
    monkeypatch.setattr(_dispatch, "_preferred", None)
    gated_with(None)
    assert ran == ["triton", "torch", "torch", "triton", "torch", "torch"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_is_asked_for_in_each_call(backend):
    logits, targets = batch()
    for grad in (False, True, True, False):
        given = logits.clone().requires_grad_(grad)
        loss = sk.row_stats(given, targets, backend=backend).loss
        assert loss.requires_grad == grad
        if grad:
            loss.sum().backward()
            exact = logits.clone().requires_grad_()
            torch.nn.functional.cross_entropy(exact, targets, reduction="sum").backward()
            torch.testing.assert_close(given.grad, exact.grad)
    with torch.no_grad():
        assert not sk.row_stats(given.requires_grad_(), targets, backend=backend).loss.requires_grad


def test_no_tensor_is_kept_and_no_more_kinds_than_a_limit():
    logits, targets = batch()
    kept = [weakref.ref(tensor) for tensor in (logits, targets)]
    for _ in range(2):
        sk.row_stats(logits, targets)
    del logits, targets
    gc.collect()
    assert [reference() for reference in kept] == [None, None]
    for rows in range(_known.MOST + 20):
        sk.row_stats(torch.zeros(rows, 2), torch.zeros(rows, dtype=torch.int64))
        assert len(_known._kinds) <= _known.MOST


def test_tensors_of_another_device_go_by_the_general_route_alone(monkeypatch):
    """C++ that reads plain tensors of the CPU is not asked about others: it would throw, which takes long."""
    monkeypatch.setattr(cpp_direct, "AVAILABLE", True)
    for name in ("row_stats", "gate_rows", "select", "gate_step", "compact", "gather_rows"):
        monkeypatch.setattr(cpp_direct, name, lambda *_: pytest.fail("asked"))
    logits, targets = (tensor.to("meta") for tensor in batch())
    threshold, mask = torch.zeros((), device="meta"), torch.zeros(12, dtype=torch.bool, device="meta")
    sk.row_stats(logits, targets)
    sk.gate_rows(logits, targets, threshold, weights=WEIGHTS)
    sk.select(logits, targets, threshold, weights=WEIGHTS, capacity=3)
    gate_step(logits, targets, sk.initial_state(threshold), threshold, weights=WEIGHTS, capacity=3)
    sk.gather_rows(logits, sk.compact(mask, capacity=3))
