"""Transformer, gate, five terms and budget beside dense and random, on images of 784 pixels, in one command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_files import idx_bytes, write
from short_calibration import short_calibration

from sparse_training.__main__ import main
from sparse_training.files import read_json

METHODS = ["dense", "random", "gate:vision"]


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of Fashion-MNIST's kind: 80 bright and dark images to train on, 20 to test on."""
    monkeypatch.chdir(tmp_path)
    short_calibration(monkeypatch)
    generator, files = np.random.default_rng(0), {}
    for prefix, count in (("train", 80), ("t10k", 20)):
        labels = np.arange(count) % 10
        files[f"{prefix}-images-idx3-ubyte"] = idx_bytes(
            generator.integers(0, 30, (count, 28, 28)) + 20 * labels[:, None, None]
        )
        files[f"{prefix}-labels-idx1-ubyte"] = idx_bytes(labels)
    return write(tmp_path / "images", files)


@pytest.mark.parametrize(
    ("model", "batch"),
    [("vit", 16), pytest.param("vit-sparse", 4, marks=pytest.mark.slow)],  # 784 tokens an image
)
def test_one_command_runs_all_of_it(model: str, batch: int, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["compare", "--data", "fashion-mnist", "--root", str(images), "--model", model, "--rate", "0.25"]
    line += ["--methods", ",".join(METHODS), "--seconds", "0.5", "--seeds", "1", "--evaluations", "1"]
    assert main([*line, "--batch-size", str(batch), "--out", "out"]) == 0
    result = read_json(Path("out/compare.json"))
    assert list(result["arms"]) == METHODS
    assert result["settings"]["seconds"] == 0.5
    assert result["settings"]["rate"] == 0.25
    for method in METHODS:
        (run,) = result["arms"][method]["runs"]
        assert run["steps"] >= 1
        assert run["seconds"] == pytest.approx(0.5, rel=1.0), "equal time, but for the last step"
        assert 0.0 <= run["evals"][-1]["accuracy"] <= 1.0
    assert result["gallery"]["arm"] == "gate:vision"
    assert "gate:vision" in capsys.readouterr().out
