"""What other instruction sets' tests do not show of NEON: moved rows, and that setup.py builds it on aarch64.

Scores, gradients and compaction are shown by every test of the fixture ``instruction_set``, which emulates NEON.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulated import forced

import sparse_kernels as sk

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.any_pytorch


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (3, 32, 32)], ids=str)
def test_moved_rows_are_the_references(shape, dtype):
    torch.manual_seed(0)
    rows = (10 * torch.rand(40, *shape)).to(dtype)
    with forced("neon"):
        selection = sk.compact(torch.rand(40) < 0.4, capacity=20, backend="cpp")
        packed = sk.gather_rows(rows, selection, backend="cpp")
        placed = sk.scatter_rows(packed, selection, backend="cpp")
    assert torch.equal(packed, rows[selection.index])
    assert torch.equal(placed, sk.scatter_rows(packed, selection, backend="torch"))


@pytest.mark.parametrize(("machine", "isa"), [("aarch64", "neon"), ("x86_64", "avx"), ("riscv64", None)])
def test_each_processor_gets_its_files_alone(tmp_path, machine, isa):
    pytest.importorskip("pybind11", reason="the build's own needs are not installed here")
    pytest.importorskip("ninja", reason="the build's own needs are not installed here")
    compiler = tmp_path / "compiler"
    make = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done'
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/commands\n{make}\n')
    compiler.chmod(0o755)
    script = (
        f"import platform, runpy, sys; platform.machine = lambda: {machine!r}; "
        f"sys.argv = ['setup.py', '-q', 'build_ext', '-b', '{tmp_path}/lib', '-t', '{tmp_path}/temp']; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    environment = {**os.environ, "CXX": str(compiler), "SPARSE_KERNELS_BUILD": "cpu"}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True, capture_output=True)
    commands = (tmp_path / "commands").read_text()
    for name, macro in (("neon", "-DSPARSE_KERNELS_NEON"), ("avx", "-DSPARSE_KERNELS_X86")):
        assert (f"row_stats_{name}" in commands) == (f"compact_{name}" in commands) == (name == isa)
        assert (macro in commands) == (name == isa)
