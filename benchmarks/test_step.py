"""A training step at a rate of 10%, scoring with the model, beside its ceiling (steps.py)."""

from __future__ import annotations

import pytest
import torch
from conftest import _rows
from steps import step_row

from sparse_training.clock import calibrate
from sparse_training.data import load_data
from sparse_training.errors import UserError
from sparse_training.loader import ResidentLoader
from sparse_training.models import build_model
from sparse_training.policies import make_policy
from sparse_training.trainer import SparseTrainer

RATE = 0.1


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("data_name", "model", "batch"),
    [
        pytest.param("fashion-mnist", "cnn-620k", 512, id="step-cnn-620k-fashion-mnist-512"),
        pytest.param("fashion-mnist", "resnet", 512, id="step-resnet-fashion-mnist-512"),
    ],
)
def test_step(benchmark, request, small, data_name, model, batch):
    if small:
        data_name, batch = "digits", 8
    try:
        data = load_data(data_name)
    except UserError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    network = build_model(model, shape=data.shape, classes=len(data.classes))
    trainer = SparseTrainer(network, policy="gate", rate=RATE)
    loader = ResidentLoader(data.train, batch_size=batch, mean=data.mean, std=data.std, drop_last=True)
    arms = {"gate": trainer.policy, "random": make_policy("random", rate=RATE, seed=0)}
    costs = benchmark.pedantic(lambda: calibrate(trainer, loader, arms, rounds=1 if small else 7), rounds=1)
    _rows.append(step_row(request.node.callspec.id, costs, batch, RATE, 0.85))
