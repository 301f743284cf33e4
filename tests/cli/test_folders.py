"""Folders of runs: extended, taken up after a kill, and refused in one line where a file in them is something else."""

import json
import os
import signal

import pytest
import torch
from short_calibration import short_calibration

from sparse_training.__main__ import main
from sparse_training.cli.display import Display
from sparse_training.experiments.store import Store

TRAIN = ["train", "--model", "test_folders:model", "--policy", "dense", "--batch-size", "256"]
STUDY = ["study", "--model", "test_folders:model", "--batch-size", "64", "--seconds", "0.05", "--tasks", "clean"]
STUDY += ["--methods", "dense,random", "--seeds", "1", "--evaluations", "1", "--rate", "0.5"]


def model(shape, classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short_calibration(monkeypatch)
    monkeypatch.setattr("sparse_training.experiments.study.LONGEST_CALIBRATION", 0.0)
    return tmp_path


def read(path):
    return json.loads(path.read_text())


def test_a_finished_run_is_extended_and_its_folder_says_so(here, capsys):
    assert main([*TRAIN, "--steps", "10", "--schedule", "constant", "--lr-warmup", "0", "--out", "part"]) == 0
    assert main([*TRAIN, "--steps", "20", "--schedule", "constant", "--lr-warmup", "0", "--out", "whole"]) == 0
    capsys.readouterr()
    assert main(["resume", "part", "--trust-code", "--steps", "20"]) == 0
    assert capsys.readouterr().err == ""
    part, whole = (torch.load(f"{name}/model.pt", weights_only=True) for name in ("part", "whole"))
    assert all(torch.equal(part[name], whole[name]) for name in whole)
    assert read(here / "part" / "options.json")["steps"] == 20
    assert read(here / "part" / "result.json")["run"]["steps"] == 20
    assert main([*TRAIN, "--steps", "5", "--out", "risen"]) == 0
    assert main(["resume", "risen", "--trust-code", "--steps", "7"]) == 0
    assert "warning: the run was extended from 5 to 7 steps: its beginning followed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--steps 5", "a larger budget of the run's kind extends it: it has --steps 10, got --steps 5"),
        ("--epochs 9", "it has --steps 10, got --epochs 9"),
        ("--steps 20 --epochs 9", "it has --steps 10, got --steps 20, --epochs 9"),
        ("--seconds nan", "seconds"),
    ],
)
def test_a_budget_that_does_not_extend_is_refused(here, capsys, given, message):
    assert main([*TRAIN, "--steps", "10", "--out", "out"]) == 0
    before = {name: (here / "out" / name).read_bytes() for name in os.listdir("out")}
    capsys.readouterr()
    assert main(["resume", "out", "--trust-code", *given.split()]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert {name: (here / "out" / name).read_bytes() for name in os.listdir("out")} == before


def test_a_study_that_was_killed_before_its_settings_were_written_is_taken_up(here, capsys, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(self):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_make", kill)
        with pytest.raises(Killed):
            main([*STUDY, "--out", "out"])
    assert os.listdir("out") == ["options.json"]
    assert main(["resume", "out", "--trust-code"]) == 0
    assert read(here / "out" / "study.json")["missing"] == 0
    # Whatever it is killed before, options.json is the first of its files.
    made = [os.path.getmtime(f"out/{name}") for name in ("settings.json", "calibration.json")]
    assert made == sorted(made)


@pytest.mark.parametrize("command", ["train", "compare", "study"])
def test_a_signal_while_the_clock_is_calibrated_ends_what_can_be_taken_up(here, capsys, monkeypatch, command):
    calibrating = Display.calibrating

    def signalled(self, fraction):
        calibrating(self, fraction)
        os.kill(os.getpid(), signal.SIGINT)

    arguments = {
        "train": [*TRAIN, "--seconds", "0.05"],
        "compare": ["compare", *STUDY[1:7], "--methods", "dense,random", "--seeds", "1", "--evaluations", "1"],
        "study": STUDY,
    }
    with monkeypatch.context() as patch:
        patch.setattr(Display, "calibrating", signalled)
        assert main([*arguments[command], "--out", "out"]) == 130
    said = capsys.readouterr()
    assert "calibrating the clock 0%\n" in said.err
    assert "calibrating the clock 25%" not in said.err
    assert said.err.endswith("stopped; to go on: sparse-train resume --trust-code out\n")
    assert os.listdir("out") == ["options.json"]
    assert main(["resume", "out", "--trust-code"]) == 0
    assert "calibrating the clock 100%" in capsys.readouterr().err


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A finished study, to be damaged in copies."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        short_calibration(patch)
        patch.setattr("sparse_training.experiments.study.LONGEST_CALIBRATION", 0.0)
        assert main([*STUDY, "--out", "out"]) == 0
    return folder / "out"


WRONG = ["[]", "{}", '{"a": 1}', "3", "null", '"x"', "", "[[[[", '{"shared": {}, "own": {}, "rounds": 1}']
WRONG += ['{"shared": {"load": 3, "train": 4}, "own": {}, "rounds": 1}', '{"own": [], "shared": [], "rounds": "x"}']


@pytest.mark.parametrize("name", ["options.json", "settings.json", "calibration.json", "runs/clean-random-1-0.json"])
@pytest.mark.parametrize("content", WRONG)
def test_a_file_of_something_else_is_one_line(here, study, capsys, name, content):
    (here / "out" / "runs").mkdir(parents=True)
    for path in [*study.glob("*.json"), *study.glob("runs/*")]:
        (here / "out" / path.relative_to(study)).write_bytes(path.read_bytes())
    (here / "out" / name).write_text(content)
    capsys.readouterr()
    assert main(["resume", "out", "--trust-code"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: out/") or said[-1].startswith("error: out was made with other settings")
    assert len(said) <= 2  # the number of runs to do, and the error
    assert name.split("/")[-1] in said[-1] or "settings" in said[-1]


@pytest.mark.parametrize("content", WRONG)
def test_the_report_of_a_run_that_is_none_is_one_line(here, capsys, content):
    (here / "out").mkdir()
    (here / "out" / "result.json").write_text(content)
    assert main(["report", "out"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: out/result.json ")
    assert said.count("\n") == 1
