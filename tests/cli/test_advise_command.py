"""``sparse-train advise``: on options, on a script of the user's, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_training.cli.main import main
from sparse_training.profiling import advise_steps

SCRIPT = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def make():
    torch.manual_seed(0)
    rows = TensorDataset(torch.randn(200, 6), torch.randint(0, 3, (200,)))
    return nn.Linear(6, 3), DataLoader(rows, batch_size=20, shuffle=True), nn.CrossEntropyLoss(reduction="none")


def pair():
    return make()[:2]


def nothing():
    return None


number = 3
"""
PROGRAM = Path(sys.executable).with_name("sparse-train")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("mine", "missing", "broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    Path("mine.py").write_text(SCRIPT)
    Path("broken.py").write_text("import no_such_package")
    return tmp_path


def test_a_table_is_printed_and_nothing_is_written(here, capsys):
    assert main(["advise", "--model", "cnn-tiny", "--batch-size", "256", "--steps", "6"]) == 0
    printed = capsys.readouterr()
    assert "or  sparse-train train --model cnn-tiny --batch-size 256 --policy " in printed.out
    for part in ("A step on 256 rows takes", "backward", "infobatch", "SparseTrainer(model, ", "effective"):
        assert part in printed.out
    assert printed.err == ""
    assert {path.name for path in here.iterdir()} == {"mine.py", "broken.py"}


def test_a_page_and_a_record_are_written_where_they_are_asked_for(here, capsys):
    assert main(["advise", "--script", "mine:make", "--steps", "8", "--out", "said"]) == 0
    record = json.loads(Path("said/advice.json").read_text())
    page = Path("said/report.html").read_text()
    assert record["batch_size"] == 20
    assert record["code"] == f'SparseTrainer(model, loss=loss, policy="{record["method"]}").fit(loader, epochs=10)'
    assert record["recommendation"] in capsys.readouterr().out.replace("\n", " ")
    for part in (record["recommendation"], "infobatch", "<svg", "Noise: mean square", "rows that are exact copies"):
        assert part in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert main(["advise", "--steps", "8", "--out", "said"]) == 2  # before anything is measured
    assert "exists and is not empty" in capsys.readouterr().err


def test_the_installed_program_finds_a_script_in_the_current_folder(here):
    done = subprocess.run(
        [str(PROGRAM), "advise", "--script", "mine:make", "--steps", "6"],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "A step on 20 rows takes" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--script mine", "--script must be module:make, such as train:make, got 'mine'"),
        ("--script mine:", "--script must be module:make"),
        ("--script missing:make", "--script missing:make: cannot import missing: No module named 'missing'"),
        ("--script broken:make", "--script broken:make: cannot import broken: No module named 'no_such_package'"),
        ("--script mine:made", "--script mine:made: module mine must have a function made, got none"),
        ("--script mine:number", "--script mine:number: module mine must have a function number, got int"),
        ("--script mine:pair", "--script mine:pair: must return (model, loader, loss), got 2 values"),
        ("--script mine:nothing", "--script mine:nothing: must return (model, loader, loss), got NoneType"),
        ("--script mine:make --model vit --batch-size 3", "--script says what to train; give no --model, --batch-size"),
        ("--steps 2", "`steps` must be an integer of at least 6, got 2"),
        ("--seconds 0", "'--seconds'"),
        ("--epochs nan", "'--epochs': nan is not finite"),
        ("--device nonsense", "device 'nonsense' cannot be used"),
        ("--data imagefolder", "imagefolder"),
        ("--batch-size 5000", "`batch_size` must be 1 to 1437"),
    ],
)
def test_a_wrong_request_is_one_line(here, capsys, arguments, message):
    assert main(["advise", *arguments.split()]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_a_signal_ends_the_measurement(here, monkeypatch, capsys):
    def interrupt(self):
        signal.raise_signal(signal.SIGINT)
        return 0.0

    monkeypatch.setattr(advise_steps.Limit, "spent", interrupt)
    assert main(["advise", "--script", "mine:make", "--out", "said"]) == 130
    assert not Path("said").exists()
    assert capsys.readouterr().out == ""
