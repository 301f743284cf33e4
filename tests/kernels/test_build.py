"""setup.py's modes, built into a temporary folder, and what the C++ sources must keep to."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.any_pytorch
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
    assert "TORCH_CUDA_ARCH_LIST must hold numbers, such as 8.0 or 9.0+PTX; got 'Hopper'" in done.stderr


def test_unknown_mode_is_refused(tmp_path):
    done = build(tmp_path, SPARSE_KERNELS_BUILD="everything")
    assert done.returncode != 0
    assert "must be one of auto, cpu" in done.stderr


def test_without_the_extension_everything_runs_on_the_reference(tmp_path):
    """The package's Python files alone, as an install without a compiler leaves them."""
    package = tmp_path / "sparse_kernels"
    package.mkdir()
    for source in (ROOT / "sparse_kernels").rglob("*.py"):
        copy = package / source.relative_to(ROOT / "sparse_kernels")
        copy.parent.mkdir(exist_ok=True, parents=True)
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


# What follows reads the sources with the host's compiler.
CHECK_HEADERS = ROOT / "tests" / "check_headers.py"
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None or shutil.which("nm") is None, reason="no C++ compiler")


@needs_compiler
@pytest.mark.slow
def test_every_header_stands_alone():
    done = subprocess.run([sys.executable, str(CHECK_HEADERS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_compiler
@pytest.mark.parametrize(
    "text", ["#pragma once\nstd::size_t size();\n", "struct Unguarded {};\n"], ids=["no include", "no guard"]
)
def test_a_header_that_does_not_stand_alone_is_named(tmp_path, text):
    header = tmp_path / "broken.h"
    header.write_text(text)
    assert "broken.h:" in runpy.run_path(str(CHECK_HEADERS))["parse"](header)


def file_flags():
    """setup.py's FILE_FLAGS: the files of an instruction set, and their compiler options."""
    (value,) = [
        node.value
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "FILE_FLAGS"
    ]
    return ast.literal_eval(value)


X86_SOURCES = [path for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")) if "_neon" not in path.name]
CLANG = next(filter(shutil.which, ["clang++", *(f"clang++-{version}" for version in range(30, 13, -1))]), None)


@pytest.mark.skipif(CLANG is None, reason="no clang++")
@pytest.mark.skipif(not runpy.run_path(str(CHECK_HEADERS))["X86"], reason="these files are for x86")
@pytest.mark.parametrize("path", X86_SOURCES, ids=lambda path: path.name)
def test_clang_takes_the_sources_too(path):
    options = ["-std=c++17", "-fsyntax-only", "-DSPARSE_KERNELS_X86", f"-I{ROOT / 'csrc' / 'include'}"]
    command = [CLANG, *options, *file_flags().get(path.name, "").split(), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_compiler
@pytest.mark.skipif(not runpy.run_path(str(CHECK_HEADERS))["X86"], reason="these files are for x86")
@pytest.mark.parametrize("name", sorted(file_flags()))
def test_code_of_an_instruction_set_shares_no_function_with_portable_code(tmp_path, name):
    """Of functions that several objects define, the linker keeps one: it may need more than the processor has."""
    path, isa = tmp_path / "code.o", name.removesuffix(".cpp").split("_")[-1]
    options = ["-std=c++17", "-O0", f"-I{ROOT / 'csrc' / 'include'}", *file_flags()[name].split()]
    subprocess.run(["c++", *options, "-c", str(ROOT / "csrc" / "cpu" / name), "-o", str(path)], check=True)
    symbols = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
    # A DW.ref is an address, of the function that unwinds the stack: no code.
    defined = re.findall(r"^[0-9a-f]+ ([A-Zu]) (?!DW\.ref\.)(.*)$", symbols, re.M)
    assert any(symbol.startswith(f"sparse_kernels::{isa}::") for _, symbol in defined)
    assert [symbol for kind, symbol in defined if kind in "WVu" and f"sparse_kernels::{isa}::" not in symbol] == []


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_a_term_of_a_sum_is_no_call():
    """Where a file has grown by enough, GCC inlines no more: a term was a call, and pixels took 1.4 times as long."""
    module = pytest.importorskip("sparse_kernels._cpp", reason="no C++ compiler")
    symbols = subprocess.run(["nm", "-C", module.__file__], capture_output=True, text=True, check=True).stdout
    assert "sparse_kernels::" in symbols
    calls = re.findall(r"^.* [tTwW] .*(?:sum_of<|vec_log[<(]|of_rows<|copy_block<.*lambda).*$", symbols, re.M)
    assert [name[:200] for name in calls] == []


def test_rows_are_summed_in_functions_of_their_own():
    """Inlined into one function with all else, 65,536 rows of 100 took 1.1 times as long: too few registers."""
    module = pytest.importorskip("sparse_kernels._cpp", reason="no C++ compiler")
    symbols = subprocess.run(["nm", "-C", module.__file__], capture_output=True, text=True, check=True).stdout
    for name in ("sum_short_rows<", "sum_long_rows<"):
        assert len(re.findall(rf"^.* [tTwW] .*{name}.*$", symbols, re.M)) >= 8, name


@pytest.mark.skipif(
    shutil.which("objdump") is None or not runpy.run_path(str(CHECK_HEADERS))["X86"], reason="no objdump"
)
def test_no_prefetch_is_left_out():
    """GCC takes a call of what only prefetches for one without effect, unless it is inlined before."""
    module = pytest.importorskip("sparse_kernels._cpp", reason="no C++ compiler")
    code = subprocess.run(["objdump", "-d", module.__file__], capture_output=True, text=True, check=True).stdout
    assert code.count("prefetch") > 250
    assert code.count("prefetchnta") >= 16  # two for each function of planes with AVX-512, by types
