"""The command line: what it writes, what it refuses, and how it ends."""

import json
import os
import signal
import subprocess
import sys

import fresh
import pytest
import torch
from short_calibration import short_calibration

from sparse_training.__main__ import main
from sparse_training.cli import main as cli
from sparse_training.cli.display import Display, StudyDisplay

SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
TRAIN = ["train", "--batch-size", "256", "--model", "test_cli:model"]


def model(shape, classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.2), torch.nn.Linear(64, classes))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("policy", ["dense", "random", "gate", "importance", "infobatch"])
def test_train_writes_a_model_a_result_and_a_checkpoint(here, capsys, policy):
    assert main([*TRAIN, "--epochs", "20", "--lr", "0.02", "--policy", policy, "--out", "out"]) == 0
    assert sorted(os.listdir("out")) == ["checkpoint.pt", "model.pt", "options.json", "result.json"]
    run = read(here / "out" / "result.json")["run"]
    assert run["steps"] == 20 * 6
    assert run["evals"][-1]["accuracy"] > 0.6
    assert set(torch.load("out/model.pt", weights_only=True)) == {"2.weight", "2.bias"}
    out = capsys.readouterr().out
    test = read(here / "out" / "result.json")["test"]["accuracy"]
    assert f"{policy} seed 0: test accuracy {test:.2%}, loss " in out
    assert " after 120 steps, " in out
    assert f"{run['flops']['counted']:.3g} FLOPs counted, " in out
    assert run["flops"]["counted"] > 0


def test_tensorboard_reads_back_what_a_run_said(here):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ["--steps", "120", "--policy", "gate", "--rate", "0.3", "--tensorboard", "--out", "out"]
    assert main([*TRAIN, *options]) == 0
    events = EventAccumulator("out/tensorboard").Reload()
    assert set(events.Tags()["scalars"]) == {
        *("eval/accuracy", "eval/loss", "gate/rate", "gate/threshold", "clock/seconds"),
        *("train/learning_rate", "train/loss", "train/epoch"),
    }
    run = read(here / "out" / "result.json")["run"]
    for kind in ("accuracy", "loss"):
        written = [(event.step, event.value) for event in events.Scalars(f"eval/{kind}")]
        assert [step for step, _ in written] == [point["step"] for point in run["evals"]]
        assert [value for _, value in written] == pytest.approx([point[kind] for point in run["evals"]])
    steps = [event.step for event in events.Scalars("train/learning_rate")]
    assert set(steps) == {50, 100, *(point["step"] for point in run["evals"])}
    rates = [event.value for event in events.Scalars("train/learning_rate")]
    assert max(rates) <= 1e-3
    assert rates[1:] == sorted(rates[1:], reverse=True)
    losses = [event.value for event in events.Scalars("train/loss")]
    assert 0.0 < losses[-1] < losses[0]
    assert events.Scalars("gate/rate")[0].value == pytest.approx(0.3, abs=0.1)


def test_a_run_without_a_name_goes_under_runs(here):
    assert main([*TRAIN, "--steps", "1"]) == 0
    (folder,) = (here / "runs").iterdir()
    assert folder.name.endswith("-train")


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_ends_a_run_which_resume_completes_bit_for_bit(here, capsys, monkeypatch, number, code):
    arguments = [*TRAIN, "--steps", "25", "--policy", "gate", "--rate", "0.3"]
    assert main([*arguments, "--out", "whole"]) == 0
    update = Display.update

    def signalled(self, method, seed, status):
        update(self, method, seed, status)
        if status.step == 11:
            os.kill(os.getpid(), number)

    handlers = [signal.getsignal(kind) for kind, _ in SIGNALS]
    with monkeypatch.context() as patch:
        patch.setattr(Display, "update", signalled)
        assert main([*arguments, "--out", "part"]) == code
    assert [signal.getsignal(kind) for kind, _ in SIGNALS] == handlers
    assert "sparse-train resume --trust-code part" in capsys.readouterr().err
    assert sorted(os.listdir("part")) == ["checkpoint.pt", "options.json"]
    assert main(["resume", "--trust-code", "part"]) == 0
    whole, part = (torch.load(f"{name}/model.pt", weights_only=True) for name in ("whole", "part"))
    assert all(torch.equal(whole[name], part[name]) for name in whole)


def test_a_hangup_that_comes_twice_still_ends_at_a_step(here, monkeypatch):
    """When a terminal is closed, the shell sends one and the kernel another."""
    update = Display.update

    def signalled(self, method, seed, status):
        update(self, method, seed, status)
        if status.step == 3:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)

    with monkeypatch.context() as patch:
        patch.setattr(Display, "update", signalled)
        assert main([*TRAIN, "--steps", "9", "--out", "part"]) == 129
    assert "checkpoint.pt" in os.listdir("part")


def test_compare_writes_a_report_that_can_be_drawn_again(here, capsys, monkeypatch):
    arguments = ["compare", "--model", "test_cli:model", "--batch-size", "256", "--seconds", "0.05", "--seeds", "0,4"]
    short_calibration(monkeypatch)
    assert main([*arguments, "--out", "out"]) == 0
    out = capsys.readouterr().out
    assert "dense" in out
    assert "written: " in out
    result = read(here / "out" / "compare.json")
    assert result["settings"]["seeds"] == [0, 4]
    assert result["command"] == "sparse-train " + " ".join([*arguments, "--out", "out"])
    for name in ("report.html", "compare.png"):
        (here / "out" / name).unlink()
    assert main(["report", "out"]) == 0
    assert {"report.html", "compare.png"} <= set(os.listdir("out"))
    # All runs are there: going on draws the same result and trains nothing.
    assert main([*arguments, "--out", "out", "--resume"]) == 0
    assert read(here / "out" / "compare.json")["arms"] == result["arms"]


def test_an_interrupted_comparison_keeps_its_finished_runs(here, capsys, monkeypatch):
    short_calibration(monkeypatch)
    update = Display.update

    def signalled(self, method, seed, status):
        update(self, method, seed, status)
        if method == "random":
            os.kill(os.getpid(), signal.SIGTERM)

    arguments = ["compare", "--model", "test_cli:model", "--batch-size", "256", "--seconds", "0.05", "--seeds", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(Display, "update", signalled)
        assert main([*arguments, "--out", "out"]) == 143
    assert sorted(os.listdir("out/runs")) == ["dense-0.counts", "dense-0.json"]
    before = (here / "out/runs/dense-0.json").read_bytes()
    assert main(["resume", "--trust-code", "out"]) == 0
    assert (here / "out/runs/dense-0.json").read_bytes() == before
    assert list(read(here / "out" / "compare.json")["arms"]) == ["dense", "random", "infobatch", "gate"]


STUDY = ["study", "--model", "test_cli:model", "--batch-size", "32", "--rate", "0.25", "--seconds", "0.05"]
STUDY += ["--tasks", "clean,noise", "--methods", "random-again,gate", "--seeds", "2", "--evaluations", "2"]


@pytest.mark.slow
def test_study_says_whether_chance_shows_before_any_difference(here, capsys, monkeypatch):
    short_calibration(monkeypatch)
    monkeypatch.setattr("sparse_training.experiments.study.LONGEST_CALIBRATION", 0.0)
    assert main([*STUDY, "--fractions", "1,0.5", "--out", "out", "--calibrate-only"]) == 0
    assert sorted(os.listdir("out")) == ["calibration.json", "options.json", "runs", "settings.json"]
    timed = (here / "out" / "calibration.json").read_bytes()
    capsys.readouterr()
    assert main(["resume", "--trust-code", "out"]) == 0
    assert (here / "out" / "calibration.json").read_bytes() == timed
    lines = capsys.readouterr().out.splitlines()
    assert sum(" left  " in line for line in lines) == 2 * 4 * 2 * 2
    said = lines[32]
    assert said.startswith("A/A")
    result = read(here / "out" / "study.json")
    assert result["command"].endswith("--calibrate-only")
    assert {(row["task"], row["arm"]) for row in result["table"]} == {
        (task, arm) for task in ("clean", "noise") for arm in ("dense", "random", "random-again", "gate")
    }
    assert main(["report", "out"]) == 0
    assert said in capsys.readouterr().out


def test_an_interrupted_study_goes_on(here, capsys, monkeypatch):
    short_calibration(monkeypatch)
    step = StudyDisplay.step

    def signalled(self, cell, status):
        step(self, cell, status)
        if cell.method == "gate":
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(StudyDisplay, "step", signalled)
        assert main([*STUDY, "--out", "out"]) == 143
    assert "sparse-train resume --trust-code out" in capsys.readouterr().err
    assert read(here / "out" / "study.json")["missing"] == 13
    before = (here / "out/runs/clean-random-1-0.json").read_bytes()
    assert main([*STUDY, "--out", "out", "--resume"]) == 0
    assert (here / "out/runs/clean-random-1-0.json").read_bytes() == before
    assert read(here / "out" / "study.json")["missing"] == 0


BOUNDS = ["bounds", "--model", "test_cli:model", "--batch-size", "256", "--rates", "0.3,0.06"]


@pytest.mark.slow
def test_bounds_of_each_scorer_at_each_rate_are_printed_and_nothing_is_written(here, capsys, monkeypatch):
    short_calibration(monkeypatch)
    assert main([*BOUNDS, "--scorers", "self,early:1,history"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    arms = ("gate@self", "gate@early:1", "gate@history", "random")
    assert rows[0] == ["test_cli:model", "on", "digits,", "batches", "of", "256,", "cpu:"]
    rows = [row for row in rows if len(row) > 4 and row[0] != "Fastest:" and set(arms) & set(row)]
    rows = [row[2:] if row[1] == "%" else row for row in rows]
    assert [row[0] for row in rows] == [*arms, *arms]
    for rate, row in zip([0.3] * 4 + [0.06] * 4, rows, strict=True):
        s, ceiling, speedup = (float(cell.rstrip("×")) for cell in row[1:4])
        assert ceiling == pytest.approx(3 / (s + 3 * rate), rel=0.05)
        assert speedup > 0
        assert (s > 0) or row[0] in ("gate@history", "random")
    assert os.listdir() == []


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_ends_the_timing_of_bounds(here, monkeypatch, number, code):
    timed = []

    def calibrate(trainer, loader, policies, *, rounds, progress):
        timed.append(policies)
        os.kill(os.getpid(), number)
        progress(0.5)

    monkeypatch.setattr("sparse_training.profiling.speedup.calibrate", calibrate)
    assert main(BOUNDS) == code
    assert len(timed) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train", "Give exactly one of --epochs, --steps, --rows, --seconds; got none"),
        ("train --steps 3 --epochs 2", "--seconds; got --epochs and --steps"),
        ("train --steps 0", "--steps"),
        ("train --seconds -1", "--seconds"),
        ("train --steps 3 --rate 1.5", "1.5 is not in the range 0<x<=1"),
        ("train --steps 3 --rate 0", "0.0 is not in the range 0<x<=1"),
        ("train --steps 3 --rate nan", "rate"),
        ("train --steps 3 --lr nan", "lr"),
        ("train --seconds nan", "seconds"),
        ("train --steps 3 --policy best", "`policy` must be one of dense, random, adaptive, gate, topk"),
        ("train --steps 3 --policy gate@best", "`scorer` must be one of self, self:SCALE, early:LAYER"),
        ("train --steps 3 --scorer early", "`scorer` must be one of self, self:SCALE, early:LAYER"),
        ("train --steps 3 --policy random --scorer self", "scorer self for the policy random, which takes none"),
        ("train --steps 3 --scorer early:conv1", "the model has no layer 'conv1'; use one of 0, 1, 2"),
        ("train --steps 3 --data mnist", "'mnist' is not one of 'digits'"),
        ("train --steps 3 --model vgg", "'vgg'"),
        ("train --steps 3 --model nowhere:model", "nowhere"),
        ("train --steps 3 --batch-size 5000", "`batch_size` must be 1 to 1293, the rows of the data set, got 5000"),
        ("train --steps 3 --policy dense --rate 0.2", "--rate is used by the methods random, gate, topk"),
        ("compare --methods dense,infobatch --rate 0.2", "--rate is used by the methods random, gate, topk"),
        ("study --methods dense --tasks clean --rate nan", "rate"),
        ("train --steps 3 --dense-start nan", "dense-start"),
        ("train --steps 3 --momentum 0.5", "`momentum` must be of sgd and rmsprop, not of adamw"),
        ("train --steps 3 --optimizer sgd --momentum 1", "`momentum` must be in [0, 1), got 1.0"),
        ("train --steps 3 --weight-decay -1", "weight-decay"),
        ("train --steps 3 --policy-options prune", "'prune' must be settings, each once, such as prune=0.3"),
        ("train --steps 3 --policy-options prune=0.1,prune=0.2", "must be settings, each once"),
        ("train --steps 3 --policy-options floor=1", "the policy infobatch has the options prune, got 'floor'"),
        ("train --steps 3 --policy-options prune=2", "`prune` must be in [0, 1), got 2"),
        ("train --steps 3 --policy dense --policy-options a=2", "the policy dense has the options none, got 'a'"),
        ("train --steps 3 --policy importance --policy-options uniform=0", "`uniform` must be in (0, 1], got 0"),
        ("train --steps 3 --policy gate --policy-options floor=x", "floor"),
        ("train --steps 3 --augment blur", "augmentation must be flip, shift or shift:PIXELS, or two with a comma"),
        ("train --steps 3 --augment flip,flip", "got 'flip,flip'"),
        ("train --steps 3 --augment shift:-1", "got 'shift:-1'"),
        ("train --steps 3 --optimizer lion", "'lion' is not one of"),
        ("train --steps 3 --lr-warmup 2", "lr-warmup"),
        ("train --steps 3 --seed 99999999999999999999", "seed"),
        ("train --steps 3 --threads 99999999", "threads"),
        ("train --steps 3 --image-size 16", "size=16 is for imagefolder; the images of digits have a fixed size"),
        ("train --steps 3 --validation 1", "1.0 is not in the range 0<=x<1"),
        ("train --steps 3 --validation 0 --best", "--best must choose by a --validation above 0, not by the test set"),
        ("train --steps 3 --validation 0 --best --patience 2", "--patience and --best must choose by a --validation"),
        ("train --steps 3 --keep-last 2", "--keep-last needs --checkpoint-interval"),
        ("train --steps 3 --config nowhere.toml", "nowhere.toml cannot be read: No such file or directory"),
        ("train --steps 3 --config used/file", "used/file cannot be read as TOML: "),
        ("train --steps 3 --device nonsense", "device 'nonsense' cannot be used"),
        ("train --steps 3 --dense-start 0.6 --dense-end 0.6", "add up to more than 1"),
        ("train --steps 3 --data imagefolder --root nowhere", "nowhere"),
        ("train --steps 3 --out used", "used exists and is not empty"),
        ("train --steps 3 --out used/file", "used/file exists and is not empty"),
        ("compare --out used", "used exists and is not empty"),
        ("compare --seconds 0", "--seconds"),
        ("compare --seconds nan", "seconds"),
        ("compare --methods dense,best", "`policy` must be one of dense, random, adaptive, gate, topk"),
        ("compare --methods gate,gate", "'gate,gate' must name each method once"),
        ("compare --seeds some", "'some' must say how many"),
        ("compare --seeds 1,1", "'1,1' must say how many"),
        ("compare --batch-size 5000", "batch_size` must be 1 to 1293, the rows of the data set, got 5000"),
        ("compare --model vgg", "'vgg'"),
        ("compare --resume", "--resume needs --out"),
        ("study --tasks hard", "'hard' is unknown; use some of clean, noise, longtail, duplicated, finetune"),
        ("study --methods best", "best"),
        ("study --methods random,random", "must name each method once"),
        ("study --fractions 1,2", "'1,2' must be fractions above 0 and at most 1"),
        ("study --fractions half", "'half' must be fractions"),
        ("study --out used", "used exists and is not empty"),
        ("study --resume", "--resume needs --out"),
        ("compare --methods random-again", "random-again"),
        ("bounds --scorers self,best", "`scorer` must be one of self, self:SCALE, early:LAYER"),
        ("bounds --scorers self,self", "'self,self' must name each scorer once"),
        ("bounds --scorers early:conv1", "the model has no layer 'conv1'; use one of 0, 1, 2"),
        ("bounds --rates 0.1,2", "'0.1,2' must be fractions above 0 and at most 1"),
        ("bounds --rates 0", "'0' must be fractions"),
        ("bounds --batch-size 5000", "batch_size` must be 1 to 1437, the rows of the data set, got 5000"),
        ("bounds --device nonsense", "device 'nonsense' cannot be used"),
        ("resume nowhere", "nowhere/options.json: no such file"),
        ("report nowhere", "nowhere"),
        ("draw", "draw"),
        ("train --stepz 3", "--stepz"),
        ("ceilings", "the command ceilings is now called bounds; use: sparse-train bounds"),
        ("study --arms gate", "the option --arms is now called --methods"),
        ("compare --policies gate", "the option --policies is now called --methods"),
        ("train --steps 3 --checkpoint-every 5", "the option --checkpoint-every is now called --checkpoint-interval"),
        ("train --steps 3 --warmup 0.1", "the option --warmup is now called --dense-start"),
    ],
)
def test_a_wrong_request_is_one_line_and_code_2_and_nothing_is_written(here, capsys, arguments, message):
    (here / "used").mkdir()
    (here / "used" / "file").write_text("mine")
    assert main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert sorted(os.listdir()) == ["used"]
    assert (here / "used" / "file").read_text() == "mine"


def test_a_damaged_checkpoint_is_one_line_and_code_2(here, capsys):
    assert main([*TRAIN, "--steps", "2", "--out", "out"]) == 0
    path = here / "out" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-7])
    capsys.readouterr()
    assert main(["resume", "--trust-code", "out"]) == 2
    assert "checkpoint.pt is damaged" in capsys.readouterr().err


def test_a_missing_extra_is_said(here, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "click", None)
    monkeypatch.delitem(sys.modules, "sparse_training.cli.main")
    monkeypatch.delattr("sparse_training.cli.main", raising=False)
    assert main(["train"]) == 2
    assert "sparse-kernels[train]" in capsys.readouterr().err


def test_a_missing_extra_of_one_command_is_said(here, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    for name in ("display", "train"):
        monkeypatch.delitem(sys.modules, f"sparse_training.cli.{name}", raising=False)
    assert main(["train", "--steps", "1"]) == 2
    assert "no module rich.console; install it with: pip install 'sparse-kernels[train]'" in capsys.readouterr().err


HEAVY = ("torch", "numpy", "scipy", "matplotlib", "rich", "jinja2", "PIL", "sparse_kernels")


@pytest.mark.parametrize("arguments", [["--help"], ["draw"], ["ceilings"]])
def test_help_and_unknown_commands_import_nothing_heavy(here, arguments):
    code = f"""
import sys
from sparse_training.__main__ import main
main({arguments!r})
print("imported:", [name for name in {HEAVY!r} if name in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "imported: []"
    if arguments == ["--help"]:
        assert all(f"  {name} " in ran.stdout for name in cli.COMMANDS)


def test_the_groups_help_is_that_of_the_commands():
    context = cli.click.Context(cli.cli)
    for name, line in cli.COMMANDS.items():
        assert cli.cli.get_command(context, name).help.splitlines()[0] == line


OLD_OPTIONS = {  # as version 0.1.0 wrote them
    "train": {"steps": 4, "policy": "gate", "warmup": 0.05, "anneal": 0.125, "checkpoint_every": 2, "seed": 0},
    "compare": {"policies": ["random", "gate"], "seeds": [0], "warmup": 0.05, "anneal": 0.125, "evaluations": 2},
    "study": {"arms": ["gate"], "tasks": ["clean"], "seeds": [0], "fractions": [1.0], "warmup": 0.05, "anneal": 0.125},
}


@pytest.mark.parametrize("command", OLD_OPTIONS)
def test_a_folder_of_the_former_version_is_resumed(here, capsys, monkeypatch, command):
    short_calibration(monkeypatch)
    options = {"command": command, "data": "digits", "root": None, "model": "test_cli:model", "batch_size": 64}
    options |= {"device": "cpu", "threads": None, "rate": 0.25, "lr": 1e-3, "precision": "auto"}
    if command == "study":
        del options["precision"]
        options |= {"amp": "float32", "evaluations": 2}
    if command != "train":
        options |= {"line": "sparse-train " + command, "seconds": 0.05}
    (here / "out").mkdir()
    (here / "out" / "options.json").write_text(json.dumps({**options, **OLD_OPTIONS[command]}))
    assert main(["resume", "--trust-code", "out"]) == 0
    written = {"train": "result.json", "compare": "compare.json", "study": "study.json"}[command]
    settings = read(here / "out" / written)["settings"]
    key, value = {"train": ("dense_end", 0.125)}.get(command, ("anneal", 0.125))
    assert settings[key] == value
    assert settings.get("policies", settings.get("arms")) in (None, ["random", "gate"], ["dense", "gate"])


def test_a_folder_of_another_command_is_refused(here, capsys):
    (here / "out").mkdir()
    (here / "out" / "options.json").write_text(json.dumps({"command": "draw"}))
    assert main(["resume", "--trust-code", "out"]) == 2
    assert "out/options.json has the command 'draw'; only train, compare, study" in capsys.readouterr().err


def test_python_dash_m_and_an_unknown_backend(here):
    environment = {**os.environ, "SPARSE_KERNELS_BACKEND": "abacus"}  # read at import: hence a process
    ran = fresh.run("-m", "sparse_training", "train", "--steps", "3", environment=environment)
    assert ran.returncode == 2
    assert ran.stderr == "error: unknown backend 'abacus'; use one of cpp, triton, torch, cuda, gpu\n"
    assert os.listdir() == []
