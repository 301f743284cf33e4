"""The public names at work, quickly: what must run with every PyTorch that the package claims to support."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sparse_kernels
from sparse_training import Gate, HistorySampler, Indexed, SparseTrainer
from sparse_training.data import load_data

CLASSES = 10


def digits(part: str = "train") -> TensorDataset:
    split = getattr(load_data("digits"), part)
    return TensorDataset(split.images.float() / 255, split.labels)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def batches(part: str = "train") -> DataLoader[tuple[torch.Tensor, ...]]:
    return DataLoader(digits(part), batch_size=64, shuffle=part == "train")


def test_the_trainer_learns_the_digits_whatever_the_policy() -> None:
    for policy in (None, "random", "gate"):
        trainer = SparseTrainer(network(), policy=policy, rate=0.5 if policy else None, lr=1e-2)
        before = trainer.evaluate(batches("test"))
        trainer.fit(batches(), epochs=3)
        after = trainer.evaluate(batches("test"))
        assert after["accuracy"] > 0.7 > 0.3 > before["accuracy"], policy
        assert after["loss"] < before["loss"], policy


def test_a_gate_selects_rows_in_a_loop_of_ones_own() -> None:
    model, gate = network(), Gate(rate=0.3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    kept = rows = 0
    first = last = 0.0
    for _ in range(4):
        for inputs, targets in batches():
            with torch.no_grad():
                selection = gate(model(inputs), targets)
            few, labels = selection.take((inputs, targets))
            loss = F.cross_entropy(model(few), labels) if len(labels) else 0 * model(inputs).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            kept, rows = kept + len(labels), rows + len(targets)
        with torch.no_grad():
            last = F.cross_entropy(model(digits().tensors[0]), digits().tensors[1]).item()
        first = first or last
    assert last < first
    assert 0.2 < kept / rows < 0.5


def test_a_history_sampler_draws_a_data_loaders_batches() -> None:
    data, model = digits(), network()
    sampler = HistorySampler(len(data), batch_size=64, rate=0.3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    seen = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        seen.append(0)
        for index, (inputs, targets) in DataLoader(Indexed(data), batch_sampler=sampler):
            losses = F.cross_entropy(model(inputs), targets, reduction="none")
            optimizer.zero_grad()
            (losses * sampler.weights(index)).mean().backward()
            optimizer.step()
            sampler.update(index, losses.detach())
            seen[-1] += len(index)
    assert 0 < seen[-1] < 0.5 * len(data)


def test_row_stats_compile_into_one_graph_with_their_gradient() -> None:
    def objective(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        stats = sparse_kernels.row_stats(logits, targets, outputs=["loss", "entropy"], temperature=0.7)
        return (stats.loss + 0.1 * stats.entropy).sum()

    logits, targets = torch.randn(30, CLASSES), torch.randint(0, CLASSES, (30,))
    found = []
    for function in (objective, torch.compile(objective, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        value = function(leaf, targets)
        found.append((value.detach(), *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(found[1], found[0])
