"""The original's published settings run, its laws decide as described, and the page shows what was recorded."""

import json

import numpy as np
import original_page
import original_tables
import pytest
import torch
from baselines import Standalone, Sundew
from original_tables import SETTINGS, Method
from pages import ROOT

from sparse_training import build_model
from sparse_training.data.splits import ImageData, Split

RECORD = max((ROOT / "benchmarks" / "results").glob("original-*.json"))


@pytest.fixture
def data(monkeypatch):
    """Images of two classes, whatever data set is named."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(128) % 2
    images = torch.randint(0, 90, (128, 1, 8, 8), dtype=torch.uint8, generator=g)
    images[labels == 1, :, :4] += 120
    split = Split(images, labels)
    made = ImageData.from_splits("fashion-mnist", split, split, ("a", "b"), "made here")
    monkeypatch.setattr(original_tables, "load_data", lambda name, root: made)
    return made


def run(*arguments):
    threads = torch.get_num_threads()
    try:
        return original_tables.main([*arguments])
    finally:
        torch.set_num_threads(threads)


def test_the_published_models_have_the_published_sizes():
    sizes = {
        setting.model: sum(p.numel() for p in build_model(setting.model, shape=(3, 32, 32), classes=10).parameters())
        for setting in SETTINGS.values()
    }
    assert sizes == {"cnn-620k": 620_362, "cnn-2m": 2_193_226}


@pytest.mark.parametrize(("method", "least", "most"), [("dense", 1.0, 1.0), ("probe", 0.007, 0.01), ("coin", 0.0, 0.2)])
def test_a_line_of_a_table_runs_alone_and_its_record_goes_on(data, tmp_path, capsys, method, least, most):
    path = tmp_path / "record.json"
    common = ("--rows", "128", "--seeds", "1", "--setting", "3-epochs", "--record", str(path))
    assert run(*common, "--method", method) == 0
    runs = json.loads(path.read_text())["runs"]
    assert {(one["setting"], one["method"]) for one in runs} == {("3-epochs", method)}
    assert all(least <= one["trained"] / one["offered"] <= most for one in runs)
    assert all(one["offered"] == 3 * 128 for one in runs)
    capsys.readouterr()
    assert run(*common, "--method", method) == 0  # nothing is repeated
    assert capsys.readouterr().out == ""
    assert f"--method {method}" in original_page.table(json.loads(path.read_text()), "3-epochs")


def test_times_are_entered_beside_the_runs(data, tmp_path, monkeypatch):
    monkeypatch.setattr(original_tables, "TIMED_ROWS", 64)
    monkeypatch.setattr(original_tables, "ROUNDS", 2)
    path = tmp_path / "record.json"
    common = ("--rows", "128", "--seeds", "1", "--setting", "3-epochs", "--record", str(path))
    assert run(*common, "--method", "probe") == 0
    assert run(*common, "--method", "probe", "--times") == 0
    record = json.loads(path.read_text())
    assert {time["method"] for time in record["times"]} == {"probe", "dense"}
    (ratio,) = (time["ratio"] for time in record["times"] if time["method"] == "dense")
    assert ratio == 1.0
    assert len(record["runs"]) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "best"), "no such run"),
        (("--rows", "129"), "`rows` must be 1 to 128"),
        (("--rows", "64", "--record", "{record}"), "name a new file"),
    ],
)
def test_a_wrong_command_is_one_line(data, tmp_path, capsys, arguments, words):
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"format": "original-tables", "rows": 3}))
    assert run(*(argument.format(record=path) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert json.loads(path.read_text())["rows"] == 3


def test_the_standalone_gate_becomes_a_coin_of_a_tenth():
    """A tenth is kept below the threshold, which is more than the target, so the threshold runs to its clamp."""
    gate, random = Standalone(np.full((1, 1), 0.06)), np.random.default_rng(0)
    rates = [gate.decide(np.full(64, 0.4), random).mean() for _ in range(600)]
    assert gate.threshold.item() == 0.9
    assert np.mean(rates[-300:]) == pytest.approx(0.1, abs=0.01)


def test_the_sundew_gate_keeps_every_hundredth_row_whatever_it_is_worth():
    gate = Sundew(np.full((1, 1), 0.001))
    gate.threshold[:] = 0.92
    kept = gate.decide(np.zeros((300, 1, 1)))[:, 0, 0]
    assert list(np.flatnonzero(kept)) == [99, 199, 299]


def test_the_record_holds_every_published_setting_with_three_seeds():
    record = json.loads(RECORD.read_text())
    runs = {(one["setting"], Method(one["method"], one["rate"])) for one in record["runs"]}
    assert runs == {(name, method) for name, setting in SETTINGS.items() for method in setting.methods}
    assert {one["seed"] for one in record["runs"]} == {0, 1, 2}
    assert record["data"] in (ROOT / "docs" / "benchmarks" / "original.md").read_text().lower()
