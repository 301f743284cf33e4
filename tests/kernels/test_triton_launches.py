"""A call like the one before it launches the kernel compiled then, without Triton's search for it.

Triton compiles for a GPU that is not here, in a process of its own, and its launcher is handed what would be launched.
"""

import json
import os
from pathlib import Path

import fresh
import pytest

pytest.importorskip("triton")

pytestmark = pytest.mark.slow  # compiles

SCRIPT = """
import gc, json, weakref
import torch
from triton.runtime.jit import JITFunction
from triton_without_gpu import without_gpu
from sparse_kernels._arguments import GateCall, Settings, StatsCall
from sparse_kernels.backends.triton import backend

launched, searches, search = [], [], JITFunction.run

def counted(*arguments, **named):
    searches.append(1)
    return search(*arguments, **named)

JITFunction.run = counted
without_gpu(90, lambda *arguments: launched.append(arguments))
backend.processors = lambda device: 132

def gate(classes=10, dtype=torch.float32, targets=torch.int64, offset=False, weights=None, rows=512, **settings):
    def call():
        settings.setdefault("gate_temperature", 0.5)
        backend.gate_rows(GateCall(
            torch.randn(rows, classes).to(dtype), torch.zeros(rows, dtype=targets), (), -1, Settings(**settings),
            torch.zeros(()), weights or {"loss": 0.7}, torch.zeros(rows) if offset else None))
    return call

def backward(entropy):
    def call():
        saved = torch.zeros(512)
        call = StatsCall(torch.randn(512, 10), torch.zeros(512, dtype=torch.int64), ("loss", "entropy"), -1, Settings())
        upstream = {"loss": saved} | ({"entropy": saved} if entropy else {})
        backend.row_stats_backward(call, saved, saved, saved if entropy else None, upstream, torch.empty(512, 10))
    return call

# In this order: Triton is searched for the first of each line alone, and the others differ from it in values.
LINES = {
    "gate": [gate(), gate(), gate(seed=3, step=2**40, temperature=0.7, ignore_index=1, p_min=0.2, weights={"loss": 2})],
    "int32 targets": [gate(targets=torch.int32), gate(targets=torch.int32, step=1)],
    "offset": [gate(offset=True), gate(offset=True)],
    "step on the device": [gate(step=torch.tensor(3)), gate(step=torch.tensor(4))],
    "step of another type": [gate(step=torch.tensor(3, dtype=torch.int32))],
    "plain threshold": [gate(gate_temperature=0.0), gate(gate_temperature=0.0)],
    "softcap": [gate(softcap=30.0), gate(softcap=20.0)],
    "smoothing": [gate(label_smoothing=0.1), gate(label_smoothing=0.2)],
    "other weights": [gate(weights={"max_prob": 1.0}), gate(weights={"max_prob": 3.0})],
    "bfloat16": [gate(dtype=torch.bfloat16), gate(dtype=torch.bfloat16)],
    "slices": [gate(rows=2, classes=40_000), gate(rows=2, classes=40_000, seed=5)],
    "backward": [backward(True), backward(True)],
    "backward of the loss": [backward(False), backward(False)],
}

def described(launch):
    # Outputs and inputs are new in each call; numbers, types, shapes, absent tensors and the grid must be the same.
    def one(value):
        if isinstance(value, torch.Tensor):
            return [str(value.dtype), list(value.shape)]
        return repr(value) if isinstance(value, (int, float, tuple)) else type(value).__name__
    return [one(value) for value in launch]

def counts(calls):
    found = []
    for call in calls:
        before = len(searches)
        call()
        found.append(len(searches) - before)
    return found

def through_triton(call):
    # As if it were the first.
    backend._cached_plan.cache_clear()
    launched.clear()
    call()
    return [described(one) for one in launched]

def directly(call):
    launched.clear()
    call()
    return [described(one) for one in launched]

by_line = {name: {"searches": counts(calls)} for name, calls in LINES.items()}
for name, calls in LINES.items():
    direct = directly(calls[-1])
    by_line[name] |= {"direct": direct}
for name, calls in LINES.items():
    by_line[name] |= {"triton": through_triton(calls[-1])}

logits = torch.randn(512, 10)
seen = weakref.ref(logits)
for _ in range(2):
    backend.row_stats(StatsCall(logits, torch.zeros(512, dtype=torch.int64), ("loss",), -1, Settings()))
launched.clear()
del logits
gc.collect()
print(json.dumps({"lines": by_line, "kept": seen() is not None}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    helpers = str(Path(__file__).parents[1] / "helpers")
    paths = os.pathsep.join([helpers, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": paths}
    environment.pop("TRITON_INTERPRET", None)
    done = fresh.run("-c", SCRIPT, environment=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_triton_is_asked_once_for_each_kind_of_call(found):
    for name, line in found["lines"].items():
        first, *others = line["searches"]
        assert first == (2 if name == "slices" else 1), name
        assert not any(others), name


def test_launched_as_triton_would(found):
    for name, line in found["lines"].items():
        assert line["direct"] == line["triton"], name
        assert len(line["direct"]) == (2 if name == "slices" else 1), name


def test_no_tensor_of_a_call_is_kept(found):
    assert not found["kept"]
