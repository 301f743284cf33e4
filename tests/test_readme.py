"""README and the pages beside it show only what the recorded results say, and their examples run."""

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import sparse_kernels as sk

ROOT = Path(__file__).parents[1]


def test_tables_are_those_of_the_recorded_results():
    command = [sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run: python benchmarks/readme.py"


def examples():
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_example_of_a_data_loader_runs():
    """An epoch is three tenths of the rows, and their losses have a gradient."""
    _, code = examples()
    torch.manual_seed(0)
    dataset = torch.utils.data.TensorDataset(torch.randn(1024, 20), torch.randint(0, 10, (1024,)))
    names = {
        "DataLoader": torch.utils.data.DataLoader,
        "dataset": dataset,
        "model": torch.nn.Linear(20, 10),
        "criterion": torch.nn.CrossEntropyLoss(reduction="none"),
    }
    exec(code, names)
    assert len(names["sampler"]) == pytest.approx(0.3 * 1024 / 128, abs=1)
    assert names["model"].weight.grad.abs().sum() > 0


def test_the_example_of_a_loop_runs():
    """As it is written there, in a loop around it: ten steps, and about a tenth of the rows after a while."""
    code, _ = examples()
    head, body = code.split("gate = Gate(rate=0.1)\n")
    torch.manual_seed(0)
    names = {"torch": torch, "F": F, "model": torch.nn.Linear(20, 10)}
    exec(head + "gate = Gate(rate=0.1)", names)
    for _ in range(30):
        names["inputs"], names["targets"] = torch.randn(256, 20), torch.randint(0, 10, (256,))
        exec(body, names)
        names["loss"].backward()
    assert 0 < names["inputs"].shape[0] < 60
    assert names["inputs"].shape[0] == names["targets"].shape[0]


def test_the_derivation_of_the_row_statistics():
    """Its merge of parts gives what the reference gives, wherever the row is cut."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "benchmarks" / "row_stats.md").read_text(), re.DOTALL)
    names = {"torch": torch}
    exec(code, names)
    torch.manual_seed(0)
    x, y, temperature = 4 * torch.randn(60, dtype=torch.float64), 17, 0.7
    c = 1 / (temperature * 0.6931471805599453)
    for cuts in ((60,), (20, 40), (1, 16, 1, 42), (30, 10, 20)):
        parts, begin = [], 0
        for size in cuts:
            at = y - begin if begin <= y < begin + size else None
            parts.append(names["part"](x[begin : begin + size], at, c))
            begin += size
        state = parts[0]
        for other in parts[1:]:
            state = names["merge"](state, other, c)
        m, second, rest, rest_t, rest_sq, sum_t, count = state
        t_y = (x[y] - m) * c
        e_y = t_y.exp2()
        total = rest + e_y
        found = {
            "loss": 0.9 * (total.log() - t_y / 1.4426950408889634)
            + 0.1 * (total.log() - sum_t / c / temperature / count),
            "entropy": total.log() - (rest_t + e_y * t_y) / 1.4426950408889634 / total,
            "sum_squares": (rest_sq + e_y**2) / total**2,
            "grad_norm": (rest_sq + rest**2).sqrt() / total,
            "max_prob": 1 / total,
            "margin": (1 - 2 ** (c * (second - m))) / total,
            "logsumexp": m / temperature + total.log(),
        }
        exact = sk.row_stats(
            x[None],
            torch.tensor([y]),
            outputs=sk.STATISTICS,
            temperature=temperature,
            label_smoothing=0.1,
            backend="torch",
        )
        for name, value in found.items():
            torch.testing.assert_close(value, getattr(exact, name)[0], rtol=1e-12, atol=1e-12, msg=f"{name} {cuts}")


def test_the_example_of_a_policy_runs_and_is_short():
    """As it is written in CONTRIBUTING: three tenths of each batch, by an early layer."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 30
    torch.manual_seed(0)
    dataset = torch.utils.data.TensorDataset(torch.randn(1000, 20), torch.randint(0, 10, (1000,)))
    model = torch.nn.Sequential(
        torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 30), torch.nn.ReLU(), torch.nn.Linear(30, 10)
    )
    names = {"model": model, "loader": torch.utils.data.DataLoader(dataset, batch_size=100)}
    exec(code, names)
    assert names["history"].steps == 30
    assert names["history"].rate == 0.3
    assert names["trainer"].scorer.name == "early"
    losses = torch.arange(100.0)
    scores = types.SimpleNamespace(losses=losses)
    assert sorted(names["Band"](rate=0.3).decide(scores).index.tolist()) == list(range(60, 90))
