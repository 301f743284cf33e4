"""README shows only what the recorded results say, and its example runs."""

import re
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]


def test_tables_are_those_of_the_recorded_results():
    command = [sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run: python benchmarks/readme.py"


def test_the_example_of_a_loop_runs():
    """As it is written there, in a loop around it: ten steps, and about a tenth of the rows after a while."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    head, body = code.split("gate = Gate(rate=0.1)\n")
    torch.manual_seed(0)
    names = {"torch": torch, "F": F, "model": torch.nn.Linear(20, 10)}
    exec(head + "gate = Gate(rate=0.1)", names)
    for _ in range(30):
        names["inputs"], names["targets"] = torch.randn(256, 20), torch.randint(0, 10, (256,))
        exec(body, names)
        names["loss"].backward()
    assert 0 < names["inputs"].shape[0] < 60
    assert names["inputs"].shape[0] == names["targets"].shape[0]
