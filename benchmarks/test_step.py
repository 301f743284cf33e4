"""A training step of a gate by each scorer, on real images, beside a dense one and beside its ceiling (steps.py).

Training is in bfloat16 where the processor multiplies it, for dense too: a speed-up over a slower dense step than need
be is none. Batches are as large as it takes for 10% of them to be work and not overhead: an AdamW step, the weights'
gradients and some hundred calls of PyTorch take 3 to 8 ms, whatever they work on. One thread: with two, a layer waits
for the later one, for few rows more often than for many, and the medians of two runs were a third apart.
"""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import _rows
from steps import scorer_row, timed_arms

from sparse_training.data import load_data
from sparse_training.errors import UserError
from sparse_training.loader import ResidentLoader
from sparse_training.models import build_model
from sparse_training.scoring import scoring_dtype
from sparse_training.trainer import SparseTrainer


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.timeout(1200)
@pytest.mark.keeps_freed_memory
@pytest.mark.parametrize(
    ("model", "batch", "layer"),
    [
        pytest.param("cnn-620k", 4096, "2", id="step-cnn-620k"),
        pytest.param("resnet", 1024, "3", id="step-resnet"),
        pytest.param("vit", 512, "1", id="step-vit"),
    ],
)
def test_step(benchmark, request, small, model, batch, layer):
    name, batch = ("digits", 16) if small else ("fashion-mnist", batch)
    try:
        data = load_data(name)
    except UserError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    network = build_model(model, shape=data.shape, classes=len(data.classes))
    amp = "bfloat16" if scoring_dtype("auto", torch.device("cpu")) else None
    loader = ResidentLoader(data.train, batch_size=batch, mean=data.mean, std=data.std, drop_last=True)

    def make(policy, rate):
        return SparseTrainer(copy.deepcopy(network), policy=policy, rate=rate, amp=amp)

    scorers = ("self", f"early:{layer}", "proxy", "history")
    rounds = 1 if small else 7
    samples = benchmark.pedantic(lambda: timed_arms(make, loader, scorers, rounds=rounds), rounds=1)
    for scorer in scorers:
        case = f"{request.node.callspec.id}-{scorer.partition(':')[0]}"
        _rows.append(scorer_row(case, scorer, samples, batch))
