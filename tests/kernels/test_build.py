"""setup.py's modes, built into a temporary folder."""

import os
import re
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


def tool(folder, name, *lines):
    """A program that stands for a compiler; this one makes the file that it is asked for, and nothing in it."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    make = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done'
    path.write_text("\n".join(["#!/bin/sh", *lines, make, ""]))
    path.chmod(0o755)
    return str(path)


def build_cuda(folder, *nvcc, **environment):
    """A build whose C++ compiler does nothing and whose nvcc starts with these lines; what it says, and the record."""
    if nvcc:
        tool(folder / "bin", "nvcc", f'echo "$@" >> {folder}/commands', *nvcc)
    done = build(folder, CXX=tool(folder, "cxx"), CUDA_HOME=str(folder), **environment)
    written = folder / "lib" / "sparse_kernels" / "_build_info.py"
    return done, runpy.run_path(str(written)) if written.exists() else None


# What CUDA 12.4's nvcc answers to --list-gpu-arch.
NVCC_12_4 = 'if [ "$1" = --list-gpu-arch ]; then printf "compute_%s\\n" 50 60 70 72 75 80 86 87 89 90; exit; fi'


def test_cuda_asked_for_by_name_is_never_left_out_silently(tmp_path):
    done, _ = build_cuda(tmp_path, SPARSE_KERNELS_BUILD="cuda")
    assert done.returncode != 0
    assert "nvcc was not found" in done.stderr


@pytest.mark.parametrize(
    ("nvcc", "reason"),
    [
        ([], "nvcc was not found"),
        (["exit 3"], "does not run"),
        ([NVCC_12_4, "exit 3"], "compilation failed"),
        (["echo nothing known; exit 0"], "no architecture"),
    ],
)
def test_a_broken_nvcc_leaves_the_rest_as_it_is(tmp_path, nvcc, reason):
    done, written = build_cuda(tmp_path, *nvcc, SPARSE_KERNELS_BUILD="auto")
    assert done.returncode == 0, done.stderr
    assert written["CPP_MISSING"] == ""
    assert reason in written["CUDA_MISSING"]
    assert ("WARNING: the CUDA backend" in done.stderr) == (reason == "compilation failed")
    assert list(tmp_path.glob("lib/sparse_kernels/_cpp*"))
    assert not list(tmp_path.glob("lib/sparse_kernels/_cuda*"))


def test_cuda_is_left_out_of_a_cpu_build(tmp_path):
    done, written = build_cuda(tmp_path, NVCC_12_4, SPARSE_KERNELS_BUILD="cpu")
    assert done.returncode == 0, done.stderr
    assert written["CUDA_MISSING"] == "SPARSE_KERNELS_BUILD=cpu"
    assert not (tmp_path / "commands").exists()


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ("", {"75,code=sm_75", "80,code=sm_80", "90,code=sm_90", "90,code=compute_90"}),
        ("8.6;9.0a+PTX", {"86,code=sm_86", "90a,code=sm_90a", "90a,code=compute_90a"}),
    ],
)
def test_architectures_are_those_asked_for_or_the_first_of_every_major(tmp_path, asked, wanted):
    done, written = build_cuda(tmp_path, NVCC_12_4, TORCH_CUDA_ARCH_LIST=asked, SPARSE_KERNELS_BUILD="cuda")
    assert done.returncode == 0, done.stderr
    assert written == {**written, "CPP_MISSING": "", "CUDA_MISSING": ""}
    compiled = [line for line in (tmp_path / "commands").read_text().splitlines() if "compact.cu" in line]
    assert set(re.findall(r"arch=compute_(\S+)", compiled[0])) == wanted
    assert list(tmp_path.glob("lib/sparse_kernels/_cuda*"))


def test_a_list_of_architectures_that_is_none_is_refused(tmp_path):
    done, _ = build_cuda(tmp_path, NVCC_12_4, TORCH_CUDA_ARCH_LIST="Hopper", SPARSE_KERNELS_BUILD="cuda")
    assert done.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST has 'Hopper'" in done.stderr


def test_unknown_mode_is_refused(tmp_path):
    done = build(tmp_path, SPARSE_KERNELS_BUILD="everything")
    assert done.returncode != 0
    assert "wanted one of: auto, cpu" in done.stderr


def test_without_the_extension_everything_runs_on_the_reference(tmp_path):
    """The package's Python files alone, as an install without a compiler leaves them."""
    package = tmp_path / "sparse_kernels"
    for source in (ROOT / "sparse_kernels").rglob("*.py"):
        copy = package / source.relative_to(ROOT / "sparse_kernels")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(source.read_text())
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
