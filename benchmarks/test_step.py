"""A training step at a rate of 10%, scoring with the model, beside its ceiling.

A dense step costs about three forward passes. Scoring with the whole model's own forward costs one of
them, s where it is cheaper or dearer than a third of the dense step, so at rate r no gate can be faster than
3/(s+3r). What is lost to small batches, packing and control is the distance from there.
"""

from __future__ import annotations

import pytest
import torch
from conftest import Row, _rows

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
def test_step(benchmark, request, data_name, model, batch):
    try:
        data = load_data(data_name)
    except UserError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    network = build_model(model, shape=data.shape, classes=len(data.classes))
    trainer = SparseTrainer(network, policy="gate", rate=RATE)
    loader = ResidentLoader(data.train, batch_size=batch, mean=data.mean, std=data.std, drop_last=True)
    arms = {"gate": trainer.policy, "random": make_policy("random", rate=RATE, seed=0)}
    costs = benchmark.pedantic(lambda: calibrate(trainer, loader, arms, rounds=7), rounds=1)
    kept = round(RATE * batch)
    dense = costs.step("dense", batch, batch)
    gate, random = costs.step("gate", batch, kept), costs.step("random", kept, kept)
    s = 3.0 * gate["score"] / dense["train"]
    ceilings = {"own_ceiling": 3.0 / (s + 3.0 * RATE), "ceiling": 3.0 / (1.0 + 3.0 * RATE)}
    reached = dense["total"] / gate["total"]
    row = Row(
        request.node.callspec.id,
        {name: {"p50": cost["total"]} for name, cost in (("ours", gate), ("dense", dense), ("random", random))},
        {"dense": reached, "share of own ceiling": reached / ceilings["own_ceiling"]},
        {"share of own ceiling": 0.85},
        {
            "scorer cost s, forwards": round(s, 3),
            **{name: round(value, 3) for name, value in ceilings.items()},
            "stages, ms": {name: round(1e3 * value, 3) for name, value in gate.items()},
        },
    )
    _rows.append(row)
