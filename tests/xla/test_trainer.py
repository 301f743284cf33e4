"""The trainer on an XLA device: digits, one program a step, and the CPU's results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch_xla
from test_xla import compilations, on_host
from torch import nn
from torch_xla.debug import metrics
from trainers import make_trainer

from sparse_training import Gate
from sparse_training.data.load import load_data
from sparse_training.data.resident import ResidentLoader

DATA = load_data("digits", None)
FACTS = {"mean": DATA.mean, "std": DATA.std}
PLAIN = {"dense_start": 0, "dense_end": 0, "schedule": "constant", "lr": 3e-3}


def network():
    torch.manual_seed(0)
    flat = DATA.shape[0] * DATA.shape[1] * DATA.shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(flat, 64), nn.ReLU(), nn.Linear(64, len(DATA.classes)))


def train(device, policy, steps, watch=lambda status: None, **options):
    model = network()
    trainer = make_trainer(model, policy=policy, device=device, **{**PLAIN, **options})
    loader = ResidentLoader(DATA.train, batch_size=128, drop_last=True, device=trainer.device, **FACTS)
    test = ResidentLoader(DATA.test, batch_size=100, shuffle=False, device=trainer.device, **FACTS)
    history = trainer.fit(loader, steps=steps, progress=watch)
    return trainer, history, trainer.evaluate(test)


@pytest.mark.parametrize("policy", ["gate", "random", "dense"])
def test_digits_are_trained_in_one_program_and_as_on_the_cpu(policy):
    counts, thresholds = [], []

    def watch(status):
        counts.append(compilations())
        if policy == "gate":
            thresholds.append(status.policy.gate.threshold.clone())

    metrics.clear_all()
    trainer, history, found = train("xla", policy, 100, watch, rate=0.25)
    assert trainer.device.type == "xla"
    assert {tensor.device.type for tensor in trainer.model.state_dict().values()} == {"xla"}
    assert counts[0] >= 1
    assert counts[1:] == [counts[1]] * 99
    assert [name for name in on_host() if "_local_scalar_dense" not in name] == []  # evaluation reads its sums
    if policy == "gate":
        assert len({float(threshold) for threshold in thresholds}) > 50
        policy = Gate(rate=0.25, capacity=trainer.policy.gate.capacity)  # the CPU's would have none
    _, plain, wanted = train("cpu", policy, 100, rate=0.25)
    assert int(history.rows_trained) == pytest.approx(int(plain.rows_trained), rel=0.02)
    assert found["accuracy"] == pytest.approx(wanted["accuracy"], abs=0.03)
    assert found["accuracy"] > 0.8


def test_steps_move_the_weights_as_on_the_cpu():
    """A few steps, for later ones amplify rounding: a row within rounding of the threshold may fall on either side."""
    found = []
    for device in ("xla", "cpu"):
        gate = Gate(rate=0.25, capacity=64, threshold=1.0)
        trainer, *_ = train(device, gate, 3, optimizer=torch.optim.SGD)
        found.append({name: value.cpu() for name, value in trainer.model.state_dict().items()})
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-5)


def test_a_step_without_a_row_is_undone_on_the_device():
    for threshold in (1e9, 1.0):
        gate = Gate(rate=0.25, capacity=64, threshold=threshold)
        gate.controller.counters[0] = 1  # not a start
        trainer, *_ = train("xla", gate, 1)
        fresh = network().state_dict()
        same = all(torch.equal(value.cpu(), fresh[name]) for name, value in trainer.model.state_dict().items())
        assert same == (threshold == 1e9)
        assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {0 if same else 1}


def test_a_run_resumes_exactly(tmp_path):
    def run(folder, stop):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Dropout(0.2), network())
        trainer = make_trainer(model, device="xla", policy="gate", rate=0.25, **PLAIN)
        torch_xla.manual_seed(3)
        loader = ResidentLoader(DATA.train, batch_size=128, device=trainer.device, **FACTS)
        steps = iter(range(1, 100))
        trainer.fit(loader, steps=12, checkpoint=folder, resume=True, stop=lambda: next(steps) == stop)
        state = (*trainer.model.state_dict().values(), *trainer.policy.gate.state_dict().values())
        return [value.cpu() for value in state]

    whole = run(tmp_path / "whole", None)
    run(tmp_path / "parts", 5)
    for value, wanted in zip(run(tmp_path / "parts", None), whole, strict=True):
        assert torch.equal(value.nan_to_num(), wanted.nan_to_num())


def command(*arguments: str) -> str:
    line = [sys.executable, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_line_trains_there(tmp_path: Path) -> None:
    said = command(
        "-m", "sparse_training", "train", "--data", "digits", "--device", "xla", "--steps", "6", "--rate", "0.25",
        "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert "accuracy" in said
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_torch_xla_is_imported_for_an_xla_device_alone() -> None:
    said = command("-c", (
        "import sys, torch, sparse_kernels, sparse_training, sparse_training.cli\n"
        "from sparse_training import Gate, SparseTrainer\n"
        "trainer = SparseTrainer(torch.nn.Linear(4, 2), dense_start=0, dense_end=0)\n"
        "trainer.fit([(torch.randn(8, 4), torch.zeros(8).long())], steps=2)\n"
        "print('torch_xla' in sys.modules)\n"
        "SparseTrainer(torch.nn.Linear(4, 2), device='xla')\n"
        "print('torch_xla' in sys.modules)\n"
    ))  # fmt: skip
    assert said.split() == ["False", "True"]
