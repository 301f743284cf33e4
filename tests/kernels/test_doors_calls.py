"""First calls: what people try. It succeeds, or one line says what was given and what was expected."""

import math
import re

import numpy as np
import pytest
import torch

import sparse_kernels as sk
from sparse_kernels.backends import cpp as cpp_backend

BACKENDS = [None, "torch"] + ([] if cpp_backend.unavailable_reason() else ["cpp"])
WEIGHTS = {"loss": 1.0}
torch.manual_seed(0)
LOGITS, TARGETS = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
IMAGE, PIXELS = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
MASK, X = torch.tensor([True, False, True, False, False, True]), torch.arange(6.0)
SELECTION = sk.compact(MASK)
SIGNIFICANCE = torch.rand(6)


def gate(*arguments, **options):
    return sk.gate_rows(*arguments, **{"weights": WEIGHTS, **options})


def stepped(setpoint, **options):
    """A controller's state after one batch."""
    state = sk.initial_state(0.5)
    sk.control(state, SIGNIFICANCE, setpoint, **options)
    return state


def gate_stepped(setpoint, **options):
    state = sk.initial_state(0.5)
    return sk.gate_step(LOGITS, TARGETS, state, setpoint, weights=WEIGHTS, **options), state


# A call as it is tried, and the call that means the same. Both take the backend.
SUCCEED = {
    "a number as threshold": (
        lambda **b: gate(LOGITS, TARGETS, 1.5, **b),
        lambda: gate(LOGITS, TARGETS, torch.tensor(1.5)),
    ),
    "a whole number": (lambda **b: gate(LOGITS, TARGETS, 1, **b), lambda: gate(LOGITS, TARGETS, torch.tensor(1.0))),
    "NumPy's number": (
        lambda **b: gate(LOGITS, TARGETS, np.float32(1.5), **b),
        lambda: gate(LOGITS, TARGETS, torch.tensor(1.5)),
    ),
    "-inf": (
        lambda **b: gate(LOGITS, TARGETS, -math.inf, **b),
        lambda: gate(LOGITS, TARGETS, torch.tensor(-math.inf)),
    ),
    "a double threshold": (
        lambda **b: gate(LOGITS.double(), TARGETS, 1.5, **b),
        lambda: gate(LOGITS.double(), TARGETS, torch.tensor(1.5, dtype=torch.float64)),
    ),
    "select at a number": (
        lambda **b: sk.select(LOGITS, TARGETS, 1.5, weights=WEIGHTS, tree=X, **b),
        lambda: sk.select(LOGITS, TARGETS, torch.tensor(1.5), weights=WEIGHTS, tree=X),
    ),
    "a number as set-point": (lambda **b: stepped(0.2, **b), lambda: stepped(torch.tensor(0.2))),
    "a step at a number": (lambda **b: gate_stepped(0.2, **b), lambda: gate_stepped(torch.tensor(0.2))),
    "NumPy's capacity": (
        lambda **b: sk.compact(MASK, capacity=np.int64(3), **b),
        lambda: sk.compact(MASK, capacity=3),
    ),
    "select of NumPy's capacity": (
        lambda **b: sk.select(LOGITS, TARGETS, 1.5, weights=WEIGHTS, capacity=np.int32(3), **b),
        lambda: sk.select(LOGITS, TARGETS, torch.tensor(1.5), weights=WEIGHTS, capacity=3),
    ),
    "nothing ignored": (
        lambda **b: sk.row_stats(LOGITS, TARGETS, ignore_index=None, **b),
        lambda: sk.row_stats(LOGITS, TARGETS),
    ),
    "nothing ignored by a gate": (
        lambda **b: gate(LOGITS, TARGETS.int(), 1.5, ignore_index=None, **b),
        lambda: gate(LOGITS, TARGETS, torch.tensor(1.5)),
    ),
    "nothing ignored by control": (
        lambda **b: stepped(0.2, labels=TARGETS, ignore_index=None, **b),
        lambda: stepped(torch.tensor(0.2)),
    ),
    "no softcap": (lambda **b: sk.row_stats(LOGITS, TARGETS, softcap=None, **b), lambda: sk.row_stats(LOGITS, TARGETS)),
    "one output": (
        lambda **b: sk.row_stats(LOGITS, TARGETS, outputs="loss", **b),
        lambda: sk.row_stats(LOGITS, TARGETS, outputs=("loss",)),
    ),
    "one output of a gate": (
        lambda **b: gate(LOGITS, TARGETS, 1.5, outputs="grad_norm", **b),
        lambda: gate(LOGITS, TARGETS, torch.tensor(1.5), outputs=("grad_norm",)),
    ),
    "outputs in a list": (
        lambda **b: sk.row_stats(LOGITS, TARGETS, outputs=["entropy", "loss"], **b),
        lambda: sk.row_stats(LOGITS, TARGETS),
    ),
    "classes in a list": (
        lambda **b: sk.row_stats(LOGITS, TARGETS.tolist(), **b),
        lambda: sk.row_stats(LOGITS, TARGETS),
    ),
    "classes in an array": (
        lambda **b: sk.row_stats(LOGITS, TARGETS.numpy().astype(np.int32), **b),
        lambda: sk.row_stats(LOGITS, TARGETS),
    ),
    "a gate's classes in a list": (
        lambda **b: gate(LOGITS, TARGETS.tolist(), 1.5, **b),
        lambda: gate(LOGITS, TARGETS, torch.tensor(1.5)),
    ),
    "NumPy's settings": (
        lambda **b: gate(
            LOGITS, TARGETS, 1.5, temperature=np.float32(2), seed=np.int64(3), step=np.int32(4),
            gate_temperature=np.float64(0.5), ignore_index=np.int64(-1), dim=np.int64(-1), **b,
        ),
        lambda: gate(
            LOGITS, TARGETS, torch.tensor(1.5), temperature=2.0, seed=3, step=4, gate_temperature=0.5, ignore_index=-1
        ),
    ),
    "NumPy's weight": (
        lambda **b: gate(LOGITS, TARGETS, 1.5, weights={"loss": np.float32(1.0)}, **b),
        lambda: gate(LOGITS, TARGETS, torch.tensor(1.5)),
    ),
    "images": (
        lambda **b: sk.row_stats(IMAGE, PIXELS, dim=1, **b),
        lambda: sk.row_stats(IMAGE.movedim(1, -1).contiguous(), PIXELS),
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SUCCEED)
def test_a_first_call_succeeds(name, backend):
    tried, meant = SUCCEED[name]
    torch.testing.assert_close(tried(backend=backend), meant(), equal_nan=True)


# A call, the type of its error, and its message.
REFUSE = {
    "weights in a list": (
        lambda **b: gate(LOGITS, TARGETS, 1.0, weights=["loss"], **b),
        TypeError, "`weights` must map statistics to numbers, such as {'loss': 1.0}, got list ['loss']",
    ),
    "a weight's name alone": (
        lambda **b: gate(LOGITS, TARGETS, 1.0, weights="loss", **b),
        TypeError, "`weights` must map statistics to numbers, such as {'loss': 1.0}, got str 'loss'",
    ),
    "rows' weights for statistics'": (
        lambda **b: gate(LOGITS, TARGETS, 1.0, weights=torch.ones(6), **b),
        TypeError, "`weights` must map statistics to numbers, such as {'loss': 1.0}, got torch.Tensor",
    ),
    "a text as weight": (
        lambda **b: gate(LOGITS, TARGETS, 1.0, weights={"loss": "1"}, **b),
        TypeError, "`weights['loss']` must be a number, got str '1'",
    ),
    "an unknown weight": (
        lambda **b: gate(LOGITS, TARGETS, 1.0, weights={"los": 1.0}, **b),
        ValueError, "`weights` must name one or more of loss, entropy, grad_norm, sum_squares, max_prob, margin, "
        "logsumexp; got ['los']",
    ),
    "NumPy logits": (
        lambda **b: sk.row_stats(LOGITS.numpy(), TARGETS, **b),
        TypeError, "`logits` must be a torch.Tensor, got numpy.ndarray; use torch.as_tensor(logits)",
    ),
    "logits in a list": (
        lambda **b: sk.row_stats([[1.0, 2.0]], [0], **b),
        TypeError, "`logits` must be a torch.Tensor, got list [[1.0, 2.0]]; use torch.as_tensor(logits)",
    ),
    "a bare index": (
        lambda **b: sk.gather_rows(X, torch.tensor([0, 2]), **b),
        TypeError, "`selection` must be a Selection, as compact() returns it, got torch.Tensor; for a bare index use "
        "tensor[index]",
    ),
    "a bare index to scatter": (
        lambda **b: sk.scatter_rows(X, torch.tensor([0, 2]), **b),
        TypeError, "`selection` must be a Selection, as compact() returns it, got torch.Tensor; for a bare index use "
        "tensor[index]",
    ),
    "a tuple as selection": (
        lambda **b: sk.gather_rows(X, tuple(SELECTION), **b),
        TypeError, "`selection` must be a Selection, as compact() returns it, got tuple; for a bare index use "
        "tensor[index]",
    ),
    "tree and selection swapped": (
        lambda **b: sk.gather_rows(SELECTION, X, **b),
        TypeError, "`selection` must be a Selection, as compact() returns it, got torch.Tensor; for a bare index use "
        "tensor[index]",
    ),
    "logits and targets swapped": (
        lambda **b: sk.row_stats(TARGETS, LOGITS, **b),
        TypeError, "`logits` must be float32, bfloat16, float16 or float64, got torch.int64: are `logits` and "
        "`targets` in each other's place?",
    ),
    "targets and threshold swapped": (
        lambda **b: gate(LOGITS, torch.tensor(1.5), TARGETS, **b),
        TypeError, "`targets` must be int64 or int32 class indices, got torch.float32",
    ),
    "images without dim": (
        lambda **b: sk.row_stats(IMAGE, PIXELS, **b),
        ValueError, "`targets` must have shape (2, 3, 4) for logits of shape (2, 3, 4, 5) with classes in dim -1, got "
        "(2, 4, 5); for classes in dim 1 use dim=1",
    ),
    "a gate of images without dim": (
        lambda **b: gate(IMAGE, PIXELS, 1.0, **b),
        ValueError, "`targets` must have shape (2, 3, 4) for logits of shape (2, 3, 4, 5) with classes in dim -1, got "
        "(2, 4, 5); for classes in dim 1 use dim=1",
    ),
    "negative targets": (
        lambda **b: sk.row_stats(LOGITS, TARGETS - 1, **b),
        ValueError, "target -1 in row 0 is out of range: it must be in [0, 3], or `ignore_index`, -100",
    ),
    "a target too many": (
        lambda **b: gate(LOGITS, TARGETS + 1, 1.0, **b),
        ValueError, "target 4 in row 3 is out of range: it must be in [0, 3], or `ignore_index`, -100",
    ),
    "boolean targets": (
        lambda **b: sk.row_stats(LOGITS, TARGETS > 1, **b),
        TypeError, "`targets` must be int64 or int32 class indices, got torch.bool",
    ),
    "bytes of targets": (
        lambda **b: sk.row_stats(LOGITS, TARGETS.to(torch.uint8), **b),
        TypeError, "`targets` must be int64 or int32 class indices, got torch.uint8",
    ),
    "targets in a list of floats": (
        lambda **b: sk.row_stats(LOGITS, [0.0] * 6, **b),
        TypeError, "`targets` must be int64 or int32 class indices, got torch.float32",
    ),
    "soft targets": (
        lambda **b: sk.row_stats(LOGITS, LOGITS.softmax(-1), **b),
        TypeError, "`targets` must be int64 or int32 class indices, got torch.float32",
    ),
    "no targets": (
        lambda **b: sk.row_stats(LOGITS, None, **b),
        TypeError, "`targets` must be a torch.Tensor, got NoneType",
    ),
    "an unknown output": (
        lambda **b: sk.row_stats(LOGITS, TARGETS, outputs="los", **b),
        ValueError, "`outputs` must be among loss, entropy, grad_norm, sum_squares, max_prob, margin, argmax, "
        "logsumexp; got ['los']",
    ),
    "a number as outputs": (
        lambda **b: sk.row_stats(LOGITS, TARGETS, outputs=3, **b),
        TypeError, "`outputs` must be names of statistics, got int 3",
    ),
    "two thresholds": (
        lambda **b: gate(LOGITS, TARGETS, torch.ones(2), **b),
        ValueError, "`threshold` must be one floating element, got torch.float32 of shape (2,)",
    ),
    "a threshold beyond float32": (
        lambda **b: gate(LOGITS, TARGETS, 1e39, **b),
        ValueError, "`threshold` must be a number that torch.float32 can hold, got float 1e+39",
    ),
    "a threshold beyond float64": (
        lambda **b: gate(LOGITS.double(), TARGETS, -(10**400), **b),
        ValueError, "`threshold` must be a number that torch.float64 can hold, got int",
    ),
    "no threshold": (
        lambda **b: gate(LOGITS, TARGETS, None, **b),
        TypeError, "`threshold` must be a torch.Tensor, got NoneType",
    ),
    "an offset that is a number": (
        lambda **b: gate(LOGITS, TARGETS, 1.0, offset=0.5, **b),
        TypeError, "`offset` must be a torch.Tensor, got float 0.5",
    ),
    "a mask of numbers": (
        lambda **b: sk.compact(MASK.int(), **b),
        ValueError, "`mask` must be bool of shape [rows], got torch.int32 of shape (6,)",
    ),
    "a mask of pixels": (
        lambda **b: sk.compact(MASK.reshape(2, 3), **b),
        ValueError, "`mask` must be bool of shape [rows], got torch.bool of shape (2, 3); use mask.flatten()",
    ),
    "a mask in a list": (
        lambda **b: sk.compact([True, False], **b),
        TypeError, "`mask` must be a torch.Tensor, got list [True, False]; use torch.as_tensor(mask)",
    ),
    "no mask": (lambda **b: sk.compact(None, **b), TypeError, "`mask` must be a torch.Tensor, got NoneType; "
        "use torch.as_tensor(mask)"),
    "half a capacity": (
        lambda **b: sk.compact(MASK, capacity=1.5, **b),
        ValueError, "`capacity` must be None or an int in [0, 2^31), got 1.5",
    ),
    "a text as capacity": (
        lambda **b: sk.compact(MASK, capacity="3", **b),
        ValueError, "`capacity` must be None or an int in [0, 2^31), got '3'",
    ),
    "a weight in a list": (
        lambda **b: sk.compact(MASK, weight=[1.0] * 6, **b),
        TypeError, "`weight` must be a torch.Tensor, got list [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]",
    ),
    "a threshold for a state": (
        lambda **b: sk.control(torch.tensor(0.5), SIGNIFICANCE, 0.1, **b),
        TypeError, "`state` must be a ControlState, as initial_state() returns it, got torch.Tensor",
    ),
    "a step of a tuple": (
        lambda **b: sk.gate_step(LOGITS, TARGETS, tuple(sk.initial_state()), 0.1, weights=WEIGHTS, **b),
        TypeError, "`state` must be a ControlState, as initial_state() returns it, got tuple",
    ),
    "state and significance swapped": (
        lambda **b: sk.control(SIGNIFICANCE, sk.initial_state(), 0.1, **b),
        TypeError, "`significance` must be a torch.Tensor, got sparse_kernels.types.ControlState",
    ),
    "a set-point in percent": (
        lambda **b: stepped(10, **b),
        ValueError, "`setpoint` must be in (0, 1], got 10.0",
    ),
    "a set-point of 0": (lambda **b: gate_stepped(0, **b), ValueError, "`setpoint` must be in (0, 1], got 0.0"),
    "a text as temperature": (
        lambda **b: sk.row_stats(LOGITS, TARGETS, temperature="2", **b),
        TypeError, "`temperature` must be a number, got str '2'",
    ),
    "no temperature": (
        lambda **b: gate(LOGITS, TARGETS, 1.0, gate_temperature=None, **b),
        TypeError, "`gate_temperature` must be a number, got NoneType",
    ),
    "half an ignore_index": (
        lambda **b: sk.row_stats(LOGITS, TARGETS, ignore_index=0.5, **b),
        TypeError, "`ignore_index` must be an int, got float 0.5",
    ),
    "no seed": (
        lambda **b: gate(LOGITS, TARGETS, 1.0, seed=None, **b),
        TypeError, "`seed` must be an int, got NoneType",
    ),
    "a name as dim": (
        lambda **b: sk.row_stats(LOGITS, TARGETS, dim="classes", **b),
        TypeError, "`dim` must be an int, got str 'classes'",
    ),
    "a dim too many": (
        lambda **b: sk.row_stats(LOGITS, TARGETS, dim=2, **b),
        ValueError, "`dim` must be a dimension of the logits, of shape (6, 4), got 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", REFUSE)
def test_a_wrong_call_is_refused_in_one_line(name, backend):
    call, error, message = REFUSE[name]
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(backend=backend)


def test_nothing_is_ignored_where_no_label_is():
    for backend in BACKENDS:
        for targets in (TARGETS.clone(), TARGETS.int()):
            targets[2] = -100
            with pytest.raises(ValueError, match="target -100 in row 2 is out of range"):
                sk.row_stats(LOGITS, targets, ignore_index=None, backend=backend)


def test_companions_stand_beside_control():
    assert {"control", "gate_step", "initial_state"} <= set(sk.__all__)
    state = sk.initial_state()
    assert float(state.value("threshold")) == -math.inf
    assert sk.initial_state(torch.tensor([0.5, 1.0])).values.shape[0] == 2
    with pytest.raises(ValueError, match=r"`threshold` must be a number that torch.float32 can hold, got float 1e\+39"):
        sk.initial_state(1e39)
    with pytest.raises(TypeError, match="`threshold` must be a number or float32, got"):
        sk.initial_state(torch.tensor(0.5, dtype=torch.float64))


def test_a_step_takes_a_backend():
    results = []
    for backend in BACKENDS:
        state = sk.initial_state(1.0)
        selected = sk.gate_step(LOGITS, TARGETS, state, torch.tensor(0.3), weights=WEIGHTS, backend=backend)
        results.append((selected.selection.index, state.counters, state.values))
    for index, counters, values in results[1:]:
        assert torch.equal(index, results[0][0])
        assert torch.equal(counters, results[0][1])
        torch.testing.assert_close(values, results[0][2])
    state = sk.initial_state(1.0)
    with pytest.raises(sk.BackendUnavailable, match="unknown backend 'fpga'"):
        sk.gate_step(LOGITS, TARGETS, state, torch.tensor(0.3), weights=WEIGHTS, backend="fpga")
    assert state.counter("steps") == 0
