"""A folder of somebody else's: resume imports no module that it names, and refuses what the command line would."""

import json
import os
import sys

import pytest

from sparse_training.__main__ import main

EVIL = """
import pathlib
pathlib.Path("ran").touch()
def model(shape, classes):
    import torch
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes))
"""
TRAIN = ["train", "--steps", "3", "--batch-size", "256", "--model", "cnn-tiny", "--out", "run"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    sys.modules.pop("evil", None)
    (tmp_path / "evil.py").write_text(EVIL)
    return tmp_path


def folder(command="train", **changes):
    """The folder of a run that was interrupted before its first checkpoint, as somebody sent it."""
    options = {
        "command": command, "data": "digits", "root": None, "model": "cnn-tiny", "batch_size": 256, "device": "cpu",
        "threads": None, "rate": 0.1, "lr": 0.001, "dense_start": 0.05, "dense_end": 0.125, "precision": "auto",
    }  # fmt: skip
    if command == "train":
        options |= {"policy": None, "steps": 3, "seed": 0}
    else:
        options |= {"line": "sparse-train", "seeds": [0], "methods": ["random"], "seconds": 1.0, "evaluations": 2}
    if command == "study":
        options["amp"] = options.pop("precision")
    os.makedirs("run", exist_ok=True)
    with open("run/options.json", "w") as file:
        json.dump({**options, **changes}, file)


def resume(capsys, *arguments):
    code = main(["resume", "run", *arguments])
    said = capsys.readouterr().err.strip().splitlines()
    return code, said[-1] if said else ""


@pytest.mark.parametrize("command", ["train", "compare", "study"])
@pytest.mark.parametrize(
    "changes", [{"model": "evil:model"}, {"methods": ["random", "gate@proxy:evil:model"]}], ids=["model", "proxy"]
)
def test_a_module_that_the_folder_names_is_imported_by_word_alone(here, capsys, command, changes):
    if command == "train" and "methods" in changes:
        changes = {"policy": "gate", "scorer": "proxy:evil:model"}
    folder(command, **changes)
    code, said = resume(capsys)
    assert code == 2
    assert "model 'evil:model' is Python code, which run/options.json names" in said
    assert said.endswith("if you trust it: sparse-train resume --trust-code run")
    assert not os.path.exists("ran")
    assert os.listdir("run") == ["options.json"]


def test_with_the_users_word_it_is_imported(here, capsys):
    folder(model="evil:model")
    assert resume(capsys, "--trust-code")[0] == 0
    assert os.path.exists("ran")


def test_what_the_user_types_needs_no_further_word(here, capsys):
    assert main([*TRAIN[:-3], "evil:model", "--out", "run"]) == 0
    assert os.path.exists("ran")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 1e400}, "steps must be finite, got inf"),
        ({"dense_start": float("nan")}, "dense_start must be finite, got nan"),
        ({"lr": -1}, "--lr"),
        ({"lr": "evil"}, "--lr"),
        ({"lr": {"a": 1}}, "--lr"),
        ({"batch_size": 0}, "--batch-size"),
        ({"batch_size": [[[1]]]}, "--batch-size"),
        ({"seed": 2.5}, "--seed"),
        ({"data": "../../etc"}, "--data"),
        ({"policy": "../../etc"}, "`policy` must be one of"),
        ({"policy": 5}, "`policy` must be one of"),
        ({"scorer": "proxy:"}, "`scorer` must be one of"),
        ({"model": "../../etc"}, "unknown model '../../etc'"),
        ({"device": "evil"}, "device 'evil' cannot be used"),
        ({"schedule": "evil"}, "--schedule"),
        ({"compile": "maybe"}, "--compile"),
        ({"command": "report"}, "only train, compare, study can be resumed"),
        ({"command": ["train"]}, "only train, compare, study can be resumed"),
        ({"command": "x" * 10000}, "only train, compare, study can be resumed"),
        ({"steps": None}, "Give exactly one of"),
        ({"__class__": "evil"}, "has the option '__class__', which train does not take"),
        ({"epochs": 2}, "Give exactly one of"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)  # fmt: skip
def test_an_option_that_the_command_line_would_refuse_is_one_line(here, capsys, changes, words):
    folder(**changes)
    code, said = resume(capsys)
    assert code == 2, said
    assert words in said
    assert len(said) < 600
    assert os.listdir("run") == ["options.json"]


def test_an_option_that_is_missing_is_named(here, capsys):
    folder()
    options = json.loads((here / "run" / "options.json").read_text())
    for name in ("seed", "model"):
        (here / "run" / "options.json").write_text(json.dumps({key: options[key] for key in options if key != name}))
        assert resume(capsys) == (2, f"error: run/options.json must have the option {name}, which train needs")


@pytest.mark.parametrize(
    "text", ["[]", "5", "null", '"x"', "", "{", "\0", "[" * 100000, '{"steps": ' + "9" * 5000 + "}", "\xff"]
)
def test_a_file_that_holds_something_else_is_one_line(here, capsys, text):
    folder()
    (here / "run" / "options.json").write_bytes(text.encode("latin-1"))
    code, said = resume(capsys)
    assert code == 2
    assert said.startswith("error: run/options.json ")
    assert len(said) < 600


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "huge"])
def test_a_file_that_is_none_is_one_line(here, capsys, kind):
    os.mkdir("run")
    path = here / "run" / "options.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    else:
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    code, said = resume(capsys)
    assert code == 2
    assert said.startswith("error: run/options.json")
