"""Block-sparse attention, forward and backward, against PyTorch's own dense attention; one thread, 3 heads of 64.

Arithmetic bounds the ratio: 512 keys a query are 1/2 of 1,024 and 1/32 of 16,384. The choice of blocks is in the time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from sparse_training.nn import block_sparse_attention


@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("tokens", "dtype", "target", "rounds", "summary"),
    [
        pytest.param(1024, torch.float32, 1.0, 31, False, id="attention-1024"),
        pytest.param(
            1100, torch.float32, 1.0, 31, False, id="attention-1100"
        ),  # no multiple of the block: under a mask
        pytest.param(4096, torch.float32, 4.0, 9, False, id="attention-4096"),
        pytest.param(16384, torch.float32, 12.0, 5, False, id="attention-16384"),
        pytest.param(1024, torch.bfloat16, None, 31, False, id="attention-bfloat16-1024"),
        pytest.param(4096, torch.bfloat16, None, 9, False, id="attention-bfloat16-4096"),
        pytest.param(1024, torch.float32, 1.0, 31, True, id="attention-summary-1024"),
        pytest.param(1100, torch.float32, 1.0, 31, True, id="attention-summary-1100"),
        pytest.param(4096, torch.float32, 4.0, 9, True, id="attention-summary-4096"),
        pytest.param(16384, torch.float32, 12.0, 3, True, id="attention-summary-16384"),
        pytest.param(4096, torch.bfloat16, None, 9, True, id="attention-summary-bfloat16-4096"),
    ],
)
def test_forward_and_backward(interleaved, small, tokens, dtype, target, rounds, summary):
    torch.manual_seed(0)
    tokens = 1024 + tokens % 1024 if small else tokens
    operands = [torch.randn(1, 3, tokens, 64).to(dtype).requires_grad_() for _ in range(3)]
    grad = torch.randn(1, 3, tokens, 64).to(dtype)

    def run(form):
        return lambda: torch.autograd.grad(form(*operands), operands, grad)

    targets = {} if target is None else {"dense": target}
    sides = {"dense": run(F.scaled_dot_product_attention)}
    row = interleaved(run(partial(block_sparse_attention, summary=summary)), sides, targets=targets, rounds=rounds)
    row.notes["keys a query"] = 512 + summary * -(-tokens // 64)
    if target == 12.0 and not summary:
        forms = ("sparse",) if small else ("sparse", "dense", "gathered")
        row.notes |= {f"peak memory of {form}, in operands": peak_memory(form, tokens) for form in forms}


def peak_memory(form: str, tokens: int) -> float:
    """Peak memory of forward and backward beyond the operands, in shares of them, in a process of its own."""
    script = Path(__file__).with_name("attention_memory.py")
    done = subprocess.run([sys.executable, script, form, str(tokens)], check=True, capture_output=True, text=True)
    return round(json.loads(done.stdout)["share"], 2)
