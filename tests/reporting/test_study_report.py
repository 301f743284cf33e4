"""A study's page: what is drawn and said is what its runs hold, and nothing else."""

import copy
import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console
from study_parts import COSTS, make

from sparse_training.experiments import runner
from sparse_training.experiments.formats import STUDY
from sparse_training.experiments.study import study_result
from sparse_training.reporting import pages, plots, study_plots, tables
from sparse_training.reporting import study as study_words
from sparse_training.reporting.result import read_result

METHODS = ("random", "random-again", "infobatch", "gate")


class Page(HTMLParser):
    """The text under each heading with its spaces made one, the rows of the tables, and the titles of the figures."""

    def __init__(self, text):
        super().__init__()
        self.text, self.rows, self.figures, self.open = "", [], [], []
        self.path = []
        self.feed(re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", text, flags=re.DOTALL))
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        if tag in ("meta", "img", "br"):
            return
        self.path.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag == "figcaption":
            self.figures.append("")
        if tag == "summary":
            self.open.append([False, ""])
        if tag == "details":
            self.opened = any(name == "open" for name, _ in attrs)

    def handle_endtag(self, tag):
        self.path.pop()

    def handle_data(self, data):
        self.text += data
        if {"th", "td"} & set(self.path):
            self.rows[-1][-1] += data
        if "figcaption" in self.path:
            self.figures[-1] += data
        if "summary" in self.path:
            self.open[-1] = [self.opened, self.open[-1][1] + data]

    def row(self, first, *, columns):
        """The cells of the one row of so many that starts with that word."""
        (found,) = (row for row in self.rows if row[0] == first and len(row) == columns)
        return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of two tasks as it is read from its file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "calibrate", lambda *_, **__: COSTS)
        study = make(tmp_path_factory.mktemp("study") / "one", tasks=("clean", "noise"), methods=METHODS)
        study.run()
        pages.write_study(study_result(study), study.folder)
    return read_result(study.folder / STUDY.file, STUDY)


@pytest.fixture
def result(finished):
    return copy.deepcopy(finished)


def whole_runs(result):
    return [
        (arm, run) for task in result["tasks"].values() for arm, by in task["arms"].items() for run in by["1"]
    ]  # fmt: skip


NO_ENERGY = "No energy was measured, and a skipped row is not counted as energy."


def test_no_energy_is_said_where_none_was_measured_though_operations_were_counted(result):
    page = Page(pages.study_page(result))
    assert NO_ENERGY in page.text
    assert "joules" not in page.text
    flops = [run["flops"]["counted"] for arm, run in whole_runs(result) if arm == "gate"]
    assert page.row("gate", columns=2)[1] == f"{1e-9 * sum(flops) / len(flops):,.4g}"
    for _, run in whole_runs(result):
        del run["joules"], run["flops"]  # as before either was recorded
    page = Page(pages.study_page(result))
    assert NO_ENERGY in page.text
    assert "Energy and work" not in page.text


def test_joules_are_shown_with_their_meter(result):
    for arm, run in whole_runs(result):
        if arm != "random":
            run["joules"] = {"measured": 1000.0 + 10.0 * run["seed"] + len(arm), "by": "a meter of package 0"}
    page = Page(pages.study_page(result))
    energy = {row[0]: row for row in page.rows[page.rows.index(["method", "joulesmeasured", "FLOPscounted, 10⁹"]) :]}
    assert energy["gate"][1] == "1,009"
    assert energy["random"][1] == "–"
    assert ["method", "joulesmeasured", "FLOPscounted, 10⁹"] in page.rows
    assert "Joules are measured (a meter of package 0), without evaluation" in page.text
    assert "No energy" not in page.text


def test_ceilings_are_those_of_a_step_on_all_rows_offered(result):
    page = Page(pages.study_page(result))
    # By COSTS: 64 rows offered, 16 kept; dense 0.64 + 6.4 s, gate 0.64 + 1.92 + 1.6.
    assert page.row("gate", columns=11)[7:] == ["1.69×", "0.90", "1.82×", "93 %"]
    assert page.row("random", columns=11)[7:] == ["4.00×", "0.00", "4.00×", "100 %"]
    assert page.row("infobatch", columns=11)[7:] == ["–"] * 4
    assert "no speed-up is known" not in page.text
    result["calibration"]["ceilings"] = {}
    assert "no speed-up is known" in Page(pages.study_page(result)).text


@pytest.mark.slow
def test_rate_threshold_and_mass_are_drawn_and_old_results_lack_the_mass(result):
    page = Page(pages.study_page(result))
    assert page.figures.count("Gradient norm of the rows kept") == 1
    assert {"rate", "threshold", "mass"} <= set(study_plots.figures(result))
    for _, run in whole_runs(result):
        for point in run["trace"]:
            del point["mass"]
    page = Page(pages.study_page(result))
    assert {"Rows kept", "Threshold"} <= set(page.figures)
    assert "Gradient norm of the rows kept" not in page.figures
    assert "recorded no gradient-norm share" in page.text
    for _, run in whole_runs(result):
        run["trace"] = []
    assert "The controller" not in Page(pages.study_page(result)).text


def test_each_traced_value_is_drawn_where_it_was(result):
    (trace, *_) = (run["trace"] for arm, run in whole_runs(result) if arm == "gate")
    assert all(0.0 < point["mass"] <= 1.0 for point in trace)
    gate = result["tasks"]["clean"]["arms"]["gate"]["1"]
    figure = plots.Figure()
    drawn = plots._traces(figure.add_subplot(), {"arms": {"gate": {"runs": gate}}}, "mass", 100)
    assert [list(line) for line in drawn] == [[100 * point["mass"] for point in run["trace"]] for run in gate]


def test_precision_at_100_stands_beside_chance(result):
    page = Page(pages.study_page(result))
    gate = [run["planted"]["selected most"] for run in result["tasks"]["noise"]["arms"]["gate"]["1"]]
    assert "Precision at 100: how many of the first hundred rows are wrong labels" in page.text
    assert page.row("gate", columns=4)[1] == f"{50 * sum(gate):.0f} %"
    assert page.row("by chance", columns=4)[1:] == ["20 %"] * 3


def test_the_gallery_with_most_planted_rows_is_open_and_random_ones_are_last(result):
    galleries = result["tasks"]["noise"]["galleries"]
    for gallery in galleries.values():
        for shown in gallery.values():
            for row in shown:
                row["planted"] = False
    for row in galleries["infobatch"]["highest loss"][:7]:
        row["planted"] = True
    noise = Page(pages.study_page(result)).open[-len([1 for found in galleries.values() for _ in found]) :]
    assert [said for opened, said in noise if opened] == ["infobatch: highest loss (7 of 12 wrong labels)"]
    assert ["random" in said for _, said in noise] == sorted("random" in said for _, said in noise)


def test_the_table_of_the_terminal_is_whole(result):
    console = Console(width=60, record=True, file=io.StringIO())
    tables.print_study(result, console)
    words = " ".join(console.export_text().split())
    for row in study_words.study_rows(result):
        assert " ".join(cell for cell in row[1:] if cell) in words


def test_neither_a_bad_beginning_nor_an_arm_that_failed_sets_the_scale():
    def runs(*accuracies):
        evals = [{"seconds": float(second), "accuracy": found} for second, found in enumerate(accuracies, 1)]
        return [{"seed": 0, "seconds": float(len(evals)), "accuracy": accuracies[-1], "evals": evals[:-1]}]

    arms = {
        "random": runs(0.1, 0.8, 0.89, 0.90),
        "adaptive": runs(0.2, 0.81, 0.9, 0.91),
        "gate": runs(0.1, 0.3, 0.2, 0.25),
    }
    result = {"arms": {arm: {"runs": some} for arm, some in arms.items()}, "late": study_plots.LATE}
    result["baseline"] = "random"
    ax, beside = plots.Figure().add_subplot(), plots.Figure().add_subplot()
    plots.PANELS["accuracy"](ax, result)
    study_plots._differences(beside, result, None)
    low, high = ax.get_ylim()
    assert 70 < low < 80 < 91 < high < 95
    assert [text.get_text() for text in ax.texts] == ["gate 25.0 % ↓", "random 90.0 %", "adaptive 91.0 %"]
    assert [text.get_text() for text in beside.texts] == ["← −65"]
    assert beside.get_xlim()[0] > -5
