"""The list of what may be skipped or fail: what is not on it turns a strict run red, and so does what is needlessly."""

import os
import subprocess
import sys
from pathlib import Path

import known
import pytest

HERE = Path(__file__).parent
CONFTEST = """
import known, pytest
known.FAULTS = (known.Fault("pytest", (8, 2), "test_fault", "beyond .* repair", "is being mended"),)

def pytest_configure(config):
    known.register(config)
"""
KNOWN = "import pytest\ndef test_known(): pytest.skip('no GPU')\n"
UNKNOWN = "import pytest\ndef test_unknown(): pytest.skip('no GPU today')\n"
ABSENT = "import pytest\npytest.importorskip('no_such_module')\ndef test(): pass\n"
FAULT = "def test_fault(): raise ValueError('beyond all repair')\n"
OTHER = "def test_fault(): raise ValueError('for another reason')\n"
MENDED = "def test_fault(): pass\n"


@pytest.mark.parametrize(
    ("source", "strict", "code", "said"),
    [
        (KNOWN, True, 0, "1 skipped"),
        (UNKNOWN, True, 1, "test_one.py::test_unknown: skipped, for no known reason: no GPU today"),
        (UNKNOWN, False, 0, "1 skipped"),
        (ABSENT, True, 1, "for no known reason: could not import 'no_such_module'"),
        (FAULT, True, 0, "1 xfailed"),
        (FAULT, False, 0, "1 xfailed"),
        (OTHER, True, 1, "1 failed"),
        (MENDED, True, 1, "not seen; take it off the list: is being mended"),
        (MENDED, False, 0, "1 passed"),
    ],
)
def test_strict_runs(source: str, strict: bool, code: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_one.py").write_text(source)
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # they take longer than the tests
        known.VARIABLE: "1" if strict else "0",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert said in done.stdout, done.stdout + done.stderr
    assert done.returncode == code, done.stdout


def test_a_reason_stands_behind_every_skip_that_is_known() -> None:
    lines = [line for line in (HERE / "known_skips.txt").read_text().splitlines() if line and line[0] != "#"]
    assert lines
    for line in lines:
        pattern, _, why = line.partition("  ")
        assert pattern.strip(), line
        assert why.strip(), line
