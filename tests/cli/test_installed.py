"""The command as it is installed: a script in a process of its own, in a folder with the user's files."""

import csv
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(sys.executable).with_name("sparse-train")
MODEL = """
import torch
import layers_of_mine  # beside it, found as well


def net(shape, classes):
    return torch.nn.Sequential(torch.nn.Flatten(), layers_of_mine.linear(64, classes))
"""
RUN = ["train", "--model", "mine:net", "--policy", "dense", "--batch-size", "256", "--threads", "1"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MODEL)
    (tmp_path / "layers_of_mine.py").write_text("from torch.nn import Linear as linear\n")
    (tmp_path / "json.py").write_text("raise SystemExit('the standard library is not looked for here')\n")
    return tmp_path


def call(*arguments, **options):
    return subprocess.run([SCRIPT, *arguments], text=True, check=False, **{"capture_output": True, **options})


def whole(folder):
    assert {"checkpoint.pt", "model.pt", "options.json", "result.json"} <= set(os.listdir(folder))
    assert torch.load(Path(folder, "model.pt"), weights_only=True)
    return json.loads(Path(folder, "result.json").read_text())


def test_a_closed_pipe_and_a_full_disk_behind_standard_output_lose_nothing(here):
    reader, writer = os.pipe()
    os.close(reader)
    ran = call(*RUN, "--steps", "5", "--out", "pipe", stdout=writer, stderr=subprocess.PIPE, capture_output=False)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (0, "")
    with open("/dev/full", "w") as full:
        ran = call(*RUN, "--steps", "5", "--out", "full", stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert ran.returncode == 1
    assert ran.stderr == "error: standard output cannot be written: No space left on device\n"
    command = f"exec '{SCRIPT}' {' '.join(RUN)} --steps 5 --out closed >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 0
    results = [whole(name) for name in ("pipe", "full", "closed")]
    assert [result["run"]["steps"] for result in results] == [5, 5, 5]


def test_help_into_a_closed_pipe_is_no_traceback(here):
    reader, writer = os.pipe()
    os.close(reader)
    ran = call("--help", stdout=writer, stderr=subprocess.PIPE, capture_output=False)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_options_from_a_file_and_the_command_line_before_them(here):
    (here / "run.toml").write_text(
        'model = "mine:net"\nbatch-size = 128\nsteps = 12\nlr = 0.05\noptimizer = "sgd"\nmomentum = 0.5\n'
        "weight_decay = 1e-4\nlr-warmup = 0.5\ncsv = true\nvalidation = 0.25\nbest = true\npatience = 9\n"
        'monitor = "loss"\npolicy = "random"\nrate = 0.5\ncheckpoint-interval = 4\nkeep-last = 2\n'
        'evaluations = 4\naugment = "shift:1,flip"\n'
    )
    ran = call("train", "--config", "run.toml", "--steps", "8", "--seed", "3", "--out", "out")
    assert (ran.returncode, ran.stderr) == (0, "")
    result = whole("out")
    settings = result["settings"]
    assert {name: settings[name] for name in ("steps", "optimizer", "momentum", "lr_warmup", "rate", "csv")} == {
        "steps": 8, "optimizer": "sgd", "momentum": 0.5, "lr_warmup": 0.5, "rate": 0.5, "csv": True,
    }  # fmt: skip
    assert result["policy"] == "random"
    assert [point["step"] for point in result["run"]["evals"]] == [2, 4, 6, 8]
    with open("out/log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "4", "6", "8"]
    rates = [float(row["train/learning_rate"]) for row in rows]
    assert rates[0] < rates[1] < 0.05  # the first half of the run is the rise
    assert {"best.pt", "checkpoint-4.pt", "checkpoint-8.pt"} <= set(os.listdir("out"))
    best = min(result["run"]["evals"], key=lambda point: point["loss"])
    weights = [torch.load(f"out/{name}.pt", weights_only=True) for name in ("best", "model")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    _, said, *_ = ran.stdout.splitlines()
    assert said.startswith(f"random seed 3: test accuracy {result['test']['accuracy']:.2%}, loss ")
    assert best["loss"] > 0
    # The report of the folder says the same, with a row for each evaluation.
    told = call("report", "out").stdout
    assert told.startswith(said)
    assert "evaluations on 25% of the training rows:" in told
    assert f"{best['loss']:.4f}" in told


def test_a_signal_while_the_clock_is_calibrated_ends_the_run_and_it_can_be_taken_up(here):
    with subprocess.Popen(
        [SCRIPT, *RUN, "--seconds", "30", "--out", "out"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr.readline() == "calibrating the clock 0%\n"
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait() == 130
    assert rest.splitlines()[-1] == "stopped; to go on: sparse-train resume --trust-code out"
    assert "100%" not in rest
    assert os.listdir("out") == ["options.json"]


def hangs_up(command, folder):
    """Run a command in a terminal of its own, close it once the first checkpoint is there, and return the exit code."""
    process, terminal = pty.fork()
    if process == 0:
        os.execvp(command[0], command)
    end = time.monotonic() + 60.0
    while not Path(folder, "checkpoint.pt").exists():
        assert time.monotonic() < end, os.read(terminal, 4096)
        time.sleep(0.02)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


LONG = [*RUN, "--steps", "400", "--checkpoint-interval", "20"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what closing a terminal sends differs")
def test_a_terminal_that_is_closed_ends_a_run_and_it_can_be_taken_up(here):
    assert hangs_up([SCRIPT, *LONG, "--out", "out"], "out") == 129
    assert sorted(os.listdir("out")) == ["checkpoint.pt", "checkpoint.pt.prev", "options.json"]
    assert call("resume", "--trust-code", "out").returncode == 0
    assert call(*LONG, "--out", "at-once").returncode == 0
    resumed, at_once = (torch.load(f"{name}/model.pt", weights_only=True) for name in ("out", "at-once"))
    assert all(torch.equal(resumed[name], at_once[name]) for name in at_once)
    assert whole("out")["run"]["steps"] == 400


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what closing a terminal sends differs")
def test_under_nohup_a_run_goes_on_without_its_terminal(here):
    assert hangs_up(["nohup", SCRIPT, *LONG, "--out", "out"], "out") == 0
    assert whole("out")["run"]["steps"] == 400


def test_bytes_that_are_no_utf8_are_refused_before_anything_is_written(here):
    before = sorted(os.listdir())
    ran = call(*RUN, "--steps", "5", "--out", b"runs-\xff")
    assert ran.returncode == 2
    assert ran.stderr == f"error: argument {len(RUN) + 4} must be UTF-8, got b'runs-\\xff'\n"
    assert sorted(os.listdir()) == before
