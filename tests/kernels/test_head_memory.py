"""Peak memory of the head, each in a process of its own: less than the logits, and no more than PyTorch's chunks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "head_memory.py"
SHAPE = (2048, 128, 32_768)  # the logits are 16 times the weight


def measured(side):
    command = [sys.executable, str(SCRIPT), side, *map(str, SHAPE)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_extra_memory_is_a_share_of_the_logits_and_below_pytorchs():
    ours, fifth = measured("ours"), measured("ours-quantile")
    assert ours["extra"] < 0.7 * ours["logits"]
    assert fifth["extra"] < 0.7 * fifth["logits"]
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        assert ours["extra"] < measured("torch mean")["extra"] * 1.1
