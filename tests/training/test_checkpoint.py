"""Checkpoints are whole or refused, never half, and cannot run code."""

import hashlib
import os
import pickle
import random

import numpy as np
import pytest
import torch

from sparse_training import files, generators
from sparse_training.errors import UserError
from sparse_training.files import SEAL
from sparse_training.training.checkpoint import load_checkpoint, save_checkpoint

STATE = {"step": 3, "weights": torch.arange(2000.0), "nested": [1.5, None, {"text": (1, True)}]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.pt"


def test_what_is_saved_is_loaded(path):
    save_checkpoint(path, STATE)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["weights"], STATE["weights"])
    assert (loaded["step"], loaded["nested"]) == (3, STATE["nested"])
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("where", [0, 30, 60, 100, 4000, -100, -1])
def test_any_flipped_bit_is_noticed(path, where):
    save_checkpoint(path, STATE)
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"checkpoint\.pt is damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("data", [b"", b"\n", b"not one", SEAL])
def test_other_files_are_refused(path, data):
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        load_checkpoint(path)


def test_a_truncated_file_is_refused(path):
    save_checkpoint(path, STATE)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="its digest does not match"):
        load_checkpoint(path)


def test_none_there_is_said(path):
    with pytest.raises(UserError, match="no checkpoint there"):
        load_checkpoint(path)


def test_a_damaged_one_falls_back_on_the_previous(path):
    save_checkpoint(path, {"step": 1})
    save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 2}
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"checkpoint\.pt\.prev, is used"):
        assert load_checkpoint(path) == {"step": 1}


def test_a_crash_while_writing_leaves_one_to_go_on_from(path, monkeypatch):
    save_checkpoint(path, {"step": 1})

    def crash(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(UserError, match=r"checkpoint\.pt cannot be written: disk full"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 1}


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_a_signal_while_writing_leaves_one_and_no_part_of_another(path, monkeypatch, kind):
    save_checkpoint(path, {"step": 1})

    def interrupt(descriptor):
        raise kind

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(kind):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 1}
    assert os.listdir(path.parent) == [path.name]


def test_a_damaged_one_never_takes_the_place_of_the_previous(path, monkeypatch):
    """A bit flips, the run goes on from the one before, and is killed in the midst of its next checkpoint."""
    save_checkpoint(path, {"step": 1})
    save_checkpoint(path, {"step": 2})
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match="is used"):
        assert load_checkpoint(path) == {"step": 1}

    class Killed(BaseException):
        pass

    def kill(descriptor):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", kill)
        with pytest.raises(Killed):
            save_checkpoint(path, {"step": 3})
    with pytest.warns(UserWarning, match="is used"):
        assert load_checkpoint(path) == {"step": 1}
    save_checkpoint(path, {"step": 3})
    assert load_checkpoint(path) == {"step": 3}
    path.unlink()
    with pytest.warns(UserWarning, match="is used"):
        assert load_checkpoint(path) == {"step": 1}  # not the damaged one of step 2


def test_a_checkpoint_that_reads_back_otherwise_replaces_nothing(path, monkeypatch):
    save_checkpoint(path, {"step": 1})
    save_checkpoint(path, {"step": 2})
    fsync = os.fsync

    def lose(descriptor):
        os.pwrite(descriptor, b"?", 200)
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lose)
        with pytest.raises(UserError, match="reads back otherwise"):
            save_checkpoint(path, {"step": 3})
    assert load_checkpoint(path) == {"step": 2}
    assert sorted(os.listdir(path.parent)) == ["checkpoint.pt", "checkpoint.pt.prev"]


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_code_in_a_well_formed_file_is_not_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    buffer = tmp_path / "payload"
    torch.save({"state": Harmful()}, buffer)
    for payload in (buffer.read_bytes(), pickle.dumps(Harmful(), protocol=2)):
        path.write_bytes(SEAL + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)
        with pytest.raises(UserError, match="more than tensors"):
            load_checkpoint(path)
    assert not (tmp_path / "harm").exists()


def test_every_global_generator_comes_back(path):
    cpu = torch.device("cpu")

    def draw():
        legacy = np.random.rand(2).tolist()  # noqa: NPY002 - the global generator is what is tested
        return torch.rand(2).tolist(), random.random(), legacy, random.gauss(0, 1)

    draw()
    save_checkpoint(path, generators.rng_state(cpu))
    expected = draw()
    draw()
    generators.set_rng_state(load_checkpoint(path), cpu)
    assert draw() == expected


def test_json_that_is_none_is_refused(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match="no such file"):
        files.read_json(path)
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        files.read_json(path)
    files.write_json(path, {"seconds": 0.1})
    assert files.read_json(path) == {"seconds": 0.1}
