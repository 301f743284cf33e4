"""``train --crops``: images of a folder are trained on at their own resolution."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from data_files import save_image
from torch import nn

from sparse_training.__main__ import main
from sparse_training.files import read_json

pytest.importorskip("PIL")

SHAPES = set()
TRAIN = ["train", "--data", "imagefolder", "--model", "test_crops:model", "--batch-size", "4", "--steps", "6"]


class Seen(nn.Module):
    """Remembers the shapes of the images."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        SHAPES.add(tuple(images.shape[1:]))
        out: torch.Tensor = self.linear(images.mean((2, 3)))
        return out


def model(shape: tuple[int, int, int], classes: int) -> nn.Module:
    assert shape == (3, 24, 24)
    return Seen(classes)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for part, count in (("train", 8), ("val", 3)):
        for number in range(count):
            for name, color in (("ant", (200, 0, 0)), ("bee", (0, 0, 200))):
                save_image(tmp_path / f"images/{part}/{name}/{number}.png", color, size=(40 + number, 30))
    return tmp_path / "images"


@pytest.mark.parametrize("policy", ["infobatch", "random"])
def test_images_of_any_size_are_cropped_and_read_when_they_are_needed(
    policy: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SHAPES.clear()
    (folder / "train/ant/3.png").write_bytes(b"damaged")
    line = [*TRAIN, "--root", str(folder), "--crops", "24", "--workers", "0", "--out", "out", "--policy", policy]
    assert main([*line, "--validation", "0.25"]) == 0
    assert list(SHAPES) == [(3, 24, 24)]
    result = read_json(Path("out/result.json"))
    assert 0.0 <= result["test"]["accuracy"] <= 1.0
    assert result["settings"]["crops"] == 24
    lost = f"1 image that could not be decoded left out: {folder / 'train/ant/3.png'}"
    assert lost in result["run"]["warnings"]
    capsys.readouterr()
    assert main(["resume", "--trust-code", "out", "--steps", "9"]) == 0
    assert read_json(Path("out/result.json"))["run"]["steps"] == 9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "have sizes from 40x30 to 47x30 pixels; give the side that all are resized to"),
        (["--crops", "24", "--image-size", "24"], "give --crops or --image-size, not both"),
        (["--crops", "24", "--data", "digits"], "--crops is for --data imagefolder"),
        (["--workers", "2"], "--workers is for --crops"),
        (["--crops", "0"], "0 is not in the range"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = [] if "digits" in arguments else ["--root", str(folder)]
    assert main([*TRAIN, *root, *arguments, "--out", "out"]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not Path("out").exists()
