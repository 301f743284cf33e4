"""Programs that fork from a process with PyTorch start others in the same way, and these end as a Python's would."""

import json
import os
import time
from pathlib import Path

import fresh

PROGRAM = """
import json, signal, subprocess, sys

def start(code, *options):
    return subprocess.Popen([sys.executable, *options, "-c", code], stdout=subprocess.PIPE, text=True)

TORCH = "import os, sys; print('torch' in sys.modules, os.getpid(), flush=True); "
CATCH = "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); signal.pause()"
found = {}
for name, code, options, sent in (
    ("status", "sys.exit(3)", ["-u"], None),
    ("signal", "os.kill(os.getpid(), 9)", [], None),
    ("relayed", CATCH.replace("signal.pause", "print('ready', flush=True); signal.pause"), [], signal.SIGTERM),
    ("killed", "import signal; print('ready', flush=True); signal.pause()", [], signal.SIGKILL),
    ("options", "pass", ["-W", "error"], None),
):
    with start(TORCH + code, *options) as other:
        forked, process = other.stdout.readline().split()
        if sent is not None:
            other.stdout.readline()
            other.send_signal(sent)
    found[name] = [forked == "True", other.returncode, int(process)]
print(json.dumps(found))
"""


def test_a_program_that_starts_others_is_told_how_they_end() -> None:
    done = fresh.run("-c", PROGRAM)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ended = {name: tuple(rest) for name, (*rest, _) in found.items()}
    assert ended == {
        "status": (True, 3), "signal": (True, -9), "relayed": (True, 7), "killed": (True, -9), "options": (False, 0),
    }  # fmt: skip
    left = time.monotonic() + 30
    while any(Path(f"/proc/{process}").exists() for *_, process in found.values()):
        assert time.monotonic() < left, "a program outlives the process that stands for it"
        time.sleep(0.05)


def test_what_is_imported_beforehand_reads_the_variables_of_the_program(tmp_path: Path) -> None:
    (tmp_path / "imported.py").write_text("import os\nFOUND = os.environ.get('OMP_NUM_THREADS')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "3"}
    done = fresh.run("-c", "import imported; print(imported.FOUND)", environment=environment, imports=["imported"])
    assert done.stdout == "3\n", done.stderr
