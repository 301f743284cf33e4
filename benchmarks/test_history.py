"""The table of past scores at 100 million rows: memory, draws, updates, and a state that comes back.

The peer is the least that any way of drawing by weight has to do: read one score at random a draw.
torch.multinomial is no peer: it takes at most 2^24 weights.
"""

from __future__ import annotations

import gc
import os
import resource
import time
from pathlib import Path

import pytest
import torch

from sparse_training.samplers.importance import Importance
from sparse_training.samplers.score_table import ScoreTable
from sparse_training.training.checkpoint import load_checkpoint, save_checkpoint

ROWS = 100_000_000
BATCH = 4096
CALLS = 50
GIB = 1e9


def resident() -> float:
    """Bytes that this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


class Peak:
    """Most bytes held by the process, above what it held on entering."""

    def __enter__(self) -> Peak:
        gc.collect()
        self.before = resident()
        Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(self, *exception: object) -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        high = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        self.bytes = high - self.before


@pytest.mark.timeout(1200)
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc to read the peak of memory from")
@pytest.mark.parametrize("rows", [pytest.param(ROWS, id="history-100m")])
def test_history(interleaved, tmp_path, rows):
    generator = torch.Generator().manual_seed(0)
    with Peak() as peak:
        table = ScoreTable(rows)
        for begin in range(0, rows, 1_000_000):  # as training would, a part at a time
            part = torch.arange(begin, min(begin + 1_000_000, rows))
            table.update(part, torch.rand(len(part), generator=generator))
        law = Importance(table)
        law.first.position = rows
        law.draw(BATCH)
        save_checkpoint(tmp_path / "table.pt", {"table": table.state_dict(), "law": law.state_dict()})
        state = load_checkpoint(tmp_path / "table.pt")
        table.load_state_dict(state["table"])
        del state
    expected = law.draw(BATCH)
    other = Importance(table)
    other.load_state_dict({**law.state_dict(), "step": law.step - 1})
    assert torch.equal(other.draw(BATCH).index, expected.index)

    batches = [torch.randint(0, rows, (BATCH,), generator=generator) for _ in range(CALLS)]
    scores = torch.rand(BATCH, generator=generator)
    begin = time.perf_counter()
    for batch in batches:
        table.update(batch, scores)
    updates = CALLS * BATCH / (time.perf_counter() - begin)
    reads = iter(batches * 100)
    row = interleaved(
        lambda: law.draw(BATCH),
        {"one random read a draw": lambda: table.scores[next(reads)]},
        calls=CALLS,
        notes={"peak of memory, table, checkpoint and its return, GB": round(peak.bytes / GIB, 3)},
    )
    draws = BATCH / row.seconds["ours"]["p50"]
    row.notes |= {"draws a second": f"{draws:,.0f}", "updates a second": f"{updates:,.0f}", "rows a batch": BATCH}
    assert peak.bytes < 1.2 * GIB
