"""Checkpoints of version 0.1.0 resume to the weights, counts and seconds that 0.1.0 itself reaches."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from trainers import make_trainer

from sparse_training.data.resident import ResidentLoader
from sparse_training.errors import UserError

FOLDER = Path(__file__).parents[1] / "data" / "checkpoints-0.1.0"
RUNS = {
    "adaptive": {"policy": "adaptive+denoise+deduplicate+balance", "accumulate": 2, "ema": 0.9},
    "gate": {"policy": "gate"},
    "gate-early": {"policy": "gate@early:1"},
    "gate-history": {"policy": "gate@history"},
    "importance": {"policy": "importance"},
    "importance-self": {"policy": "importance@self"},
    "infobatch": {"policy": "infobatch", "clip_norm": 1.0},
    "infobatch-self": {"policy": "infobatch@self"},
    "masked": {"policy": "masked"},
    "random": {"policy": "random"},
    "tokens": {"policy": "gate", "granularity": "token"},
    "within": {"policy": "gate"},
}


def load_task():
    spec = importlib.util.spec_from_file_location("checkpoints_task", FOLDER / "task.py")
    task = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(task)
    return task


def resume(task, name, folder, **changes):
    torch.manual_seed(123)  # weights and generators are the checkpoint's
    model = task.build_model(tokens=name == "tokens")
    loader = task.token_batches() if name == "tokens" else ResidentLoader(task.data(), **task.BATCHES)
    options = {**task.SETTINGS, **RUNS[name], **changes}
    trainer = make_trainer(model, dense_start=0.1, dense_end=0.125, scoring_precision="float32", **options)
    cost_budget = (task.FLOPS, "flops") if name == "within" else None
    log = trainer.fit(loader, steps=task.STEPS, checkpoint=folder, resume=True, cost_budget=cost_budget)
    return model, log


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_the_former_version_is_continued(name, tmp_path):
    shutil.copytree(FOLDER / name, tmp_path / "run")
    end = torch.load(FOLDER / name / "end.pt", weights_only=True)
    model, log = resume(load_task(), name, tmp_path / "run")
    assert (log.steps, int(log.rows_seen), int(log.kept)) == (end["steps"], end["rows_seen"], end["kept"])
    assert log.operations == end["operations"]
    if end["seconds"] is not None:
        assert log.seconds == pytest.approx(end["seconds"], rel=1e-12)
    # Bit for bit on the machine that wrote them; others add up products in another order.
    torch.testing.assert_close(model.state_dict(), end["weights"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy": "random"}, "policy gate is now random"),
        ({"rate": 0.5}, "rate 0.4 is now 0.5"),
        ({"clip_norm": 2.0}, r"clip_norm None is now 2\.0"),
    ],
)
def test_a_run_of_the_former_version_with_other_settings_is_refused(changes, words, tmp_path):
    shutil.copytree(FOLDER / "gate", tmp_path / "run")
    with pytest.raises(UserError, match=words):
        resume(load_task(), "gate", tmp_path / "run", **changes)
