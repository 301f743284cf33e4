"""Runs that are killed, and disks that fill up: nothing whole is lost, and what goes on is the same run."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from contextlib import contextmanager

import pytest
import torch
from torch.utils._pytree import tree_flatten

from sparse_training import ResidentLoader, SparseTrainer, files, load_data
from sparse_training.__main__ import main
from sparse_training.errors import UserError
from sparse_training.training.checkpoint import load_checkpoint, save_checkpoint

KILLS = 20
TRAIN = [
    *("train", "--model", "test_interrupts:model", "--policy", "gate", "--rate", "0.3", "--batch-size", "128"),
    *("--steps", "150", "--checkpoint-interval", "5", "--accumulate", "2", "--ema", "0.9", "--amp", "bfloat16"),
    *("--clip-norm", "1", "--threads", "1"),
]


def model(shape, classes):
    layers = torch.nn
    return layers.Sequential(
        layers.Conv2d(1, 4, 3), layers.BatchNorm2d(4), layers.ReLU(), layers.Flatten(),
        layers.Dropout(0.2), layers.Linear(144, classes),
    )  # fmt: skip


def command(folder, arguments, log):
    """One command line, in a process of its own."""
    os.chdir(folder)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        os._exit(main(arguments))


@pytest.fixture(scope="module")
def start():
    """Starts command lines in fresh processes that need not import PyTorch: they fork from one that has."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sparse_training.cli.train", "test_interrupts", "torch._dynamo"])

    def starter(folder, arguments, log="log.txt"):
        process = context.Process(target=command, args=(str(folder), arguments, log))
        process.start()
        return process

    return starter


def outcome(folder):
    """All that a finished run left, but for the time it took."""
    run = json.loads((folder / "result.json").read_text())["run"]
    for timed in (run, *run["evals"]):
        for name in ("seconds", "raw_seconds"):
            timed.pop(name, None)
    state = load_checkpoint(folder / "checkpoint.pt")
    for name in ("seconds", "raw_seconds", "evals"):
        del state["history"][name]
    # Nobody seeded Python's and NumPy's generators, and nothing draws from them.
    del state["clock"], state["energy"], state["rng"]["python"], state["rng"]["numpy"]
    return run, torch.load(folder / "model.pt", weights_only=True), state


def same(a, b):
    (mine, form), (wanted, other) = tree_flatten(a), tree_flatten(b)
    assert form == other
    for one, two in zip(mine, wanted, strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
        else:
            assert one == two


@pytest.mark.slow
def test_a_run_killed_again_and_again_is_the_run_that_was_not(tmp_path, start):
    began = time.monotonic()
    whole = start(tmp_path, [*TRAIN, "--out", "whole"])
    whole.join(200)
    seconds = time.monotonic() - began
    assert whole.exitcode == 0, (tmp_path / "log.txt").read_text()
    wanted = outcome(tmp_path / "whole")
    assert len(wanted[0]["evals"]) == 20

    kills, finished, draw, steps = 0, 0, random.Random(0), []
    while kills < KILLS or finished == 0:
        folder = tmp_path / f"part-{finished}"
        resumable = (folder / "options.json").exists()
        arguments = ["resume", "--trust-code", folder.name] if resumable else [*TRAIN, "--out", folder.name]
        process = start(tmp_path, arguments)
        # Without an end of the killing a slow machine might never see a checkpoint.
        process.join(draw.uniform(0.0, 0.6 * seconds) if kills < KILLS else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            # Whatever was being written, what is there is whole.
            if (folder / "checkpoint.pt").exists() or (folder / "checkpoint.pt.prev").exists():
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr("warnings.warn", lambda *arguments, **options: None)
                    steps.append(load_checkpoint(folder / "checkpoint.pt")["history"]["steps"])
        else:
            assert process.exitcode in (0, -signal.SIGKILL), (tmp_path / "log.txt").read_text()
            found = outcome(folder)
            assert found[0] == wanted[0]
            same(found[1:], wanted[1:])
            finished += 1
    assert kills == KILLS
    assert len(set(steps)) > 3  # they did get on between kills


def train_until(folder, message, release):
    """A run in a process of its own, which says that it has begun and goes on until it is told, or refused."""
    data = load_data("digits")
    trainer = SparseTrainer(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), policy="dense")
    unsaid = ["running"]

    def stop():
        while unsaid:
            message.send(unsaid.pop())
        return release.wait(0.01)

    try:
        trainer.fit(ResidentLoader(data.train, batch_size=64), steps=10**6, checkpoint=folder, resume=True, stop=stop)
    except UserError as error:
        message.send(str(error))


@pytest.fixture
def run_elsewhere(tmp_path):
    context = multiprocessing.get_context("forkserver")
    started = []

    def starter():
        mine, theirs = context.Pipe(duplex=False)
        release = context.Event()
        process = context.Process(target=train_until, args=(tmp_path / "run", theirs, release))
        process.start()
        started.append(process)
        assert mine.poll(60)
        return process, mine.recv(), release

    yield starter
    for process in started:
        process.kill()
        process.join()


def test_two_runs_on_one_folder(tmp_path, run_elsewhere):
    first, said, release = run_elsewhere()
    assert said == "running"
    in_use = f"{tmp_path / 'run'} is in use by another run; wait for its end, or choose another folder"
    assert run_elsewhere()[1] == in_use
    release.set()  # it ends, with a checkpoint
    first.join(60)
    second, said, _ = run_elsewhere()
    assert said == "running"
    assert run_elsewhere()[1] == in_use
    second.kill()  # its lock goes with it
    second.join()
    assert run_elsewhere()[1] == "running"


def test_the_folder_is_free_after_a_run_and_after_a_refusal(tmp_path):
    data = load_data("digits")
    loader = ResidentLoader(data.train, batch_size=64)

    def fit(**options):
        trainer = SparseTrainer(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), policy="dense")
        return trainer.fit(loader, steps=2, checkpoint=tmp_path, **options)

    fit()
    for _ in range(2):
        with pytest.raises(UserError, match="exists already"):
            fit()
    assert fit(resume=True).steps == 2
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pt", "checkpoint.pt.prev"]


@contextmanager
def full_disk(more):
    """No file of this process may grow beyond so many bytes, which is how a full disk shows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 10, 1000, 5000, 40000])
def test_a_full_disk_is_an_error_and_the_last_checkpoint_stays(tmp_path, limit):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1, "weights": torch.ones(10)})
    with full_disk(limit), pytest.raises(UserError, match=r"checkpoint\.pt cannot be written: File too large"):
        save_checkpoint(path, {"step": 2, "weights": torch.ones(20000)})
    assert not any(name.endswith(".tmp") for name in os.listdir(tmp_path))
    assert load_checkpoint(path)["step"] == 1
    save_checkpoint(path, {"step": 3})
    assert load_checkpoint(path)["step"] == 3
    with full_disk(0), pytest.raises(UserError, match=r"a\.json cannot be written: File too large"):
        files.write_json(tmp_path / "a.json", [1])
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pt", "checkpoint.pt.prev"]


def limited(folder, arguments, log, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    command(folder, arguments, log)


def test_a_run_on_a_full_disk_ends_with_one_line_and_goes_on_when_there_is_room(tmp_path):
    """The checkpoint grows when the optimiser has a state: the first one fits, those after it do not."""
    arguments = [
        "train",
        "--model",
        "test_interrupts:model",
        "--steps",
        "20",
        "--checkpoint-interval",
        "5",
        "--seed",
        "1",
    ]
    context = multiprocessing.get_context("forkserver")

    def go(name, arguments, limit=resource.RLIM_INFINITY):
        process = context.Process(target=limited, args=(str(tmp_path), arguments, f"{name}.txt", limit))
        process.start()
        process.join(200)
        return process.exitcode, (tmp_path / f"{name}.txt").read_text()

    assert go("whole", [*arguments, "--out", "whole"])[0] == 0
    assert go("part", [*arguments, "--out", "part"], limit=20_000)[0] == 2
    code, said = go("again", ["resume", "--trust-code", "part"], limit=20_000)
    assert code == 2
    assert said.splitlines()[-1] == "error: part/checkpoint.pt cannot be written: File too large"
    assert sorted(os.listdir(tmp_path / "part")) == ["options.json"]
    assert go("resumed", ["resume", "--trust-code", "part"])[0] == 0
    found, wanted = outcome(tmp_path / "part"), outcome(tmp_path / "whole")
    assert found[0] == wanted[0]
    same(found[1:], wanted[1:])


STUDY = [
    *("study", "--model", "test_interrupts:model", "--batch-size", "128", "--tasks", "clean,noise", "--threads", "1"),
    *("--methods", "dense,random,gate", "--rate", "0.3", "--seconds", "0.5", "--seeds", "2", "--amp", "float32"),
]


def runs_of(folder):
    """What each run of a study came to, and how often it drew each row, but for the time that it really took."""
    found = {}
    for path in sorted((folder / "runs").glob("*.json")):
        run = json.loads(path.read_text())
        for timed in (run, *run["evals"]):
            timed.pop("raw_seconds", None)
        counts = path.with_suffix(".counts")
        found[path.name] = run, load_checkpoint(counts) if counts.exists() else {}
    return found


@pytest.mark.slow
def test_a_study_killed_again_and_again_is_the_study_that_was_not(tmp_path, start):
    """Both go by one calibration, which is what a run's seconds are counted by."""
    calibrated = start(tmp_path, [*STUDY, "--calibrate-only", "--out", "whole"])
    calibrated.join(200)
    assert calibrated.exitcode == 0, (tmp_path / "log.txt").read_text()
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    began = time.monotonic()
    whole = start(tmp_path, ["resume", "--trust-code", "whole"])
    whole.join(250)
    seconds = time.monotonic() - began
    assert whole.exitcode == 0, (tmp_path / "log.txt").read_text()
    wanted = runs_of(tmp_path / "whole")
    assert len(wanted) == 2 * 3 * 2

    draw, done, process = random.Random(1), [], None
    while process is None or process.exitcode != 0:
        process = start(tmp_path, ["resume", "--trust-code", "part"])
        process.join(draw.uniform(0.0, 0.3 * seconds) if len(done) < KILLS else 250)
        if process.exitcode is None:
            process.kill()
            process.join()
            done.append(len(runs_of(tmp_path / "part")))  # whatever was being written, what is there is whole
        assert process.exitcode in (0, -signal.SIGKILL), (tmp_path / "log.txt").read_text()
    assert len(done) >= 3
    assert done == sorted(done)  # no finished run was lost
    found = runs_of(tmp_path / "part")
    assert found.keys() == wanted.keys()
    for name, (run, counts) in found.items():
        assert run == wanted[name][0]
        same(counts, wanted[name][1])
