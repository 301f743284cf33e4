"""setup.py's modes, built into a temporary folder."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("pybind11", reason="the build's own needs are not installed here")
pytest.importorskip("ninja", reason="the build's own needs are not installed here")


def build(folder, **environment):
    command = [sys.executable, "setup.py", "-q", "build_ext", "-b", str(folder / "lib"), "-t", str(folder / "temp")]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_without_a_compiler_the_build_succeeds_and_says_so(tmp_path):
    done = build(tmp_path, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "WARNING: the C++ backend was not built" in done.stderr
    assert "no-such-compiler" in done.stderr
    written = runpy.run_path(str(tmp_path / "lib" / "sparse_kernels" / "_build_info.py"))
    assert "no-such-compiler" in written["CPP_MISSING"]


def test_asked_for_by_name_a_build_without_a_compiler_fails(tmp_path):
    done = build(tmp_path, CXX="no-such-compiler", SPARSE_KERNELS_BUILD="cpu")
    assert done.returncode != 0
    assert "no-such-compiler" in done.stderr


def test_none_builds_nothing(tmp_path):
    assert build(tmp_path, SPARSE_KERNELS_BUILD="none").returncode == 0
    assert not list(tmp_path.rglob("*.so"))


def test_cuda_asked_for_by_name_is_never_left_out_silently(tmp_path):
    done = build(tmp_path, SPARSE_KERNELS_BUILD="cuda")
    assert done.returncode != 0
    assert "no CUDA sources" in done.stderr


def test_unknown_mode_is_refused(tmp_path):
    done = build(tmp_path, SPARSE_KERNELS_BUILD="everything")
    assert done.returncode != 0
    assert "wanted one of: auto, cpu" in done.stderr


def test_without_the_extension_everything_runs_on_the_reference(tmp_path):
    """The package's Python files alone, as an install without a compiler leaves them."""
    package = tmp_path / "sparse_kernels"
    package.mkdir()
    for source in (ROOT / "sparse_kernels").glob("*.py"):
        (package / source.name).write_text(source.read_text())
    (package / "_build_info.py").write_text("CPP_MISSING = 'no C++ compiler found (tried c++)'\n")
    script = (
        "import sys; sys.modules['sparse_kernels._cpp'] = None; "  # an editable install would lend its own
        "import torch, sparse_kernels as sk; "
        "g = sk.gate_rows(torch.randn(9, 4), torch.zeros(9, dtype=torch.long), torch.zeros(1), weights={'loss': 1.0}); "
        "sk.compact(g.mask, capacity=3).take(torch.randn(9, 2)); "
        "print({op: e['active'] for op, e in sk.backend_info().items()})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cpp" not in done.stdout
    assert "RuntimeWarning" in done.stderr
    assert "no C++ compiler found" in done.stderr
