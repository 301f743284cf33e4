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
import torch.nn.functional as F
from conftest import add_rows
from steps import scorer_row, timed_arms
from torch.utils.data import DataLoader, Dataset

from sparse_training.data.load import load_data
from sparse_training.data.resident import ResidentLoader
from sparse_training.errors import UserError
from sparse_training.models.build import build_model
from sparse_training.precision import scoring_dtype
from sparse_training.samplers.batch_sampler import HistorySampler, Indexed
from sparse_training.selection.registry import uses_rate
from sparse_training.trainer import SparseTrainer
from sparse_training.training.settings import TrainerSettings

BFLOAT16 = scoring_dtype("auto", torch.device("cpu")) is not None


@pytest.fixture
def data(small):
    try:
        return load_data("digits" if small else "fashion-mnist")
    except UserError as error:
        pytest.skip(str(error))


def network_for(data, model):
    torch.manual_seed(0)
    return build_model(model, shape=data.shape, classes=len(data.classes))


@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.keeps_freed_memory
@pytest.mark.parametrize(
    ("model", "batch", "layer"),
    [
        pytest.param("cnn-620k", 4096, "2", id="step-cnn-620k"),
        pytest.param("resnet", 1024, "3", id="step-resnet"),
        pytest.param("vit", 512, "1", id="step-vit"),
    ],
)
def test_step(benchmark, request, small, data, model, batch, layer):
    batch = 16 if small else batch
    network = network_for(data, model)
    amp = "bfloat16" if BFLOAT16 else None
    loader = ResidentLoader(data.train, batch_size=batch, mean=data.mean, std=data.std, drop_last=True)

    def make(policy, rate):
        used = rate if uses_rate(policy) else None
        return SparseTrainer(copy.deepcopy(network), policy=policy, rate=used, settings=TrainerSettings(amp=amp))

    scorers = ("self", f"early:{layer}", "proxy", "history")
    rounds = 1 if small else 5
    samples = benchmark.pedantic(lambda: timed_arms(make, loader, scorers, rounds=rounds), rounds=1)
    name = request.node.callspec.id
    rows = [scorer_row(f"{name}-{scorer.partition(':')[0]}", scorer, samples, batch) for scorer in scorers]
    add_rows(rows, request.config)


class Decoded(Dataset):
    """Images decoded one by one, as a loader of files does."""

    def __init__(self, data):
        self.split, self.mean, self.std = data.train, torch.tensor(data.mean), torch.tensor(data.std)

    def __len__(self):
        return len(self.split)

    def __getitem__(self, row):
        image = self.split.images[row].float() / 255
        return (image - self.mean[:, None, None]) / self.std[:, None, None], int(self.split.labels[row])


@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.keeps_freed_memory
@pytest.mark.parametrize("model", [pytest.param("cnn-620k", id="epoch-cnn-620k-history-at-10%")])
def test_epoch_by_history(interleaved, small, data, model):
    """An epoch of a plain DataLoader, decoding included: every row, or the tenth that is drawn by past losses."""
    network = network_for(data, model)
    rows, batch = Decoded(data), 16 if small else 512
    sampler = HistorySampler(rows, batch_size=batch, rate=0.1)
    generator = torch.Generator().manual_seed(0)
    sampler.update(torch.arange(len(rows)), -torch.rand(len(rows), generator=generator).log())  # the first pass is over
    by_history = DataLoader(Indexed(rows), batch_sampler=sampler)
    whole = DataLoader(Indexed(rows), batch_size=batch, shuffle=True)

    def epoch(loader, drawn):
        net = copy.deepcopy(network)
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)

        def run():
            for index, (inputs, targets) in loader:
                with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
                    logits = net(inputs)
                losses = F.cross_entropy(logits.float(), targets, reduction="none")
                loss = (losses * sampler.weights(index)).mean() if drawn else losses.mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if drawn:
                    sampler.update(index, losses)

        return run

    sides = {"dense": epoch(whole, False)}
    row = interleaved(epoch(by_history, True), sides, targets={"dense": 9.0}, rounds=2)
    row.notes |= {"batch": batch, "rows of a dense epoch": len(rows), "steps of ours": len(sampler)}
