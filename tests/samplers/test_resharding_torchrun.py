"""A run of two processes under torchrun that goes on with three, and with one."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import fresh
import pytest
import torch
import torch.distributed as dist

pytest.importorskip("PIL")
pytestmark = [
    pytest.mark.slow,  # four starts of torchrun
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="a PyTorch without torch.distributed and gloo"
    ),
]
ROOT = Path(__file__).parents[2]


def start(ranks: int, run: Path, epochs: int) -> list[str]:
    places = os.pathsep.join([str(ROOT), str(ROOT / "python_api"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": places.rstrip(os.pathsep), "OMP_NUM_THREADS": "1"}
    done = fresh.run(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
        str(ROOT / "examples/image_folder.py"), "--folder", str(run), "--epochs", str(epochs),
        cwd=run.parent, environment=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return sorted(re.findall(r"rank .*|epochs .*", done.stdout))


def scores(folder: Path, ranks: int) -> torch.Tensor:
    whole = torch.empty(240)
    for rank in range(ranks):
        whole[rank::ranks] = torch.load(folder / f"sampler-{rank}.pt")["table"]["scores"]
    return whole


def test_the_table_of_two_processes_is_dealt_out_to_three_and_to_one(tmp_path: Path) -> None:
    first = start(2, tmp_path / "run", epochs=2)
    assert first[1:] == [f"rank {rank} of 2: 80 of 120 rows have a score, 0 images unreadable" for rank in range(2)]
    before = scores(tmp_path / "run/epoch-001", 2)
    for ranks in (1, 3):
        run = tmp_path / f"run-{ranks}"
        shutil.copytree(tmp_path / "run", run)
        found = start(ranks, run, epochs=3)
        assert found[0].startswith("epochs 2 to 2, last loss ")
        after = scores(run / "epoch-002", ranks)
        # Ranks of three had not equally many rows without a score; those of one rank more than an epoch has come next.
        assert int(after.isnan().sum()) <= (0 if ranks == 1 else 10)
        kept = (after == before)[~before.isnan()]
        assert int(kept.sum()) >= (160 if ranks == 1 else 150), "rows that were not drawn keep other processes' scores"
