"""The figure, the page and the files of a comparison."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from comparison_results import CASES, RESULT, make_result, table
from PIL import Image

from sparse_training import files
from sparse_training.errors import UserError
from sparse_training.experiments.formats import COMPARISON, STUDY
from sparse_training.reporting import comparison, energy, pages, plots
from sparse_training.reporting import result as result_files

STYLE = dict(matplotlib.rcParams)


@pytest.fixture(scope="module", params=CASES)
def written(request, tmp_path_factory):
    """A result and the paths of its three files; drawing takes a second, so once for all tests."""
    folder = tmp_path_factory.mktemp(request.param) / "new" / "run"
    return CASES[request.param], pages.write_comparison(CASES[request.param], folder)


def read_comparison(path):
    return result_files.read_result(path, COMPARISON)


class Page(HTMLParser):
    """The elements, the text with its spaces made one, and all that could be fetched."""

    FETCHES = ("src", "srcset", "href", "xlink:href", "data", "poster", "action")

    def __init__(self, text):
        super().__init__()
        self.tags, self.fetched, self.text = [], [], ""
        self.feed(text)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for key, value in attrs if key in self.FETCHES]

    def handle_data(self, data):
        self.text += data


# --- figure -------------------------------------------------------------------------------------


def test_bands_are_over_the_span_that_all_runs_cover():
    a = (np.array([0.0, 1, 2, 3]), np.array([0.0, 10, 20, 30]))
    b = (np.array([0.5, 2.5]), np.array([7.0, 27.0]))
    seconds, mean, deviation = plots.common_curve([a, b])
    np.testing.assert_allclose(seconds, [0.5, 1, 2, 2.5])
    np.testing.assert_allclose(mean, [6, 11, 21, 26])
    np.testing.assert_allclose(deviation, [math.sqrt(2)] * 4)


def test_png_has_its_size_and_is_not_blank(written):
    _, (_, path, _) = written
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (1800, 1152)
        pixels = np.asarray(image.convert("L"))
    assert pixels.max() == 255
    assert (pixels < 128).mean() > 0.002


def test_arms_have_their_colours_in_the_figure(written):
    result, (_, path, _) = written
    known = {"dense": (0x7F, 0x7F, 0x7F), "random": (0xD5, 0x5E, 0x00), "gate": (0x00, 0x72, 0xB2)}
    with Image.open(path) as image:
        seen = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    drawn = {arm for arm in result["arms"] if result["arms"][arm]["runs"][0]["accuracy"]}
    assert {known[arm] for arm in drawn & known.keys()} <= seen


def test_style_of_the_caller_is_left_alone(written):
    assert dict(matplotlib.rcParams) == STYLE


# --- page ---------------------------------------------------------------------------------------


def test_page_fetches_nothing_and_lets_no_input_through(written):
    result, (_, _, path) = written
    text = path.read_text("utf-8")
    parsed = Page(text)
    assert "http://" not in text
    assert "https://" not in text
    assert "url(//" not in text
    assert not {"script", "link", "iframe", "object", "base"} & set(parsed.tags)
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in parsed.fetched)
    assert "<script" not in text
    assert parsed.tags.count("svg") == len(plots.PANELS)
    assert comparison.headline(result) in parsed.text
    assert not re.search(r"\b(nan|inf|None)\b", parsed.text)


def test_page_holds_table_gallery_and_circumstances(written):
    result, (_, _, path) = written
    parsed = Page(path.read_text("utf-8"))
    words = ["calibrated clock", "measured", "counted", "620,362"]
    words += [cell for row in comparison.table_rows(result) for cell in row]
    if result is RESULT:
        words += ["3.400", "3.19×", "over 40 rounds", "56 of 61", "class 3", "cpp (avx2)"]
    assert [word for word in words if word not in parsed.text] == []
    assert parsed.tags.count("img") == (32 if result["gallery"] else 0)
    assert ("Selected most" in parsed.text) == bool(result["gallery"])


def test_curves_of_validation_rows_are_not_titled_by_a_verdict_on_test_rows():
    validated = make_result()
    for arm in validated["arms"].values():
        for run in arm["runs"]:
            run["validation"] = 1.0 - run["accuracy"]
    titles, said = comparison.titles(validated), comparison.verdict(validated)
    assert titles["accuracy"] == "Accuracy on validation rows"
    assert titles["seeds"] == f"On test rows {said}"


def test_the_mass_is_drawn_where_it_is_known():
    assert comparison.titles(RESULT)["mass"].startswith("Gate's rows carry 3")
    (line, *_) = lines = plots.Figure().add_subplot(), plots.Figure().add_subplot()
    older = make_result()
    for run in older["arms"]["gate"]["runs"]:
        for point in run["trace"]:
            del point["mass"]
    for ax, result in zip(lines, (RESULT, older), strict=True):
        plots.PANELS["mass"](ax, result)
    assert [len(ax.get_lines()) for ax in lines] == [3, 0]
    trace = RESULT["arms"]["gate"]["runs"][0]["trace"]
    assert list(line.get_lines()[0].get_ydata()) == pytest.approx([100 * point["mass"] for point in trace])
    assert "carry" not in comparison.titles(older)["threshold"]


def test_energy_is_shown_where_it_was_measured_and_else_its_lack_is_said(undrawn):
    none = "No energy was measured, and a skipped row is not counted as energy."
    result = make_result()
    assert none in Page(pages.comparison_page(result)).text
    for name, arm in result["arms"].items():
        for run in arm["runs"]:
            run["flops"] = {"counted": 2e9 + 1e9 * run["seed"]}
            run["joules"] = {"measured": 40.0 + run["seed"] if name == "gate" else None, "by": "a meter"}
    text = Page(pages.comparison_page(result)).text
    assert none not in text
    assert "Joules are measured (a meter), without evaluation" in text
    assert energy.energy_rows({name: arm["runs"] for name, arm in result["arms"].items()}) == (
        [("dense", "–", "3"), ("random", "–", "3"), ("gate", "41", "3")],
        [("method", ""), ("joules", "measured"), ("FLOPs", "counted, 10⁹")],
    )
    for run in result["arms"]["gate"]["runs"]:
        run["joules"]["measured"] = None
    text = Page(pages.comparison_page(result)).text
    assert none in text
    assert "FLOPs" in text


# --- files --------------------------------------------------------------------------------------


def test_report_is_three_files_that_read_back(written):
    result, paths = written
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(pages.COMPARISON_FILES)
    loaded = read_comparison(paths[0])
    assert table(loaded) == table(result)
    assert result is not RESULT or loaded == result


def test_what_is_not_finite_is_null_in_the_file(written):
    result, (path, _, _) = written
    loaded = json.loads(path.read_text(), parse_constant=pytest.fail)
    if result is CASES["diverged"]:
        assert loaded["arms"]["gate"]["runs"][0]["evals"][0]["loss"] is None


@pytest.fixture
def undrawn(monkeypatch):
    """Stand-ins for the figures, for tests of something else."""
    monkeypatch.setattr(plots, "png", lambda *_: b"image")
    monkeypatch.setattr(plots, "svgs", lambda _: dict.fromkeys(plots.PANELS, "<svg></svg>"))


@pytest.mark.usefixtures("undrawn")
def test_png_and_page_are_written_whole(tmp_path):
    _, image, page = pages.write_comparison(RESULT, tmp_path)
    assert image.read_bytes() == b"image"
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.usefixtures("undrawn")
def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    old = dict.fromkeys(pages.COMPARISON_FILES, "old")
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(UserError, match=r"cannot be written: No space left on device"):
        pages.write_comparison(RESULT, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == old


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read as JSON"),
        (b'{"format": "sparse-train', "cannot be read as JSON"),
        (b"\xff\xfe\x00", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[1, 2]", "is not the result of a comparison"),
        (b'{"format": "other"}', "is not the result of a comparison"),
        (b'{"format": "sparse-training-compare", "version": 9}', "has version 9; this program reads version 1"),
        (b'{"format": "sparse-training-compare", "version": 1}', "lacks 'created'"),
    ],
)
def test_foreign_or_corrupt_files_are_refused_in_one_line(content, words, tmp_path):
    path = tmp_path / "compare.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_comparison(path)
    assert "\n" not in str(caught.value)
    assert "compare.json" in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda r: r["arms"]["gate"]["runs"][1].pop("seconds"), r"gate/runs\[1\] lacks 'seconds'"),
        (lambda r: r["arms"]["gate"].update(runs=[]), "no runs"),
        (lambda r: r.update(arms={}), "no runs"),
        (lambda r: r["arms"]["dense"]["runs"][0].update(evals="x"), "evals is not a list"),
        (lambda r: r["arms"]["dense"]["summary"].update(seconds_mean="x"), "seconds_mean is 'x'"),
        (lambda r: r.update(settings=[]), "settings is not an object"),
    ],
)
def test_damaged_results_are_refused(damage, words, tmp_path):
    result = make_result()
    damage(result)
    path = tmp_path / "compare.json"
    path.write_text(json.dumps(result))
    with pytest.raises(UserError, match=words):
        read_comparison(path)


RECORDS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("name", "kind"), [("fashion-mnist-2026-11-22.json", COMPARISON), ("study-fashion-mnist-2026-11-26.json", STUDY)]
)
def test_recorded_results_are_read(name, kind, tmp_path):
    recorded = result_files.read_result(RECORDS / name, kind)
    (tmp_path / kind.file).write_bytes((RECORDS / name).read_bytes())
    assert result_files.find_result(tmp_path) == (kind, recorded)
    before = json.loads((RECORDS / name).read_text())
    assert {key: recorded[key] for key in before if key not in ("score", "table", "tasks", "again")} == {
        key: before[key] for key in before if key not in ("score", "table", "tasks", "again")
    }
    for one, other in zip(recorded.get("table", ()), before.get("table", ()), strict=True):
        assert one == one | other
    write = pages.write_study if kind == STUDY else pages.write_comparison
    write(recorded, tmp_path)  # as `report` does: a record of an older version stays as it was
    assert json.loads((tmp_path / kind.file).read_text()) == before


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none.json: no such file"):
        read_comparison(tmp_path / "none.json")
