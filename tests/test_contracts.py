"""The import contracts hold, and a module in the wrong room, or one that imports upwards, breaks them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def copy(tmp_path):
    """The packages and the contracts, to be spoilt."""
    pytest.importorskip("importlinter", reason="import-linter is not installed")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.npz")
    shutil.copytree(ROOT / "sparse_kernels", tmp_path / "sparse_kernels", ignore=ignored)
    shutil.copytree(ROOT / "python_api" / "sparse_training", tmp_path / "sparse_training", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def contracts(folder):
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [*command, "--no-cache"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_the_contracts_hold(copy):
    found = contracts(copy)
    assert found.returncode == 0, found.stdout
    assert " 0 broken" in found.stdout


@pytest.mark.parametrize(
    ("module", "source", "broken"),
    [
        ("sparse_training/stray.py", "", "Rooms of sparse_training"),
        ("sparse_training/training/stray.py", "", "The loop stands on the step"),
        ("sparse_training/gate/upward.py", "import sparse_training.trainer", "Rooms of sparse_training"),
        (
            "sparse_training/gate/typed.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sparse_training.trainer",
            "Rooms of sparse_training",
        ),
        (
            "sparse_training/samplers/late.py",
            "def f():\n    import sparse_training.cli",
            "Rooms of sparse_training",
        ),
        ("sparse_kernels/backends/upward.py", "import sparse_kernels.ops", "Modules of sparse_kernels"),
        ("sparse_kernels/upward.py", "import sparse_training", "The kernels know nothing"),
    ],
)
def test_a_file_in_the_wrong_room_breaks_one(copy, module, source, broken):
    (copy / module).write_text(source + "\n")
    found = contracts(copy)
    assert found.returncode != 0
    assert any(line.startswith(broken) and "BROKEN" in line for line in found.stdout.splitlines()), found.stdout
