"""The command that checks, and the warm-up before a capture."""

import sys

import fresh
import pytest
import torch
from proof_parts import forget, kept, no_check, unproved

import sparse_kernels as sk
from sparse_kernels import __main__ as command
from sparse_kernels.backends import cpp as cpp_backend
from sparse_kernels.backends.triton import backend as triton_backend
from sparse_kernels.self_check import proof

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy, on NaN and inf
compiled = pytest.mark.skipif(cpp_backend.unavailable_reason() is not None, reason="the C++ backend is not built")
interpreted = pytest.mark.skipif(triton_backend.unavailable_reason() is not None, reason="nothing is interpreted")


def check(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["sparse_kernels", "check", *arguments])
    code = command.main()
    return code, capsys.readouterr().out


@compiled
def test_the_screen_of_a_machine_without_a_gpu(monkeypatch, capsys):
    code, out = check(monkeypatch, capsys, "--device", "cpu", "--quick")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith(f"sparse-kernels {sk.__version__} ")
    assert f"torch {torch.__version__}" in lines[1]
    assert "Triton" in lines[1]
    for op in ("row_stats", "gate_rows", "compact", "control", "gather_rows", "scatter_rows", "select", "gate_step"):
        assert any(line.startswith(f"{op} ") and " agrees " in line for line in lines)
    assert lines[-1].startswith("all 18 agree with the float64 reference")
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 120


@compiled
def test_speeds_stand_beside_a_copy_s(monkeypatch, capsys):
    monkeypatch.setattr(sk._check, "_parts", lambda *_: ([("cpp", "compact", None)], {}))
    code, out = check(monkeypatch, capsys, "--device", "cpu")
    assert code == 0
    assert "a copy moves " in out
    assert " GB/s; of that:\n    compact      cpp " in out


@compiled
def test_what_differs_is_named_and_the_exit_code_says_so(monkeypatch, capsys):
    right = cpp_backend.gate_rows

    def wrong(call):
        found = right(call)
        return found._replace(significance=found.significance + 1e-3)

    monkeypatch.setattr(cpp_backend, "gate_rows", wrong)
    code, out = check(monkeypatch, capsys, "--device", "cpu", "--backend", "cpp", "--quick")
    assert code == 1
    assert "gate_rows    cpp    float32   DISAGREES" in out
    assert "    significance of gate_rows, 40 x 10, temperature 0.0 differs: error 0.001" in out
    assert "DISAGREE with the float64 reference" in out.splitlines()[-1]


@compiled
def test_an_exception_is_named_and_the_rest_is_checked(monkeypatch, capsys):
    monkeypatch.setattr(cpp_backend, "compact", lambda call: (_ for _ in ()).throw(RuntimeError("no\nmore")))
    code, out = check(monkeypatch, capsys, "--device", "cpu", "--quick")
    assert code == 1
    assert "    RuntimeError: no\n" in out
    assert "scatter_rows cpp              agrees" in out


@interpreted
def test_its_verdicts_are_kept_and_spare_the_first_use(monkeypatch, capsys, tmp_path):
    unproved(monkeypatch, tmp_path)
    parts = [("triton", "row_stats", torch.float32)]
    monkeypatch.setattr(sk._check, "_parts", lambda *_: (parts, {}))
    code, _ = check(monkeypatch, capsys, "--device", "cpu", "--quick")
    assert code == 0
    assert kept(tmp_path) == {"triton row_stats float32": ""}
    forget(monkeypatch)
    no_check(monkeypatch)
    sk.row_stats(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_there_is_one_line(device, monkeypatch, capsys):
    code, out = check(monkeypatch, capsys, "--device", device)
    assert code == 2
    assert out.startswith(f"`--device` must be a device of this machine, got {device!r}: ")
    assert len(out.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nothing_to_check_is_no_success(monkeypatch, capsys):
    code, out = check(monkeypatch, capsys, "--device", "cpu", "--backend", "cuda")
    assert code == 1
    assert "not checked: cuda: " in out
    assert out.splitlines()[-1] == "nothing was checked"


def test_the_command_is_documented():
    done = fresh.run("-m", "sparse_kernels", "check", "--help")
    assert done.returncode == 0, done.stderr
    for option in ("--device", "--backend", "--seed", "--quick"):
        assert option in done.stdout


@interpreted
def test_warm_up_checks_what_would_serve_without_a_time_limit(monkeypatch, tmp_path):
    unproved(monkeypatch, tmp_path)
    monkeypatch.setattr(proof, "LIMIT", 0.0)
    logits, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    sk.row_stats(logits, targets)
    assert kept(tmp_path) == {}  # it ran out of its time
    info = sk.warm_up("cpu", [(4, 3)], gate_temperature=0.5)
    assert kept(tmp_path) == {"triton row_stats float32": "", "triton gate_rows float32": ""}
    assert info["row_stats"]["active"] == "triton"
    assert proof.LIMIT == 0.0
    no_check(monkeypatch)
    sk.row_stats(logits, targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shapes", "dim"), [([(5, 3), (1, 7)], -1), ([(2, 3, 4, 5)], 1), ([(0, 3)], -1), ([], -1)])
def test_warm_up_takes_any_logits(shapes, dim, dtype):
    with torch.inference_mode():
        info = sk.warm_up("cpu", shapes, dtype=dtype, dim=dim, outputs="entropy", weights={"margin": -1.0}, capacity=2)
    assert str(info) == str(sk.backend_info("cpu"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shapes": 5}, TypeError, r"`shapes` must be shapes of logits, such as \[\(4096, 1000\)\], got int 5"),
        ({"shapes": (4096, 1000)}, TypeError, "got one of int 4096"),
        ({"shapes": [(4, "a")]}, TypeError, "`shapes` must be an int, got str"),
        ({"shapes": [(4, -1)]}, ValueError, r"no negative size and a class in dim -1, got \(4, -1\)"),
        ({"shapes": [(4, 0)]}, ValueError, r"got \(4, 0\)"),
        ({"shapes": [()]}, ValueError, r"`dim` must be a dimension of the logits, of shape \(\), got -1"),
        ({"dim": 2}, ValueError, r"of shape \(4, 3\), got 2"),
        ({"dtype": torch.int64}, TypeError, "`dtype` must be float32, bfloat16, float16 or float64, got torch.int64"),
        ({"weights": {"argmax": 1.0}}, ValueError, "argmax"),
        ({"outputs": ["nonsense"]}, ValueError, "nonsense"),
    ],
)
def test_what_is_no_shape_is_refused_in_one_line(arguments, error, message):
    with pytest.raises(error, match=message) as found:
        sk.warm_up("cpu", **{"shapes": [(4, 3)], **arguments})
    assert "\n" not in str(found.value)


def test_a_gpu_that_is_not_there_cannot_be_warmed_up(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="`device` must be one that PyTorch finds, got cuda:1, and there is no CUDA"):
        sk.warm_up("cuda:1", [(4, 3)])


def test_a_capture_is_too_late_to_warm_up(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="`warm_up` must be called before a CUDA graph is captured"):
        sk.warm_up("cuda", [(4, 3)])
