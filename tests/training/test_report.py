"""The report: what it says is worked out from the numbers, and it says it safely."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from sparse_training import files
from sparse_training.errors import UserError
from sparse_training.experiments.formats import COMPARISON, STUDY
from sparse_training.reporting import comparison, energy, pages, plots, tables
from sparse_training.reporting import result as result_files

EVIL = "$\\frac{$<script>alert('x')</script> & \""


def make_picture(seed):
    """A base64 PNG, 8 x 8, grey."""
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def make_run(arm, seed, final, step_seconds, rate=0.1, evals=12):
    """A run that learns along 1 - exp(-t) and, for the gate, moves a threshold."""
    noise = np.random.default_rng([seed, len(arm)])
    seconds, warmup, anneal = 20.0 + 0.01 * seed, 300, 280
    sparse = int((seconds - (warmup + anneal) * 0.008) / step_seconds) if arm != "dense" else 1900
    steps = warmup + sparse + anneal
    times = np.linspace(seconds / evals, seconds, evals) - 0.05 * seed * (evals > 1)
    accuracy = 0.1 + (final - 0.1) * (1 - np.exp(-times / 3)) + noise.normal(0, 0.012, evals)
    trace = []
    if arm == "gate":
        at = np.linspace(warmup, warmup + sparse, 300).astype(int)
        wave = rate + 0.5 * np.exp(-np.arange(300) / 6) + noise.normal(0, 0.004, 300)
        level = 2.4 * np.exp(-np.arange(300) / 80) + 0.02 + noise.normal(0, 0.002, 300)
        trace = [
            {"step": int(s), "rate": float(r), "threshold": float(t), "mass": min(1.0, 3 * float(r))}
            for s, r, t in zip(at, wave, level, strict=True)
        ]
    reached = {"gate": 1.03 * rate, "random": rate}.get(arm)
    return {
        "seed": seed,
        "accuracy": float(final + 0.003 * (seed - 1)),
        "seconds": seconds,
        "raw_seconds": seconds * 1.17,
        "steps": steps,
        "rows_seen": steps * 128,
        "rows_trained": int(128 * (warmup + anneal + sparse * (reached or 1))),
        "rate": reached,
        "phases": {"warmup": warmup, "sparse": sparse, "anneal": anneal},
        "evals": [
            {
                "seconds": float(t),
                "step": int(steps * t / seconds),
                "accuracy": float(a),
                "loss": 0.3,
            }
            for t, a in zip(times, accuracy, strict=True)
        ],
        "trace": trace,
        "target": rate if arm != "dense" else None,
        "warnings": ["the threshold is saturated"] if arm == "gate" and seed == 2 else [],
    }


def make_result(arms=("dense", "random", "gate"), seeds=(0, 1, 2), finals=None, **kwargs):
    """A whole result, with the means and deviations that its runs have."""
    finals = finals or {"dense": 0.931, "random": 0.950, "gate": 0.947}
    times = {
        "dense": {"load": 2e-4, "score": 0.0, "select": 0.0, "train": 7.8e-3, "total": 8e-3},
        "random": {"load": 2e-4, "score": 0.0, "select": 1e-4, "train": 1.3e-3, "total": 1.6e-3},
        "gate": {"load": 2e-4, "score": 1.7e-3, "select": 2e-4, "train": 1.3e-3, "total": 3.4e-3},
    }
    times = {arm: times.get(arm, times["gate"]) for arm in arms}
    result = {
        "format": "sparse-training-compare",
        "version": 1,
        "created": "2025-05-04T10:11:12Z",
        "command": "sparse-train compare --data digits --seconds 20",
        "environment": {
            "python": "3.11.2",
            "torch": "2.13.0",
            "sparse_kernels": "0.1.0",
            "device": "cpu",
            "cpu": "Example CPU @ 2.0 GHz",
            "threads": 2,
            "backends": {"gate_rows": "cpp (avx2)", "compact": "cpp", "gather_rows": "cpp"},
        },
        "settings": {
            "data": "digits",
            "source": "scikit-learn, 1,797 images",
            "model": "cnn-620k",
            "parameters": 620362,
            "rate": 0.1,
            "batch_size": 128,
            "seconds": 20.0,
            "seeds": list(seeds),
            "lr": 1e-3,
            "dense_start": 0.05,
            "dense_end": 0.125,
            "precision": "bfloat16",
            "train_rows": 1437,
            "test_rows": 360,
        },
        "calibration": {"rounds": 40, "arms": times},
        "speedup": {},
        "arms": {},
        "gallery": {"arm": "gate", "most": [], "least": []},
    }
    for arm in arms:
        runs = [make_run(arm, seed, finals.get(arm, 0.9), times[arm]["total"], **kwargs) for seed in seeds]
        accuracy = [run["accuracy"] for run in runs]
        result["arms"][arm] = {
            "runs": runs,
            "summary": {
                "accuracy_mean": float(np.mean(accuracy)),
                "accuracy_std": float(np.std(accuracy, ddof=1)) if len(runs) > 1 else 0.0,
                "seconds_mean": float(np.mean([run["seconds"] for run in runs])),
                "raw_seconds_mean": float(np.mean([run["raw_seconds"] for run in runs])),
                "rows_trained_mean": float(np.mean([run["rows_trained"] for run in runs])),
                "rate_mean": runs[0]["rate"],
            },
        }
        if arm == "gate":
            result["speedup"][arm] = {
                "measured": 8 / 3.4,
                "ceiling": 3 / 1.3,
                "scorer_cost": 0.64,
                "own_ceiling": 3 / (0.64 + 0.3),
            }
        elif arm == "random":
            result["speedup"][arm] = {"measured": 5.0, "ceiling": 10.0}
    for name, base in (("most", 40), ("least", 0)):
        result["gallery"][name] = [
            {
                "index": 10 * i + base,
                "label": i % 10,
                "class": f"class {i % 10}",
                "selected": base + 16 - i,
                "seen": 61,
                "png": make_picture(i + base),
            }
            for i in range(16)
        ]
    return result


def evil():
    """Markup and mathematics wherever a string may stand; one seed, evaluated once."""
    result = make_result(arms=("dense", EVIL), seeds=(0,), evals=1)
    result["command"] = result["settings"]["data"] = result["settings"]["model"] = EVIL
    result["settings"][EVIL] = result["environment"]["cpu"] = result["created"] = EVIL
    result["environment"]["backends"] = {EVIL: EVIL}
    result["gallery"]["arm"] = EVIL
    for key in result["gallery"]["most"][0]:
        result["gallery"]["most"][0][key] = EVIL
    result["speedup"][EVIL] = make_result()["speedup"]["gate"]
    result["arms"][EVIL]["runs"][0]["warnings"] = [EVIL]
    result["arms"][EVIL]["runs"][0]["trace"] = [{"step": 9, "rate": 0.1, "threshold": 1.0}]
    return result


def unwrap():
    """One arm; nothing timed, traced, evaluated or shown, and no accuracy to be had."""
    result = make_result(arms=("gate",))
    result.update(gallery={}, speedup={}, calibration={"rounds": 0, "arms": {}})
    result["environment"].pop("backends")
    for arm in result["arms"].values():
        arm["summary"].update(accuracy_mean=None, accuracy_std=None)
        for run in arm["runs"]:
            run.update(accuracy=None, trace=[], evals=[])
    return result


def diverged():
    """A gate whose loss went to infinity."""
    result = make_result()
    result["arms"]["gate"]["summary"].update(accuracy_mean=math.nan, accuracy_std=None)
    for run in result["arms"]["gate"]["runs"]:
        run["accuracy"] = None
        for point in run["evals"]:
            point.update(accuracy=math.nan, loss=math.inf)
        for point in run["trace"]:
            point.update(threshold=None)
    return result


RESULT = make_result()
CASES = {"whole": RESULT, "evil": evil(), "bare": unwrap(), "diverged": diverged()}
STYLE = dict(matplotlib.rcParams)


@pytest.fixture(scope="module", params=CASES)
def written(request, tmp_path_factory):
    """A result and the paths of its three files; drawing takes a second, so once for all tests."""
    folder = tmp_path_factory.mktemp(request.param) / "new" / "run"
    return CASES[request.param], pages.write_comparison(CASES[request.param], folder)


def table(result, width=100, encoding="utf-8"):
    """What the table prints into a file of this many columns."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    tables.print_comparison(result, Console(file=stream, width=width))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


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


# --- words --------------------------------------------------------------------------------------


def test_headline_states_every_arm_and_the_winner():
    assert comparison.headline(RESULT) == (
        "At equal time (20 s), dense reached 93.1 ± 0.3 %, random reached 95.0 ± 0.3 % and "
        "gate reached 94.7 ± 0.3 % (mean ± standard deviation over 3 seeds): random is highest; "
        "its lead over dense (1.9 points) is larger than the deviation, over gate (0.3 points) "
        "it is not."
    )


@pytest.mark.parametrize(
    ("finals", "words"),
    [
        ({"dense": 0.90, "random": 0.91, "gate": 0.95}, "gate is best; its lead over dense (5 poi"),
        (
            {"dense": 0.901, "random": 0.9, "gate": 0.9},
            "dense is highest; its lead over random",
        ),
        (
            {"dense": 0.95, "random": 0.90, "gate": 0.80},
            "dense is best; its lead over random (5 po",
        ),
    ],
)
def test_verdict_is_fair_to_each(finals, words):
    assert comparison.verdict(make_result(finals=finals)).startswith(words)


def test_a_lead_counts_only_above_the_deviation_of_the_difference():
    result = make_result(arms=("dense", "gate"), finals={"dense": 0.90, "gate": 0.90435})
    # Each arm's deviation is 0.3 points, the difference's 0.424: a lead of 0.435 is larger.
    assert "is larger" in comparison.verdict(result)
    result["arms"]["gate"]["summary"]["accuracy_mean"] -= 0.0002
    assert "is not larger" in comparison.verdict(result)


def test_unequal_time_is_not_called_equal():
    result = make_result()
    result["arms"]["gate"]["summary"]["seconds_mean"] = 25.0
    words = "At unequal time (dense 20 s, random 20 s and gate 25 s), dense"
    assert comparison.headline(result).startswith(words)


def test_one_seed_or_one_arm_claims_nothing():
    assert "one seed says nothing" in comparison.headline(make_result(seeds=(0,)))
    assert "±" not in comparison.headline(make_result(seeds=(0,)))
    assert "nothing to compare" in comparison.headline(make_result(arms=("gate",)))
    assert "itself uncertain" in " ".join(comparison.findings(make_result(seeds=(0, 1))))
    assert "no method has a finite accuracy" in comparison.headline(CASES["bare"])


def test_an_arm_without_accuracy_is_not_passed_over():
    assert "gate reached no finite accuracy" in comparison.headline(CASES["diverged"])
    assert "random is best; its lead over dense" in comparison.headline(CASES["diverged"])


def test_an_unknown_deviation_makes_no_lead_clear():
    result = make_result()
    for arm in result["arms"].values():
        arm["summary"]["accuracy_std"] = None
    assert "is not larger than the deviation" in comparison.verdict(result)


def test_a_missed_rate_is_said():
    assert "target of 10 % was met" in " ".join(comparison.findings(RESULT))
    missed = make_result()
    missed["arms"]["gate"]["summary"]["rate_mean"] = 0.13
    assert "13.0 % of the rows" in " ".join(comparison.findings(missed))
    assert "missed by more than 1 point" in " ".join(comparison.findings(missed))


# --- table --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_table_is_whole_and_plain_at_any_width(width):
    text = table(RESULT, width)
    gate = next(line for line in text.splitlines() if line.startswith("gate"))
    assert gate.split() == [
        *("gate", "94.7", "±", "0.3", "20.0", "23.4", "133,831", "10.3", "(10)"),
        *("2.35×", "2.31×", "5,100"),
    ]
    dense = next(line for line in text.splitlines() if line.startswith("dense"))
    assert dense.split()[-4:] == ["–", "1.00×", "1.00×", "2,480"]
    words = " ".join(text.split())
    assert "s = 0.64" in words
    assert "3/(s+3r) = 3.19×, of which 74 % is reached" in words
    assert "gate_rows cpp (avx2)" in words
    assert "warning: gate, seed 2: the threshold is saturated" in words
    assert "…" not in text
    assert "\x1b" not in text
    if width >= 80:
        assert max(map(len, text.splitlines())) <= width


def test_table_goes_where_only_ascii_goes():
    assert "94.7 +- 0.3" in table(RESULT, encoding="ascii")


def test_same_warning_of_several_seeds_is_one_line():
    result = make_result()
    for run in result["arms"]["gate"]["runs"]:
        run["warnings"] = ["slow"]
    assert comparison.warnings(result) == ["gate, seed 0, 1, 2: slow"]


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
        (b"", "is not JSON"),
        (b'{"format": "sparse-train', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
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
    (tmp_path / kind.file).write_bytes(result_files.to_json(recorded))
    assert result_files.find_result(tmp_path) == (kind, recorded)
    assert json.loads((RECORDS / name).read_text()) == recorded


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none.json.*No such file"):
        read_comparison(tmp_path / "none.json")
