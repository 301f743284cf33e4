"""Writes this folder's checkpoints; runs with version 0.1.0 of the package and no other.

Each run is stopped after step 13 of 24, which leaves ``checkpoint.pt``; a copy of it then runs to the end, and
``end.pt`` keeps its weights, counts and seconds. The run "random" has a calibrated clock.
"""

import shutil
import sys
from pathlib import Path

import torch
from sparse_training.clock import Clock, Costs
from sparse_training.loader import ResidentLoader
from task import BATCHES, FLOPS, SETTINGS, STEPS, STOPPED_AT, build_model, data, token_batches

from sparse_training.trainer import SparseTrainer

HERE = Path(__file__).parent
RUNS = {
    "adaptive": {"policy": "adaptive", "accumulate": 2, "ema": 0.9},
    "gate": {"policy": "gate"},
    "gate-early": {"policy": "gate@early:1"},
    "gate-history": {"policy": "gate@history"},
    "importance": {"policy": "importance"},
    "importance-self": {"policy": "importance@self"},
    "infobatch": {"policy": "infobatch", "clip_norm": 1.0},
    "infobatch-self": {"policy": "infobatch@self"},
    "masked": {"policy": "masked"},
    "random": {"policy": "random"},
    "tokens": {"policy": "gate", "rows": "elements"},
    "within": {"policy": "gate"},
}


def run(name, folder, resume=False):
    torch.manual_seed(0)
    model = build_model(tokens=name == "tokens")
    loader = token_batches() if name == "tokens" else ResidentLoader(data(), **BATCHES)
    options = {}
    if name == "within":
        options["within"] = (FLOPS, "flops")
    if name == "random":
        own = {"score": ((1,), (0.0,)), "select": ((1, 8), (0.01, 0.02))}
        shared = {"load": ((1, 8), (0.1, 0.3)), "train": ((1, 8), (1.0, 4.0))}
        options["clock"] = Clock(Costs(shared, {"dense": own, "random": own}, 1))
    trainer = SparseTrainer(model, warmup=0.1, anneal=0.125, precision="float32", **SETTINGS, **RUNS[name])
    steps = iter(range(1, STEPS + 1))
    log = trainer.fit(
        loader, steps=STEPS, checkpoint=folder, resume=resume,
        stop=None if resume else lambda: next(steps) == STOPPED_AT, **options,
    )  # fmt: skip
    counts = {"steps": log.steps, "rows_seen": int(log.rows_seen), "kept": int(log.kept)}
    seconds = log.seconds if name == "random" else None
    return {"weights": model.state_dict(), "operations": log.operations, "seconds": seconds, **counts}


if __name__ == "__main__":
    for name in sys.argv[1:] or RUNS:
        run(name, HERE / name)
        (HERE / name / "checkpoint.pt.prev").unlink(missing_ok=True)
        scratch = HERE / name / "scratch"
        shutil.copytree(HERE / name, scratch)
        torch.save(run(name, scratch, resume=True), HERE / name / "end.pt")
        shutil.rmtree(scratch)
