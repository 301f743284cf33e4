"""The page of a training run: what it says is what the run's folder holds, and it says it safely."""

import json
import re

import pytest

from sparse_training.__main__ import main

TRAIN = ["train", "--model", "cnn-tiny", "--steps", "24", "--evaluations", "4", "--seed", "3", "--out", "out"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def page_of(folder):
    """The page's words, and the titles of its figures."""
    text = (folder / "report.html").read_text()
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert text.count("<svg ") == len(titles)
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    return text, titles


def table_rows(text, heading):
    part = text.split(f"<h2>{heading}")[1].split("</table>")[0]
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", part)[1:]]


def test_the_page_holds_curves_rows_phases_evaluations_and_settings(here, capsys):
    assert main([*TRAIN, "--policy", "gate", "--rate", "0.25"]) == 0
    capsys.readouterr()
    assert main(["report", "out"]) == 0
    assert "written: out/report.html" in capsys.readouterr().out
    text, titles = page_of(here / "out")
    run = json.loads((here / "out" / "result.json").read_text())["run"]
    assert titles == [
        "Accuracy on 10% of the training rows",
        "Loss on 10% of the training rows",
        "Rows kept in the sparse phase",
        "Threshold",
        "Share of the gradient norm kept",
    ]
    seen, trained = run["rows_seen"], run["rows_trained"]
    counts = {name: number for name, number, _ in table_rows(text, "Rows")}
    assert counts == {"offered": f"{seen:,}", "trained on": f"{trained:,}", "skipped": f"{seen - trained:,}"}
    phases = dict(table_rows(text, "Phases"))
    assert list(phases) == ["dense start", "sparse", "dense end"]
    assert sum(map(int, phases.values())) == 24
    evaluations = table_rows(text, "Evaluations on 10% of the training rows")
    assert [int(row[0]) for row in evaluations] == [6, 12, 18, 24]
    assert [row[2] for row in evaluations] == [f"{one['accuracy']:.4f}" for one in run["evals"]]
    assert "<dt>rate</dt><dd>0.25</dd>" in text
    assert "<dt>seed</dt><dd>3</dd>" in text


def test_announcements_and_warnings_are_on_the_page_and_escaped(here):
    assert main(TRAIN) == 0
    path = here / "out" / "result.json"
    result = json.loads(path.read_text())
    result["run"]["notes"] = ["<b>classes</b> are balanced"]
    result["run"]["warnings"] = ["<i>rows</i> have no numbers"]
    result["settings"]["model"] = "<script>"
    path.write_text(json.dumps(result))
    assert main(["report", "out"]) == 0
    text, _ = page_of(here / "out")
    assert "<li>&lt;b&gt;classes&lt;/b&gt; are balanced</li>" in text
    assert "<li>&lt;i&gt;rows&lt;/i&gt; have no numbers</li>" in text
    assert "<script>" not in text


def test_a_run_of_an_older_version_or_without_finite_numbers_has_a_page(here, capsys):
    assert main(TRAIN) == 0
    path = here / "out" / "result.json"
    result = json.loads(path.read_text())
    for name in ("environment", "policy", "test"):
        del result[name]
    for name in ("phases", "trace", "notes", "stopped"):
        del result["run"][name]
    for one in result["run"]["evals"]:
        one["loss"] = float("nan")
    path.write_text(json.dumps(result))
    assert main(["report", "out"]) == 0
    text, titles = page_of(here / "out")
    assert titles == ["Accuracy on 10% of the training rows", "Loss on 10% of the training rows"]
    assert "<h2>Phases" not in text


@pytest.mark.parametrize(
    ("where", "wrong", "words"),
    [
        ("phases", {"warmup": "x"}, "/run/phases/warmup is 'x'"),
        ("phases", [], "/run/phases is not an object"),
        ("trace", [{"rate": 0.5}], "/run/trace[0] lacks 'step'"),
        ("trace", [{"step": 1, "rate": "x"}], "/run/trace[0]/rate is 'x'"),
        ("notes", [3], "/run/notes[0] is '3'"),
        ("notes", "x", "/run/notes is not a list"),
    ],
)
def test_a_part_of_something_else_is_one_line(here, capsys, where, wrong, words):
    assert main(TRAIN) == 0
    path = here / "out" / "result.json"
    result = json.loads(path.read_text())
    result["run"][where] = wrong
    path.write_text(json.dumps(result))
    capsys.readouterr()
    assert main(["report", "out"]) == 2
    assert capsys.readouterr().err == f"error: out/result.json is no result of a training run: {words}\n"
    assert not (here / "out" / "report.html").exists()


@pytest.mark.parametrize("part", ["environment", "test"])
def test_a_part_of_the_file_that_is_no_object_is_one_line(here, capsys, part):
    assert main(TRAIN) == 0
    path = here / "out" / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), part: [1]}))
    capsys.readouterr()
    assert main(["report", "out"]) == 2
    assert (
        capsys.readouterr().err == f"error: out/result.json is no result of a training run: /{part} is not an object\n"
    )
