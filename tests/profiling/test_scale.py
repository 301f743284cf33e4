"""A run on many ranks, simulated: by hand, beside real processes, and by the command line."""

import json
import math

import numpy as np
import pytest
import simulation_check
import torch.distributed as dist

from sparse_training.__main__ import main
from sparse_training.errors import UserError
from sparse_training.profiling.scale import METHODS, Cluster, Plan, draw_rows, simulate, slowest, table_bytes
from sparse_training.profiling.scale_costs import StageCosts, curve_seconds, read_costs
from sparse_training.samplers.score_table import ScoreTable
from sparse_training.training.clock import Costs

STEP = ["--batch-size", "64", "--forward-ms", "10", "--backward-ms", "20", "--parameters", "1000000"]
COSTS = StageCosts.from_step(64, load=0.001, forward=0.010, backward=0.020, optimizer=0.002)


def by_method(plan, cluster=None, costs=COSTS):
    return {result.method: result for result in simulate(plan, costs, cluster or Cluster())}


@pytest.mark.parametrize("rows", [1, 64, 65, 5000, 300_000])
def test_the_table_has_the_bytes_of_a_score_table(rows):
    table = ScoreTable(rows)
    held = [table.scores, *table.tree.levels]
    assert table_bytes(rows) == sum(tensor.numel() * tensor.element_size() for tensor in held)


def test_a_dense_step_is_its_stages_and_the_ring():
    found = by_method(Plan(10**6, 8, 64, 10**6), Cluster(bandwidth=1e9, latency=0.0))["dense"]
    assert found.seconds == pytest.approx(0.033 + 2 * 7 / 8 * (4e6 + 20) / 1e9)
    assert found.rows == 64
    assert found.imbalance == 1.0
    assert found.steps == math.ceil(125_000 / 64)
    assert found.reduced_bytes == 4_000_020


def test_the_fullest_rank_of_a_gate_is_the_greatest_of_so_many_draws():
    few, many = (by_method(Plan(10**6, ranks, 64, 1000)) for ranks in (8, 1024))
    draws = np.random.default_rng(1).binomial(64, 0.1, (500, 1024))
    assert many["gate"].imbalance == pytest.approx(draws.max(1).mean() / 6.4, rel=0.03)
    assert few["gate"].imbalance < many["gate"].imbalance
    assert many["gate-balanced"].imbalance == many["importance"].imbalance == 1.0
    assert many["gate-balanced"].seconds < many["gate"].seconds
    low, middle, high = many["gate"].spread
    assert low < middle < high


def test_pruning_trains_on_the_share_of_rows_that_it_keeps():
    plan = Plan(10**6, 16, 64, 1000, prune=0.5, below_mean=0.6)
    random = np.random.default_rng(0)
    rows = draw_rows(plan, "infobatch", 1000, random)
    assert rows.sum() / (1000 * 16 * 64) == pytest.approx(0.7, rel=0.02)
    full = rows[rows.any(1)]
    assert (full.sum(1) >= 16 * 64).all()
    assert (full > 0).all()


def test_a_billion_samples_take_seconds_and_no_table():
    found = by_method(Plan(10**9, 1024, 256, 25_600_000))
    assert found["importance"].table_bytes == table_bytes(-(-(10**9) // 1024))
    assert found["importance"].speedup > found["gate"].speedup > 1


def test_ranks_that_share_cores_wait_for_one_another():
    seconds = np.array([[1.0, 1.0, 1.0, 1.0], [3.0, 1.0, 1.0, 1.0]])
    assert slowest(seconds, None).tolist() == [1.0, 3.0]
    assert slowest(seconds, 2).tolist() == [2.0, 4.0]  # the last third of the long one has a core to itself
    assert slowest(seconds, 4).tolist() == [1.0, 3.0]


def test_jitter_makes_the_slowest_of_many_slower():
    plan = Plan(10**6, 256, 64, 1000)
    calm, shaky = by_method(plan)["dense"], by_method(plan, Cluster(jitter=0.1))["dense"]
    assert shaky.seconds > 1.2 * calm.seconds


def test_curves_go_on_beyond_what_was_measured():
    curve = ((10, 20), (1.0, 2.0))
    assert curve_seconds(curve, np.array([0, 10, 15, 40])).tolist() == [0.0, 1.0, 1.5, 4.0]
    assert curve_seconds(None, np.array([3])).tolist() == [0.0]


def test_costs_of_a_calibration_and_of_an_advice_are_read(tmp_path):
    curve = ((1, 64), (0.001, 0.03))
    own = {"gate": {"score": curve, "select": curve}}
    calibration, advice = tmp_path / "calibration.json", tmp_path / "advice.json"
    calibration.write_text(json.dumps(Costs({"load": curve, "train": curve}, own, 5).to_dict()))
    times = {"load": 0.001, "forward": 0.01, "backward": 0.02, "optimizer": 0.002, "steps": 9, "total": 0.033}
    advice.write_text(json.dumps({"times": times, "batch_size": 64}))
    costs, batch = read_costs(calibration)
    assert (costs.train, costs.score, batch) == (curve, curve, 64)
    assert read_costs(advice) == (COSTS, 64)


def test_the_command_prints_and_writes_a_page(tmp_path, capsys):
    out = tmp_path / "out"
    main(["simulate", *STEP, "--ranks", "8,1024", "--samples", "1e6,1e9", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "1,000,000,000 samples" in printed
    found = json.loads((out / "simulation.json").read_text())
    assert len(found["results"]) == 2 * 2 * len(METHODS)
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "Nothing here was run on so many ranks" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parameters", "5"], "give --costs, or the seconds of a step; of these there is no --batch-size"),
        ([*STEP, "--ranks", "1"], "`ranks` must be 2 to 65536, got 1"),
        ([*STEP, "--ranks", "a"], "--ranks must be whole numbers"),
        ([*STEP, "--samples", "1.5"], "--samples must be whole numbers"),
        ([*STEP, "--samples", "100", "--ranks", "128"], "`samples` must be at least one a rank"),
        ([*STEP, "--costs", "none.json"], "give no --forward-ms with it"),
        (["--parameters", "5", "--costs", "none.json"], "none.json: no such file"),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_a_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", *arguments, "--out", str(tmp_path / "out")]) != 0
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"shared": 3}')
    with pytest.raises(UserError, match=r"must be calibration\.json of compare or study, or advice\.json"):
        read_costs(path)


@pytest.mark.parametrize(("ranks", "cores"), [(2, 2), (4, 2)])
def test_the_check_takes_its_latency_from_a_dense_step(ranks, cores):
    """What a dense step takes beyond its calibrated costs is spread over its messages; shared cores are not in it."""
    shared = StageCosts.from_step(simulation_check.BATCH, load=0.0, forward=0.02, backward=0.04, optimizer=0.0)
    costs = simulation_check._on_a_core(shared, cores / ranks)
    cluster = simulation_check._cluster(costs, 1000, ranks, cores, 0.068)
    dense, gate, *_ = simulate(Plan(4096, ranks, simulation_check.BATCH, 1000, rate=0.25), costs, cluster)
    assert dense.seconds == pytest.approx(0.068, rel=1e-3)  # 60 ms of work and 4 messages of 2 ms
    assert gate.seconds == pytest.approx(0.02 + 0.015 + 0.010, rel=0.1)  # scoring, a quarter of the rows, 5 messages
    assert simulation_check._cluster(costs, 1000, ranks, cores, 0.05).latency == 0.0


@pytest.mark.slow
@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="a PyTorch without torch.distributed and gloo"
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_real_processes_train_on_the_rows_and_exchange_the_bytes_that_were_simulated(ranks):
    lines = simulation_check.compare(ranks)
    assert {line["method"] for line in lines} == set(METHODS)
    for line in lines:
        assert line["ratio"] == pytest.approx(1.0, abs=simulation_check.TOLERANCE), line
