"""Peak memory that one call takes besides its logits: ``python peak_memory.py ours|trl BATCH TOKENS CLASSES``.

In a process of its own, because a high-water mark only rises. bfloat16 logits are filled in place, so that the
mark before the call is what is held then; a smaller call before that brings in libraries and threads.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import peers
import torch

import sparse_kernels as sk


def peak() -> int:
    """Bytes: the resident high-water mark, from Linux; getrusage's also counts the process that started this one."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def main() -> None:
    side, *shape = sys.argv[1:]
    batch, tokens, classes = map(int, shape)
    function = peers.trl_eager(torch.device("cpu")) if side == "trl" else sk.row_stats
    logits = torch.empty(batch, tokens, classes, dtype=torch.bfloat16).uniform_(-4, 4)
    labels = torch.randint(0, classes, (batch, tokens))
    size = logits.numel() * logits.element_size()
    with torch.no_grad():
        function(logits[:1, :8], labels[:1, :8])
        before = peak()
        function(logits, labels)
    print(json.dumps({"bytes": peak() - before, "logits": size, "share": (peak() - before) / size}))


if __name__ == "__main__":
    main()
