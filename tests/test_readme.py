"""README and the pages beside it show only what the recorded results say, and their examples run."""

import re
import subprocess
import sys
import types

import pytest
import torch
from pages import ROOT, blocks, names

import sparse_kernels as sk
from sparse_training import HistorySampler, Indexed

README = ROOT / "README.md"
ROW_STATS = ROOT / "docs" / "design" / "row_stats.md"


@pytest.mark.parametrize("script", ["readme.py", "figure.py"])
def test_tables_and_figure_are_those_of_the_recorded_results(script):
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--check"]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stderr}\nrun: make tables"


def test_readme_is_short():
    """At most 800 words, a pitch of 60 to 90, and tables of at most six rows of results."""
    text = README.read_text()
    assert len(text.split()) <= 800
    pitch = text.split("\n\n")[1]
    assert 60 <= len(pitch.split()) <= 90
    for table in re.findall(r"<!-- summary.*?<!-- end -->", text, re.DOTALL):
        assert 1 <= len(re.findall(r"^\|", table, re.MULTILINE)) - 2 <= 6


def sides(diff):
    """The code before and after a diff."""
    lines = diff.splitlines()
    before = [line[1:] for line in lines if not line.startswith("+")]
    after = [line[1:] for line in lines if not line.startswith("-")]
    return "\n".join(before), "\n".join(after)


class Counted(torch.utils.data.Dataset):
    """A data set that counts how often each row is read."""

    def __init__(self, dataset):
        self.dataset, self.reads = dataset, [0] * len(dataset)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.reads[index] += 1
        return self.dataset[index]


def test_the_diff_of_a_loop_runs_on_both_sides():
    """Eight lines; before it eight epochs of every row, after it as many rows, each of them at least once."""
    (diff,) = blocks(README, "diff")
    assert len(diff.splitlines()) == 8
    for code in sides(diff):
        used = {**names(), "HistorySampler": HistorySampler, "Indexed": Indexed}
        used["dataset"] = Counted(used["dataset"])
        weight = used["model"][0].weight
        before = weight.detach().clone()
        exec(code, used)
        assert not torch.equal(weight, before)
        reads = used["dataset"].reads
        assert sum(reads) == 8 * len(reads)
        assert min(reads) >= (1 if "sampler" in used else 8)


def test_the_examples_run():
    for code in blocks(README):
        used = names()
        exec(code, used)
        if "trainer" in used:
            assert used["trainer"].policy.name == "infobatch"


def test_the_derivation_of_the_row_statistics():
    """Its merge of parts gives what the reference gives, wherever the row is cut."""
    (code,) = blocks(ROW_STATS)
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
    """As it is written in examples/: three tenths of each batch, by an early layer."""
    script = (ROOT / "examples" / "custom_policy.py").read_text()
    code = script.split("# [policy]\n")[1].split("# [/policy]")[0]
    assert len(code.strip().splitlines()) <= 30
    used = names(1000)
    used["loader"] = torch.utils.data.DataLoader(used["dataset"], batch_size=100)
    exec(f"from sparse_training import Policy, SparseTrainer\n{re.search('^from .*types.*$', script, re.M)[0]}", used)
    exec(code, used)
    exec("trainer = SparseTrainer(model, policy=Band(rate=0.3), scorer='early:2')", used)
    history = used["trainer"].fit(used["loader"], epochs=3)
    assert history.steps == 30
    assert history.rate == 0.3
    assert used["trainer"].scorer.name == "early"
    losses = torch.arange(100.0)
    scores = types.SimpleNamespace(losses=losses)
    assert sorted(used["Band"](rate=0.3).decide(scores).index.tolist()) == list(range(60, 90))
