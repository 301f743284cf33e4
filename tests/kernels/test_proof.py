"""Proof at first use, with interpreted Triton kernels: what agrees serves, and a planted fault never does."""

import contextlib
import json
import logging
import os
import sys
import threading
from pathlib import Path

import fresh
import pytest
import torch
from proof_parts import batch, forget, kept, no_check, unproved, warned
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

import sparse_kernels as sk
from sparse_kernels import _dispatch
from sparse_kernels._arguments import Settings, StatsCall
from sparse_kernels.backends.triton import backend as triton_backend
from sparse_kernels.self_check import proof, verdicts

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # NumPy, on NaN and inf
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="nothing is interpreted"),
]
GATE = {"weights": {"loss": 0.7, "entropy": 0.3}}


@pytest.fixture(autouse=True)
def process(monkeypatch, tmp_path):
    unproved(monkeypatch, tmp_path)


@pytest.fixture
def forwards(monkeypatch):
    """Forward launches of the Triton backend that no check made."""
    through, calls = triton_backend._forward, []

    def forward(call, *rest, **more):
        calls.append(type(call).__name__)
        return through(call, *rest, **more)

    monkeypatch.setattr(triton_backend, "_forward", forward)
    return calls


def test_what_agrees_serves_and_its_verdict_is_kept(tmp_path, forwards, monkeypatch, caplog):
    logits, targets = batch()
    found = sk.row_stats(logits, targets)
    assert len(forwards) > 1  # the check, and the call
    assert kept(tmp_path) == {"triton row_stats float32": ""}
    forwards.clear()
    forget(monkeypatch)
    no_check(monkeypatch)
    again = sk.row_stats(logits, targets)
    assert len(forwards) == 1
    torch.testing.assert_close(again, found)
    torch.testing.assert_close(found, sk.row_stats(logits, targets, backend="torch"))
    assert sk.backend_info()["row_stats"]["active"] == "triton"
    assert "proved: float32; not yet proved: bfloat16" in sk.backend_info()["row_stats"]["detail"]


def plant(monkeypatch, where):
    """A fault in what the kernels write: one number, of one row."""
    forward, backward = triton_backend._forward, triton_backend.row_stats_backward

    def faulty_forward(call, targets, decision=None, draw=None, saved=()):
        given = {"decision": decision, "draw": draw, "saved": saved}
        stats = forward(call, targets, **{name: value for name, value in given.items() if value})
        written = stats._asdict() | (decision._asdict() if decision else {})
        written |= dict(zip(("maximum", "total"), saved, strict=False))
        tensor = written.get(where)
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            first = tensor.view(-1)[:1]
            first.copy_(~first if tensor.dtype is torch.bool else first + 1 + first.abs() / 1000)
        return stats

    def faulty_backward(*arguments):
        backward(*arguments)
        arguments[-1].view(-1)[0] += 0.01

    monkeypatch.setattr(triton_backend, "_forward", faulty_forward)
    if where == "gradient":
        monkeypatch.setattr(triton_backend, "row_stats_backward", faulty_backward)


@pytest.mark.parametrize("where", [*sk.STATISTICS, "maximum", "total", "gradient"])
def test_a_fault_in_a_statistic_or_its_gradient_is_caught(where, monkeypatch, caplog, tmp_path):
    plant(monkeypatch, where)
    logits, targets = batch()
    logits.requires_grad_()
    for _ in range(2):
        found = sk.row_stats(logits, targets, outputs=sk.STATISTICS)
        (gradient,) = torch.autograd.grad((found.loss.sum(), found.entropy.sum()), logits)
    right = sk.row_stats(logits, targets, outputs=sk.STATISTICS, backend="torch")
    torch.testing.assert_close(found, right, rtol=0, atol=0)
    torch.testing.assert_close(
        gradient, torch.autograd.grad((right.loss.sum(), right.entropy.sum()), logits)[0], rtol=0, atol=0
    )
    (message,) = warned(caplog)
    assert message.startswith("sparse_kernels: the triton kernels do not serve row_stats of torch.float32 logits on")
    assert ("gradient" if where in ("maximum", "total", "gradient") else where) in message
    assert "python -m sparse_kernels check" in message
    assert "\n" not in message
    assert kept(tmp_path)["triton row_stats float32"]
    forget(monkeypatch)  # the next process does not even try
    no_check(monkeypatch)
    torch.testing.assert_close(sk.row_stats(*batch(), outputs=sk.STATISTICS), right, rtol=0, atol=0)


@pytest.mark.parametrize("where", ["mask", "significance", "weight", "invalid", "grad_norm"])
def test_a_fault_in_a_decision_is_caught(where, monkeypatch, caplog):
    plant(monkeypatch, where)
    found = sk.gate_rows(*batch(), 2.0, **GATE, gate_temperature=0.5)
    torch.testing.assert_close(
        found, sk.gate_rows(*batch(), 2.0, **GATE, gate_temperature=0.5, backend="torch"), rtol=0, atol=0
    )
    (message,) = warned(caplog)
    assert where in message


def test_other_dtypes_are_not_touched_by_one_that_fails(monkeypatch, caplog):
    forward = triton_backend._forward

    def faulty(call, *rest, **more):
        stats = forward(call, *rest, **more)
        if call.logits.dtype is torch.bfloat16:
            stats.loss.add_(0.1)
        return stats

    monkeypatch.setattr(triton_backend, "_forward", faulty)
    torch.testing.assert_close(
        sk.row_stats(*batch(torch.bfloat16)), sk.row_stats(*batch(torch.bfloat16), backend="torch"), rtol=0, atol=0
    )
    sk.row_stats(*batch())
    device = torch.device("cpu")
    assert proof.known_reason("triton", "row_stats", torch.float32, device) == ""
    assert "loss" in proof.known_reason("triton", "row_stats", torch.bfloat16, device)
    assert "not bfloat16: loss" in sk.backend_info()["row_stats"]["detail"]


class OutOfResources(Exception):
    """As Triton's."""


@pytest.mark.parametrize(
    ("error", "is_kept"),
    [
        (OutOfResources("out of resource: shared memory, Required: 262144, Hardware limit: 101376."), True),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device\nline two"), True),
        (RuntimeError("CUDA driver version is insufficient for CUDA runtime version"), True),
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable."), False),
        (PermissionError(13, "Permission denied", "/root/.triton/cache"), False),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), False),
    ],
)
def test_a_kernel_that_does_not_compile_or_launch_raises_nothing(error, is_kept, monkeypatch, caplog, tmp_path):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(triton_backend, "_forward", fail)
    for _ in range(2):
        torch.testing.assert_close(sk.row_stats(*batch()), sk.row_stats(*batch(), backend="torch"), rtol=0, atol=0)
    (message,) = warned(caplog)
    assert str(error).splitlines()[0] in message
    assert "\n" not in message
    assert bool(kept(tmp_path)) is is_kept
    with pytest.raises(type(error)):  # a demand is served, proved or not
        sk.row_stats(*batch(), backend="triton")


DAMAGED = ["", "{", "[]", "null", '{"format": 1}', '{"format": 99, "surroundings": {}, "verdicts": {}}', "\x00\xff"]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_is_checked_anew(text, tmp_path, forwards):
    verdicts.path(torch.device("cpu")).write_text(text)
    sk.row_stats(*batch())
    assert len(forwards) > 1
    assert kept(tmp_path) == {"triton row_stats float32": ""}


@pytest.mark.parametrize("verdict", [None, 3, {"agreed": True}])
def test_a_verdict_that_is_no_text_is_checked_anew(verdict, tmp_path, forwards):
    device = torch.device("cpu")
    record = {
        "format": 1,
        "surroundings": verdicts.surroundings(device),
        "verdicts": {"triton row_stats float32": verdict},
    }
    verdicts.path(device).write_text(json.dumps(record))
    sk.row_stats(*batch())
    assert len(forwards) > 1
    assert kept(tmp_path) == {"triton row_stats float32": ""}


@pytest.mark.parametrize("what", ["device", "driver", "torch", "triton", "sparse_kernels", "sources"])
def test_another_version_is_checked_anew(what, monkeypatch):
    device = torch.device("cpu")
    assert verdicts.save(device, {"triton row_stats float32": ""})
    assert verdicts.load(device) == {"triton row_stats float32": ""}
    other = {**verdicts.surroundings(device), what: "another"}
    monkeypatch.setattr(verdicts, "surroundings", lambda device: other)
    assert verdicts.load(device) == {}


def test_a_file_of_another_machine_is_checked_anew():
    device = torch.device("cpu")
    assert verdicts.save(device, {"triton row_stats float32": ""})
    file = verdicts.path(device)
    record = json.loads(file.read_text())
    record["surroundings"]["driver"] = "another"
    file.write_text(json.dumps(record))
    assert verdicts.load(device) == {}


def test_a_home_that_cannot_be_written_works(monkeypatch, tmp_path, forwards, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARSE_KERNELS_CACHE", str(tmp_path / "file" / "folder"))
    for _ in range(2):
        sk.row_stats(*batch())
    checked = len(forwards)
    sk.row_stats(*batch())
    assert len(forwards) == checked + 1  # the verdict is the process's
    assert not warned(caplog)


def test_nothing_half_written_stays(monkeypatch, tmp_path):
    monkeypatch.setattr(verdicts.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    assert not verdicts.save(torch.device("cpu"), {"a": ""})
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_the_platform_s_own(monkeypatch):
    home = Path("/somebody")
    monkeypatch.setattr(Path, "home", lambda: home)
    for name in ("SPARSE_KERNELS_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert verdicts.folder() == home / ".cache" / "sparse_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert verdicts.folder() == home / ".cache" / "sparse_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert verdicts.folder() == Path("/elsewhere/sparse_kernels")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert verdicts.folder() == home / "Library" / "Caches" / "sparse_kernels"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert verdicts.folder() == Path("/local/sparse_kernels")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert verdicts.folder() is None
    assert verdicts.load(torch.device("cpu")) == {}
    assert not verdicts.save(torch.device("cpu"), {"a": ""})


def test_two_threads_check_once(monkeypatch):
    through, checks = proof.comparisons, []

    def comparisons(*arguments, **more):
        checks.append(threading.get_ident())
        return through(*arguments, **more)

    monkeypatch.setattr(proof, "comparisons", comparisons)
    start, found = threading.Barrier(3), []

    def call():  # the choice alone: Triton's interpreter runs in one thread
        start.wait()
        found.append(_dispatch.choose("row_stats", StatsCall(*batch(), ("loss",), -1, Settings()), None)[0])

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["triton"] * 3
    assert len(checks) == 1


def test_off_checks_nothing_and_lets_a_kept_verdict_count(monkeypatch, forwards, tmp_path):
    monkeypatch.setattr(proof, "mode", "off")
    sk.row_stats(*batch())
    assert forwards == []
    assert kept(tmp_path) == {}
    forget(monkeypatch)
    assert verdicts.save(torch.device("cpu"), {"triton row_stats float32": ""})
    monkeypatch.setattr(proof, "mode", "off")
    sk.row_stats(*batch())
    assert len(forwards) == 1


def test_force_checks_whatever_was_kept(monkeypatch, forwards, tmp_path):
    assert verdicts.save(torch.device("cpu"), {"triton row_stats float32": "it was wrong once"})
    monkeypatch.setattr(proof, "mode", "force")
    sk.row_stats(*batch())
    assert len(forwards) > 1
    assert kept(tmp_path) == {"triton row_stats float32": ""}


def test_a_check_that_takes_long_says_so_meanwhile(monkeypatch, caplog):
    """As where a compiler takes long over one kernel."""
    said, forward = threading.Event(), triton_backend._forward
    message = "sparse_kernels: checking the triton kernels on interpreter, once for these versions"

    class Heard(logging.Handler):
        def emit(self, record):
            if record.getMessage() == message:
                said.set()

    def slow(*arguments, **named):
        assert said.wait(20)
        return forward(*arguments, **named)

    monkeypatch.setattr(proof, "SAY_AFTER", 0.01)
    monkeypatch.setattr(triton_backend, "_forward", slow)
    handler = Heard()
    proof.logger.addHandler(handler)
    try:
        sk.row_stats(*batch())
    finally:
        proof.logger.removeHandler(handler)
    assert not warned(caplog)
    assert caplog.messages.count(message) == 1


def test_a_check_that_ends_soon_says_nothing(caplog, monkeypatch):
    monkeypatch.setattr(proof, "SAY_AFTER", 600.0)
    sk.row_stats(*batch())
    assert not [message for message in caplog.messages if "checking" in message]


def test_a_check_ends_in_time(monkeypatch, caplog, tmp_path):
    sk.row_stats(*batch())
    caplog.clear()
    monkeypatch.setattr(proof, "LIMIT", 0.0)
    torch.testing.assert_close(
        sk.row_stats(*batch(torch.bfloat16)), sk.row_stats(*batch(torch.bfloat16), backend="torch"), rtol=0, atol=0
    )
    (message,) = warned(caplog)
    assert "ran out of its 0 s after 1 comparisons" in message
    assert kept(tmp_path) == {"triton row_stats float32": ""}  # the next process tries again


def test_nothing_of_the_caller_s_disturbs_a_check_and_nothing_is_disturbed():
    logits, targets = batch()
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            found = sk.row_stats(logits, targets)
            assert torch.is_inference_mode_enabled()
            assert torch.is_autocast_enabled("cpu")
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert proof.known_reason("triton", "row_stats", torch.float32, torch.device("cpu")) == ""
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(found.loss, sk.row_stats(logits, targets, backend="torch").loss)


def test_a_compiler_s_trace_takes_a_kept_verdict_or_the_reference(monkeypatch, forwards, caplog):
    def scores(logits, targets):
        return sk.row_stats(logits, targets).loss * 2

    torch.compiler.reset()
    compiled = torch.compile(scores, fullgraph=True, backend="eager")
    compiled(*batch())
    assert forwards == []
    (message,) = warned(caplog)
    assert "row_stats is compiled with the reference" in message
    assert "sparse_kernels.warm_up" in message
    assert verdicts.save(torch.device("cpu"), {"triton row_stats float32": ""})
    forget(monkeypatch)
    torch.compiler.reset()
    compiled = torch.compile(scores, fullgraph=True, backend="eager")
    found = compiled(*batch())
    assert len(forwards) == 1
    torch.testing.assert_close(found, 2 * sk.row_stats(*batch(), backend="torch").loss)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_modes_and_tracers_wait_for_no_check(forwards, monkeypatch):
    with FlopCounterMode(display=False):
        sk.row_stats(*batch())
    with FakeTensorMode() as mode:
        logits, targets = (mode.from_tensor(tensor) for tensor in batch())
        sk.row_stats(logits, targets)
    with pytest.warns(torch.jit.TracerWarning):
        torch.jit.trace(lambda logits, targets: sk.row_stats(logits, targets).loss, batch(), check_trace=False)
    torch.func.vmap(lambda row: sk.row_stats(row[None], torch.tensor([0])).loss)(batch()[0])
    assert forwards == []
    assert proof._known == {}


def test_a_capture_waits_for_no_check(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert proof._may_check(torch.device("cuda", 0)) is not capturing


@pytest.mark.parametrize("value", ["on", "AUTO "])
def test_another_mode_is_refused_in_one_line(value):
    environment = {**os.environ, "SPARSE_KERNELS_SELFCHECK": value}
    done = fresh.run("-c", "import sparse_kernels", environment=environment)
    last = done.stderr.splitlines()[-1]
    assert last == f"ValueError: `SPARSE_KERNELS_SELFCHECK` must be one of auto, off, force, got {value!r}"


def test_a_demand_and_the_family_need_no_proof(monkeypatch, caplog):
    no_check(monkeypatch)
    monkeypatch.setattr(_dispatch, "_preferred", None)
    caplog.set_level(logging.INFO, logger="sparse_kernels")
    right = sk.row_stats(*batch(), backend="torch")
    for name in ("triton", "gpu"):
        torch.testing.assert_close(sk.row_stats(*batch(), backend=name), right)
    assert not caplog.records
