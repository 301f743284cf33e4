"""Checkpoints that are sealed, with the right digest, and are not this run's: one line, and nothing changes."""

import hashlib
import io
import os

import pytest
import torch
from torch import nn

from sparse_training import ResidentLoader, SparseTrainer, load_data
from sparse_training.errors import UserError
from sparse_training.files import SEAL
from sparse_training.training.checkpoint import load_checkpoint, save_checkpoint


def seal(path, value):
    """Write a file as the library seals it, whatever its content."""
    buffer = io.BytesIO()
    if value is not None:
        torch.save(value, buffer)
    payload = buffer.getvalue()
    path.write_bytes(SEAL + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)


def run(folder, model=None, **options):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    data = load_data("digits")
    trainer = SparseTrainer(model, policy="dense", **options)
    return model, trainer.fit(ResidentLoader(data.train, batch_size=64), steps=3, checkpoint=folder, resume=True)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "holds nothing that torch.save writes"),
        ([1, 2], "must hold a mapping, got a list"),
        (torch.ones(3), "must hold a mapping, got a Tensor"),
        ({}, "is no checkpoint of a training run: it has no model"),
        ({"weight": torch.ones(3)}, "is no checkpoint of a training run: it has no model"),
        ({"others": [1]}, "is no checkpoint of a training run: it has no model"),
    ],
)
def test_a_sealed_file_of_another_kind_is_one_line(tmp_path, value, words):
    seal(tmp_path / "checkpoint.pt", value)
    with pytest.raises(UserError, match=words) as caught:
        run(tmp_path)
    assert "\n" not in str(caught.value)


def test_another_model_of_as_many_parameters_is_one_line_and_is_left_alone(tmp_path):
    run(tmp_path)
    other = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (64,)), nn.Linear(64, 10))
    before = other[2].weight.clone()
    with pytest.raises(UserError, match=r"of another model: 2\.weight absent is now \[10, 64\] float32"):
        run(tmp_path, other)
    assert torch.equal(other[2].weight, before)


@pytest.mark.parametrize("part", ["update", "policy", "loader", "clock", "operations", "energy"])
def test_a_part_of_another_run_is_one_line(tmp_path, part):
    run(tmp_path)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    state[part] = {"other": 1}
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    with pytest.raises(UserError, match=f"does not fit this run: its {part} says") as caught:
        run(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="must be a regular file"):
        run(tmp_path)
