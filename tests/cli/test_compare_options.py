"""``compare`` trains with the optimizer, schedule and augmentation that ``train`` would."""

import json
import math

import pytest
import torch
from short_calibration import short_calibration
from torch import nn

from sparse_training.__main__ import main
from sparse_training.cli import compare, train
from sparse_training.cli.recipe import RECIPE
from sparse_training.data.load import load_data
from sparse_training.errors import UserError
from sparse_training.experiments.compare import comparison_design, comparison_runner

SHOWN = []


class Shown(nn.Module):
    """Remembers the images that it trains on."""

    def __init__(self, shape, classes):
        super().__init__()
        self.linear = nn.Linear(math.prod(shape), classes)

    def forward(self, images):
        if self.training:
            SHOWN.append(images.detach().clone())
        return self.linear(images.flatten(1))


def model(shape, classes):
    return Shown(shape, classes)


COMPARE = ["compare", "--model", "test_compare_options:model", "--methods", "dense,random", "--seeds", "1"]
COMPARE += ["--seconds", "0.02", "--batch-size", "256"]
OPTIONS = ["--optimizer", "sgd", "--momentum", "0.5", "--weight-decay", "0.01", "--lr", "0.1"]
OPTIONS += ["--schedule", "constant", "--lr-warmup", "0.25", "--augment", "flip,shift:1"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short_calibration(monkeypatch)
    return tmp_path


def test_train_and_compare_have_the_same_options_with_the_same_defaults():
    def options(command):
        return {one.name: (one.opts, one.default, str(one.type), one.help) for one in command.params}

    ours, theirs = options(compare.command), options(train.command)
    names = ["optimizer", "weight_decay", "momentum", "schedule", "lr_warmup", "augment", "amp"]
    assert len(names) == len(RECIPE)
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
    assert ours["image_size"] == theirs["image_size"]


def test_the_result_says_what_the_runs_were_trained_with(here):
    assert main([*COMPARE, *OPTIONS, "--out", "out"]) == 0
    settings = json.loads((here / "out" / "compare.json").read_text())["settings"]
    said = {"optimizer": "sgd", "momentum": 0.5, "weight_decay": 0.01, "schedule": "constant", "lr_warmup": 0.25}
    assert {name: settings[name] for name in said} == said
    assert settings["augment"] == "flip,shift:1"
    assert "<dt>optimizer</dt><dd>sgd</dd>" in (here / "out" / "report.html").read_text()


def test_the_trainers_of_a_comparison_have_them():
    design = comparison_design(
        ("dense", "infobatch"), optimizer="sgd", momentum=0.5, weight_decay=0.01, lr=0.1, schedule="constant",
        lr_warmup=0.25, augment="flip", model="test_compare_options:model",
    )  # fmt: skip
    runner = comparison_runner(load_data("digits"), design)
    for method in design.methods:
        trainer, loader = runner.make(runner.task("clean"), method, 0)
        assert type(trainer.optimizer) is torch.optim.SGD
        group = trainer.optimizer.param_groups[0]
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.5, 0.01)
        assert trainer.schedule.factor(0.125) == pytest.approx(0.55)  # half of the rise from a tenth
        assert trainer.schedule.factor(0.9) == 1.0
        SHOWN.clear()
        trainer.model.train()
        images = loader.load(next(iter(loader))).inputs
        trainer.model(images)
        flipped = [torch.equal(seen, image.flip(-1)) for seen, image in zip(SHOWN[0], images, strict=True)]
        assert 0 < sum(flipped) < len(flipped)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--momentum", "0.5"], "`momentum` must be of sgd and rmsprop, not of adamw"),
        (["--optimizer", "sgd", "--momentum", "1"], "`momentum` must be in [0, 1), got 1.0"),
        (["--augment", "spin"], "augmentation must be flip, shift or shift:PIXELS"),
        (["--optimizer", "lion"], "'lion' is not one of"),
        (["--lr-warmup", "2"], "2"),
        (["--image-size", "64"], "image"),
    ],
)
def test_what_cannot_be_served_is_one_line_before_the_folder_is_made(here, capsys, options, words):
    assert main([*COMPARE, *options, "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not (here / "out").exists()


def test_a_folder_goes_on_with_what_it_was_made_with_alone(tmp_path):
    data, folder = load_data("digits"), tmp_path / "out"
    design = {"methods": ("dense",), "model": "test_compare_options:model", "seconds": 0.02, "seeds": (0,)}

    def runner(**options):
        return comparison_runner(data, comparison_design(**design, **options), folder=folder, resume=True)

    runner(augment="flip", optimizer="sgd").store._make()
    with pytest.raises(UserError, match="optimizer sgd is now adamw, augment flip is now None"):
        runner()
    # The settings of an older version name none of these: it had the defaults.
    path = folder / "settings.json"
    names = ("optimizer", "weight_decay", "momentum", "schedule", "lr_warmup", "augment")
    made = {name: value for name, value in json.loads(path.read_text()).items() if name not in names}
    path.write_text(json.dumps(made))
    runner()
    with pytest.raises(UserError, match=r"lr_warmup .* is now 0.5"):
        runner(lr_warmup=0.5)
