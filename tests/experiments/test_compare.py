"""Comparisons are fair, go on where they were interrupted, and say what the report needs."""

import io
import json
from base64 import b64decode

import pytest
import torch
from PIL import Image

from sparse_training.data.splits import ImageData, Split, split_validation
from sparse_training.errors import UserError
from sparse_training.experiments import runner as runners
from sparse_training.experiments.compare import compare, comparison_design
from sparse_training.experiments.formats import COMPARISON
from sparse_training.experiments.runner import Interrupted
from sparse_training.reporting.pages import write_comparison
from sparse_training.reporting.result import read_result
from sparse_training.training.clock import Costs

FLAT = {"score": ((1,), (0.5,)), "select": ((1,), (0.1,))}
FREE = {"score": ((1,), (0.0,)), "select": ((1,), (0.0,))}
COSTS = Costs(
    {"load": ((1, 64), (0.01, 0.2)), "train": ((1, 64), (0.1, 3.0))},
    {"dense": FREE, "random": FREE, "gate": FLAT, "importance": FREE, "infobatch": FREE},
    5,
)


def model(shape, classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(shape[1] * shape[2], classes))


def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (150,), generator=generator)
    images = torch.randint(0, 120, (150, 1, 8, 8), dtype=torch.uint8, generator=generator)
    images[:, 0, 0, :] += (40 * labels)[:, None].to(torch.uint8)
    train, test = Split(images[:100], labels[:100]), Split(images[100:], labels[100:])
    return ImageData.from_splits("stripes", train, test, ("a", "b", "c"), "made up")


@pytest.fixture(autouse=True)
def calibrated(monkeypatch):
    """Known costs instead of measured ones; how often they were asked for."""
    asked = []
    monkeypatch.setattr(runners, "calibrate", lambda *arguments, **options: asked.append(arguments) or COSTS)
    return asked


def run(**options):
    settings = {"model": f"{__name__}:model", "rate": 0.25, "seeds": (0, 1), "seconds": 60.0, "batch_size": 64}
    settings["methods"] = ("dense", "random", "gate")
    kept = {name: options.pop(name) for name in ("folder", "resume", "command", "progress", "stop") if name in options}
    return compare(data(), comparison_design(**{**settings, **options}), **kept)


def test_the_result_is_what_the_report_draws(tmp_path):
    result = run(command="sparse-train compare")
    write_comparison(result, tmp_path)
    loaded = read_result(tmp_path / "compare.json", COMPARISON)
    assert loaded["settings"]["parameters"] == 64 * 3 + 3
    assert loaded["settings"]["train_rows"] == 100
    assert set(loaded["environment"]["backends"]) >= {"gate_rows", "compact", "gather_rows"}


def test_policies_by_past_losses_are_arms_as_any_other(tmp_path):
    arms = ("dense", "random", "importance", "infobatch")
    result = run(methods=arms, evaluations=2)
    write_comparison(result, tmp_path)
    importance, infobatch = (result["arms"][name]["runs"][0] for name in arms[2:])
    assert (importance["target"], infobatch["target"]) == (0.25, None)
    assert importance["rate"] == pytest.approx(0.25, abs=0.01)
    share = result["arms"]["infobatch"]["summary"]["rate_mean"]
    assert 0.5 < share < 1.0
    speed = result["speedup"]
    assert speed["importance"] == speed["random"]  # nothing is scored, nothing else is loaded
    assert speed["infobatch"]["ceiling"] == 1 / share
    assert 1.0 < speed["infobatch"]["measured"] <= 1 / share
    assert "own_ceiling" not in speed["infobatch"]


def test_arms_spend_equal_time_on_the_clock_and_count_their_rows():
    result = run()
    assert list(result["arms"]) == ["dense", "random", "gate"]
    for name, arm in result["arms"].items():
        assert [found["seed"] for found in arm["runs"]] == [0, 1]
        for found in arm["runs"]:
            assert 60.0 <= found["seconds"] < 60.0 + COSTS.step("dense", 64, 64)["total"] + 1
            assert found["validation"] == found["evals"][-1]["accuracy"]  # the test rows are other ones, read once
            assert found["evals"][-1]["step"] == found["steps"] == sum(found["phases"].values())
            assert (found["rate"] is None) == (found["target"] is None) == (name == "dense")
            assert bool(found["trace"]) == (name == "gate")
        assert arm["summary"]["accuracy_mean"] == pytest.approx(sum(found["accuracy"] for found in arm["runs"]) / 2)
    steps = {name: arm["runs"][0]["steps"] for name, arm in result["arms"].items()}
    assert steps["dense"] < steps["gate"] < steps["random"]


def test_speedups_stand_beside_their_ceilings():
    result = run(seeds=(0,))
    stages = result["calibration"]["arms"]
    dense, gate, random = (stages[name] for name in ("dense", "gate", "random"))
    assert dense["total"] == pytest.approx(3.2)
    assert gate["total"] == pytest.approx(0.2 + 0.5 + 0.1 + gate["train"])
    assert random["score"] == random["select"] == 0.0
    speed = result["speedup"]
    assert speed["random"] == {"measured": pytest.approx(dense["total"] / random["total"]), "ceiling": 4.0}
    assert speed["gate"]["measured"] == pytest.approx(dense["total"] / gate["total"])
    assert speed["gate"]["ceiling"] == pytest.approx(3 / 1.75)
    assert speed["gate"]["scorer_cost"] == pytest.approx(0.5)
    assert speed["gate"]["own_ceiling"] == pytest.approx(3 / 1.25)


def test_arms_start_equal_for_equal_seeds_and_the_order_of_policies_does_not_matter():
    def accuracies(result, arm):
        return [
            [found["accuracy"] for found in run_["evals"]] + [run_["accuracy"]] for run_ in result["arms"][arm]["runs"]
        ]

    forwards = run(methods=("dense", "random", "gate"))
    backwards = run(methods=("gate", "random", "dense"))
    alone = run(methods=("gate",), seeds=(1,))
    for arm in ("dense", "random", "gate"):
        assert accuracies(forwards, arm) == accuracies(backwards, arm)
    assert accuracies(forwards, "gate")[1:] == accuracies(alone, "gate")
    # With every row kept before loading, random is dense in another order of rows.
    dense, all_rows = (run(methods=(name,), rate=1.0, seeds=(0,), evaluations=1) for name in ("dense", "random"))
    assert accuracies(dense, "dense")[0] == pytest.approx(accuracies(all_rows, "random")[0], abs=0.11)


def test_the_gallery_shows_what_was_kept_most_and_least():
    gallery = run()["gallery"]
    assert len(gallery["most"]) == len(gallery["least"]) == 16
    share = [[row["selected"] / row["seen"] for row in gallery[side]] for side in ("most", "least")]
    assert share[0] == sorted(share[0], reverse=True)
    assert share[1] == sorted(share[1])
    assert share[0][-1] > share[1][-1]
    some = split_validation(data())[0].train
    for row in gallery["most"]:
        assert row["label"] == some.labels[row["index"]]
        assert row["class"] == "abc"[row["label"]]
        pixels = torch.tensor(list(Image.open(io.BytesIO(b64decode(row["png"]))).tobytes()))
        assert torch.equal(pixels.reshape(8, 8), some.images[row["index"], 0].long())


def without_time(result):
    result = json.loads(json.dumps(result))
    del result["created"]
    for arm in result["arms"].values():
        del arm["summary"]["raw_seconds_mean"]
        for found in arm["runs"]:
            del found["raw_seconds"]
    return result


def test_an_interrupted_comparison_goes_on_with_what_is_missing(tmp_path, calibrated):
    whole = run()
    begun = []

    def progress(cell, status):
        if (cell.method, cell.seed) not in begun:
            begun.append((cell.method, cell.seed))

    with pytest.raises(Interrupted):
        run(folder=tmp_path, progress=progress, stop=lambda: len(begun) == 4)
    finished = sorted(path.stem for path in (tmp_path / "runs").glob("*.json"))
    assert finished == ["dense-0", "gate-0", "random-0"]
    kept = (tmp_path / "runs" / "gate-0.json").read_bytes()

    begun.clear()
    resumed = run(folder=tmp_path, resume=True, progress=progress)
    assert begun == [("dense", 1), ("random", 1), ("gate", 1)]
    assert (tmp_path / "runs" / "gate-0.json").read_bytes() == kept
    assert len(calibrated) == 2  # the whole one and the interrupted one, whose costs were kept
    assert without_time(resumed) == without_time(whole)


def test_an_arm_may_be_named_by_a_file(tmp_path, monkeypatch):
    path = tmp_path / "models" / "reference.pt"
    path.parent.mkdir()
    torch.save(model((1, 8, 8), 3).state_dict(), path)
    arm = f"gate@reference:{path}"
    monkeypatch.setattr(runners, "calibrate", lambda *_, **__: Costs(COSTS.shared, {"dense": FREE, arm: FLAT}, 5))
    options = {"methods": (arm,), "seeds": (0,), "seconds": 10.0, "folder": tmp_path / "runs"}
    made = run(**options)
    assert len(list((tmp_path / "runs" / "runs").glob("*.counts"))) == 1
    begun = []
    again = run(**options, resume=True, progress=lambda *status: begun.append(status))
    assert not begun
    assert without_time(again) == without_time(made)


def test_a_folder_of_another_comparison_is_refused(tmp_path):
    run(folder=tmp_path, seeds=(0,), seconds=5.0)
    with pytest.raises(UserError, match="holds a comparison already"):
        run(folder=tmp_path, seeds=(0,), seconds=5.0)
    with pytest.raises(UserError, match=r"other settings: rate 0.25 is now 0.5"):
        run(folder=tmp_path, seeds=(0,), seconds=5.0, rate=0.5, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ()}, "`methods` must name at least one, each once, got none"),
        ({"methods": ("gate", "gate")}, "each once, got gate, gate"),
        ({"methods": ("best",)}, "`policy` must be .*'best'"),
        ({"seeds": ()}, "`seeds` must name at least one, each once, got none"),
        ({"seeds": (1, 1)}, "each once, got 1, 1"),
        ({"rate": 0.0}, "`rate` must be .*, got 0.0"),
        ({"batch_size": 91}, "`batch_size` must be 1 to 90, the rows of the data set, got 91"),
        ({"seconds": 0.0}, "`seconds` must be above 0 and finite, got 0.0"),
        ({"model": "vgg"}, "'vgg'"),
    ],
)
def test_what_cannot_be_compared_is_refused(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(folder=tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()
