"""A study compares at equal cost, goes on after any interruption, and says what its runs say."""

import json

import pytest
import torch
from study_parts import COSTS, make, model

from sparse_training.errors import UserError
from sparse_training.experiments import gallery, runner, study
from sparse_training.experiments.design import Cell
from sparse_training.experiments.runner import Interrupted
from sparse_training.experiments.store import file_name
from sparse_training.experiments.study import study_result
from sparse_training.training.clock import Costs


@pytest.fixture(autouse=True)
def calibrated(monkeypatch):
    """Known costs instead of measured ones, and the arms and loaders that they were asked for."""
    asked = []

    def calibrate(trainer, loader, policies, *, loaders, seconds, progress, stop):
        asked.append((policies, loaders))
        return COSTS

    monkeypatch.setattr(runner, "calibrate", calibrate)
    return asked


def read(folder):
    return {path.name: json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))}


def without_time(run):
    return {name: value for name, value in run.items() if name != "raw_seconds"}


def test_every_arm_trains_on_equally_many_rows_a_step_and_spends_equal_time(tmp_path):
    made = make(tmp_path)
    made.run()
    for run in read(tmp_path).values():
        assert 60.0 <= run["seconds"] < 66.0
        phases = run["phases"]
        if run["arm"] in ("dense", "random", "random-again"):
            assert run["rows_trained"] == 16 * run["steps"]
        if run["arm"] == "gate":
            assert run["rows_trained"] / run["steps"] == pytest.approx(16, rel=0.35)
        assert phases["warmup"] > 0
        assert phases["anneal"] > 0
    steps = {run["arm"]: run["steps"] for run in read(tmp_path).values()}
    assert steps["random"] == pytest.approx(steps["dense"], abs=4)
    assert steps["gate"] < steps["random"] / 1.5  # it pays for scoring and loading four times the rows


def test_calibration_offers_each_arm_its_own_rows_and_is_made_once(tmp_path, calibrated):
    make(tmp_path).costs()
    make(tmp_path, resume=True).costs()
    ((policies, loaders),) = calibrated
    assert set(policies) == {"dense", "random", "infobatch", "gate", "whole"}
    assert policies["whole"].choose(loaders["whole"].offer(next(loaders["whole"].probe()))) is None
    assert {name: loader.batch_size for name, loader in loaders.items()} == {
        "dense": 16,
        "infobatch": 16,
        "random": 64,
        "gate": 64,
        "whole": 64,  # a dense step on what the others are offered
    }
    with pytest.raises(UserError, match="was calibrated for dense, random, infobatch, gate, not for importance"):
        make(tmp_path, resume=True, methods=("importance",)).costs()


def test_the_method_of_other_draws_differs_in_its_draws_alone(tmp_path):
    made = make(tmp_path, methods=("random-again",), tasks=("clean",), seeds=(0,))
    (one, loader), (other, its) = (made.make(made.task("clean"), arm, 0) for arm in ("random", "random-again"))
    assert torch.equal(loader.order(0), its.order(0))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))
    offer = loader.offer(next(loader.probe()))
    drawn, again = one.policy.choose(offer).index, other.policy.choose(offer).index
    assert len(drawn) == len(again) == 16
    assert not torch.equal(drawn.sort().values, again.sort().values)
    assert made.design.methods == ("dense", "random", "random-again")


def test_half_a_run_is_a_whole_schedule(tmp_path):
    made = make(tmp_path, tasks=("clean",), methods=("dense",), seeds=(0,), fractions=(1.0, 0.5))
    made.run()
    half, whole = read(tmp_path).values()
    assert (half["fraction"], whole["fraction"]) == (0.5, 1.0)
    assert 30.0 <= half["seconds"] < 33.0
    assert half["phases"]["anneal"] == pytest.approx(whole["phases"]["anneal"] / 2, abs=1)
    assert (len(half["evals"]), len(whole["evals"])) == (2, 4)


@pytest.mark.parametrize("steps", [1, 20, 60])
def test_a_study_stopped_anywhere_goes_on_to_the_same_runs(tmp_path, monkeypatch, steps):
    options = {"tasks": ("finetune",), "methods": ("gate",), "seeds": (0,)}
    monkeypatch.setattr(study, "CHECKPOINT_STEPS", 7)
    make(tmp_path / "whole", **options).run()
    taken = []
    with pytest.raises(Interrupted):
        make(tmp_path / "part", **options).run(progress=lambda *_: taken.append(1), stop=lambda: len(taken) >= steps)
    make(tmp_path / "part", resume=True, **options).run()
    whole, part = read(tmp_path / "whole"), read(tmp_path / "part")
    assert [without_time(run) for run in whole.values()] == [without_time(run) for run in part.values()]
    assert not [path for path in (tmp_path / "part" / "runs").iterdir() if path.is_dir()]


def test_an_arm_may_be_named_by_a_file(tmp_path, monkeypatch):
    """Its runs are files of the one folder, with their own checkpoints, and go on as any others."""
    others = [tmp_path / "models" / name for name in ("a.pt", "b.pt")]
    others[0].parent.mkdir()
    for seed, path in enumerate(others):
        torch.manual_seed(seed)
        torch.save(model((1, 8, 8), 3).state_dict(), path)
    arms = [f"gate@reference:{path}" for path in others]
    costs = Costs(COSTS.shared, {**COSTS.own, **dict.fromkeys(arms, COSTS.own["gate"])}, 5)
    monkeypatch.setattr(runner, "calibrate", lambda *arguments, **options: costs)
    monkeypatch.setattr(study, "CHECKPOINT_STEPS", 7)
    options = {"tasks": ("clean",), "methods": arms, "seeds": (0,)}
    make(tmp_path / "whole", **options).run()
    with pytest.raises(Interrupted):
        make(tmp_path / "part", **options).run(
            stop=lambda: any(path.is_dir() and "b.pt" in path.name for path in (tmp_path / "part" / "runs").iterdir())
        )
    make(tmp_path / "part", resume=True, **options).run()
    whole, part = read(tmp_path / "whole"), read(tmp_path / "part")
    assert [run["arm"] for run in whole.values()] == ["dense", arms[0], arms[1]]
    assert [without_time(run) for run in whole.values()] == [without_time(run) for run in part.values()]
    for folder in (tmp_path / "whole", tmp_path / "part"):
        assert not [path for path in (folder / "runs").iterdir() if path.is_dir()]
        assert set(study_result(make(folder, resume=True, **options))["tasks"]["clean"]["galleries"]) == {*arms}


def test_names_of_files_are_those_of_runs_where_they_can_be():
    for name in ("clean-random-again-1-0", "noise-gate@early:3-0.5-12", "clean-gate@self:0.5-1-0", "gate@proxy-2", "ü"):
        assert file_name(name) == name
    names = [f"clean-gate@reference:{path}-1-0" for path in ("/a/b", "/a_b", "_a/b", "a/b/", "x" * 300, "ü" * 300)]
    found = [file_name(name) for name in names]
    assert len(set(found)) == len(found)
    assert not any("/" in name or len(name.encode()) > 240 for name in found)
    assert found[0].startswith("clean-gate@reference:_a_b-1-0~")
    assert [file_name(name) for name in names] == found


def test_finetuning_starts_from_one_checkpoint_of_the_first_half(tmp_path, monkeypatch):
    seen = []
    fit = runner.SparseTrainer.fit

    def watched(self, loader, **options):
        seen.append((len(loader.labels), next(self.model.parameters()).detach().clone()))
        return fit(self, loader, **options)

    monkeypatch.setattr(runner.SparseTrainer, "fit", watched)
    make(tmp_path, tasks=("finetune",), methods=("dense",), seeds=(3, 4)).run()
    assert [rows for rows, _ in seen] == [90, 180, 180]
    assert all(torch.equal(seen[1][1], weights) for _, weights in seen[2:])
    assert not torch.equal(seen[0][1], seen[1][1])


def test_a_study_may_grow_but_not_change(tmp_path):
    make(tmp_path, tasks=("clean",), methods=("dense",), seeds=(0,)).run()
    before = (tmp_path / "runs" / "clean-dense-1-0.json").read_bytes()
    grown = make(tmp_path, tasks=("clean",), methods=("dense", "gate"), seeds=(0, 1), resume=True)
    assert [grown.design.name(cell) for cell in grown.missing()] == [
        "clean-gate-1-0",
        "clean-dense-1-1",
        "clean-gate-1-1",
    ]
    grown.run()
    assert (tmp_path / "runs" / "clean-dense-1-0.json").read_bytes() == before
    with pytest.raises(UserError, match=r"other settings: lr 0\.01 is now 0\.02"):
        make(tmp_path, lr=0.02, resume=True)
    with pytest.raises(UserError, match="holds a study already"):
        make(tmp_path)


def test_a_speed_up_over_a_step_that_was_not_timed_is_not_told(tmp_path, monkeypatch):
    made = make(tmp_path, tasks=("clean",), methods=("gate",), seeds=(0,))
    made.run_cell(Cell("clean", "dense", 1.0, 0), COSTS)
    ceilings = study_result(made)["calibration"]["ceilings"]
    assert ceilings["gate"]["speedup"] == pytest.approx((0.64 + 6.4) / (0.64 + 1.92 + 1.6))
    shorter = Costs({**COSTS.shared, "train": ((1, 63), (0.1, 6.3))}, COSTS.own, 5)
    monkeypatch.setattr(made, "costs", lambda *_: shorter)
    assert study_result(made)["calibration"]["ceilings"] == {}


def test_an_unfinished_study_is_read_as_far_as_it_goes(tmp_path):
    made = make(tmp_path, tasks=("clean",), methods=("gate",))
    with pytest.raises(UserError, match="no finished run of dense yet"):
        study_result(made)
    made.run_cell(Cell("clean", "dense", 1.0, 0), COSTS)
    made.run_cell(Cell("clean", "dense", 1.0, 1), COSTS)
    made.run_cell(Cell("clean", "gate", 1.0, 1), COSTS)
    result = study_result(made)
    assert result["missing"] == 1
    rows = {row["arm"]: row for row in result["table"]}
    assert (rows["dense"]["n"], rows["gate"]["n"]) == (2, 1)
    accuracy = {(run["arm"], run["seed"]): run["accuracy"] for run in read(tmp_path).values()}
    assert rows["gate"]["difference"]["mean"] == pytest.approx(accuracy["gate", 1] - accuracy["dense", 1], abs=2e-6)


@pytest.mark.slow
def test_the_gate_finds_planted_noise_and_the_gallery_shows_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "TOP", 20)
    made = make(tmp_path, tasks=("noise",), seeds=(0,))
    made.run()
    result = json.loads(json.dumps(study_result(made)))
    noise = result["tasks"]["noise"]
    assert noise["planted_share"] == pytest.approx(0.2)
    (gate,) = noise["arms"]["gate"]["1"]
    assert gate["planted"]["selected most"] > 0.3 > gate["planted"]["selected least"]
    shown = noise["galleries"]["gate"]["selected most"]
    assert len(shown) == gallery.STUDY_ROWS
    task = made.task("noise")
    for row in shown:
        assert row["planted"] == bool(task.planted[row["index"]])
        assert row["label"] == task.data.train.labels[row["index"]]
    assert set(noise["galleries"]["infobatch"]) == {"selected most", "selected least", "highest loss"}
    assert noise["galleries"]["random"].keys() == {"selected most", "selected least"}
    assert "dense" not in noise["galleries"]


def test_what_is_wrong_is_refused_before_the_folder_is_made(tmp_path):
    for options, words in (
        ({"tasks": ("hard",)}, "`tasks` must be some of clean, .*, got 'hard'"),
        ({"methods": ("best",)}, "`policy` must be .*'best'"),
        ({"fractions": (1.0, 2.0)}, r"`fractions` must be in \(0, 1\], got 2.0"),
        ({"seconds": 0.0}, "`seconds` must be above 0 and finite, got 0.0"),
        ({"seeds": ()}, "`seeds` must name at least one"),
    ):
        with pytest.raises(UserError, match=words):
            make(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_shards_do_all_runs_once_and_those_of_one_process(tmp_path):
    """Each makes the first weights of a fine-tuning by itself; they are equal, and the runs are those of one."""
    options = {"tasks": ("clean", "finetune"), "methods": ("gate",), "seeds": (0, 1)}
    make(tmp_path / "one", **options).run()
    shared = make(tmp_path / "two", **options)
    shared.costs()
    parts = [make(tmp_path / "two", resume=True, shard=(part, 2), **options) for part in (1, 2)]
    missing = [{shared.design.name(cell) for cell in part.missing()} for part in parts]
    assert not missing[0] & missing[1]
    assert missing[0] | missing[1] == {shared.design.name(cell) for cell in shared.design.cells}
    for part in parts:
        part.run()
    assert not shared.missing()
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert {name: without_time(run) for name, run in one.items()} == {
        name: without_time(run) for name, run in two.items()
    }


def test_the_test_rows_are_read_once_and_choices_are_made_on_others(tmp_path, monkeypatch):
    read_rows = []
    scored = runner.row_scores
    monkeypatch.setattr(
        runner,
        "row_scores",
        lambda model, loader, measure: read_rows.append(loader.size) or scored(model, loader, measure),
    )
    make(tmp_path, tasks=("clean",), methods=("dense",), seeds=(0,)).run()
    assert read_rows == [20] * 4 + [100]  # four evaluations on a tenth of 200 rows, then the test's hundred
    (run,) = read(tmp_path).values()
    assert run["validation"] == run["evals"][-1]["accuracy"]


def test_a_method_that_a_task_has_too_few_classes_for_is_refused_before_the_folder_is_made(tmp_path):
    words = "adaptive\\+denoise cannot run on the task imbalanced: .*3 classes.*got 2"
    with pytest.raises(UserError, match=words):
        make(tmp_path / "new", tasks=("clean", "imbalanced"), methods=("adaptive+denoise",))
    assert not (tmp_path / "new").exists()
