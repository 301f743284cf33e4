"""Where a run's files cannot be written is said before it trains, and what is no file of ours is not read for ever."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from sparse_training import ResidentLoader, SparseTrainer, load_data
from sparse_training.errors import UserError
from sparse_training.files import read_json, read_json_object


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "half" / "checkpoint.pt.tmp").mkdir(parents=True)
    (tmp_path / "folder" / "checkpoint.pt").mkdir(parents=True)
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "checkpoint.pt").touch()
    os.mkfifo("pipe")
    return tmp_path


def model():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def fit(folder, **options):
    loader = ResidentLoader(load_data("digits").train, batch_size=64)
    trainer = SparseTrainer(model(), policy="dense")
    return trainer.fit(loader, steps=2, checkpoint=folder, resume=True, **options)


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("file", "file cannot be written to: File exists"),
        ("file/run", "Not a directory"),
        ("loop", "loop"),
        ("loop/run", "Too many levels of symbolic links"),
        ("a" * 300, "File name too long"),
        ("/".join(["a" * 200] * 30), "File name too long"),
        ("half", "half cannot be written to: Is a directory"),
        ("folder", "folder/checkpoint.pt: a checkpoint must be a regular file"),
        ("zero", "zero/checkpoint.pt is damaged or not a checkpoint"),
        ("a\0b", "embedded null"),
        ("/proc/run", "/proc/run cannot be written to: No such file"),
        ("pipe", "pipe cannot be written to: File exists"),
        (5, "`checkpoint` must be the path of a folder, or None, got 5"),
        (["run"], "`checkpoint` must be the path of a folder"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_folder_that_cannot_be_one_is_refused_before_the_first_step(here, folder, words):
    steps = []
    with pytest.raises(UserError, match=words) as caught:
        fit(folder, stop=lambda: bool(steps.append(1)))
    assert not steps
    assert "\n" not in str(caught.value)
    assert (here / "file").read_text() == "kept"


@contextmanager
def nobody():
    """Root may write anywhere; whoever else runs the tests is somebody already."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
    else:
        yield


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_a_folder_without_permission_is_refused_before_the_first_step(mode):
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(mode)
        with nobody(), pytest.raises(UserError, match="Permission denied"):
            fit(folder)
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_trial_leaves_nothing_behind(here):
    fit("new/run")
    assert os.listdir("new/run") == ["checkpoint.pt"]


# --- files that are read ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("none", "the reference none: no such file"),
        ("pipe", "the reference pipe must be a regular file"),
        ("folder", "the reference folder must be a regular file"),
        ("loop", "the reference loop: no such file"),
        ("/dev/zero", "the reference /dev/zero must be a regular file"),
        ("file", "the reference file holds "),
        ("zero/checkpoint.pt", "the reference zero/checkpoint.pt holds nothing that torch.save writes"),
        ("code", "the reference code holds more than tensors and plain containers"),
        ("list", "the reference list is no state of the model"),
        ("other", "the reference other is no state of the model"),
        ("a" * 300, "File name too long|no such file"),
    ],
    ids=lambda value: value[:20],
)
def test_a_reference_that_is_none_is_one_line(here, path, words):
    torch.save({"model": nn.Linear(2, 2)}, "code")
    torch.save([1, 2], "list")
    torch.save(nn.Linear(2, 2).state_dict(), "other")
    with pytest.raises(UserError, match=words) as caught:
        SparseTrainer(model(), policy="gate", scorer=f"reference:{path}")
    assert "\n" not in str(caught.value)


def test_a_runs_own_checkpoint_serves_as_a_reference(here):
    log = fit("run")
    assert log.steps == 2
    loader = ResidentLoader(load_data("digits").train, batch_size=64)
    trainer = SparseTrainer(model(), policy="gate", scorer="reference:run/checkpoint.pt", rate=0.5)
    assert trainer.fit(loader, steps=3).steps == 3


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": [1, {"b": Infinity}]}', '{"a": 1e999}', "[1]", "null"])
def test_an_object_of_finite_numbers(here, text):
    Path("a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json: a must be finite|a\.json must hold a JSON object"):
        read_json_object(Path("a.json"))


@pytest.mark.parametrize("path", ["pipe", "folder", "/dev/zero", "loop", "none", "file"])
def test_json_is_read_from_regular_files(here, path):
    with pytest.raises(UserError, match=path):
        read_json(Path(path))
