"""Verdicts of made-up runs: claims are adjusted, the A/A test is not, and a choice is made on validation rows."""

import numpy as np
import pytest

from sparse_training.experiments.statistics import crossed
from sparse_training.experiments.verdicts import verdicts


def runs(accuracies, validation=0.9):
    return [{"seed": seed, "accuracy": accuracy, "validation": validation} for seed, accuracy in enumerate(accuracies)]


def task(**arms):
    base = {"dense": runs([0.9, 0.9, 0.9])}
    return {"arms": {method: {"1": some} for method, some in (base | arms).items()}}


SURELY = [0.9102, 0.91, 0.9101]
ABOUT = [0.9002, 0.8999, 0.9001]


def rows(found):
    return {(row["task"], row["arm"]): row for row in found["table"]}


def test_every_claim_against_dense_has_its_own_test_paired_by_seed():
    found = rows(verdicts({"clean": task(gate=runs(SURELY), infobatch=runs(ABOUT))}))
    gate, infobatch = found["clean", "gate"], found["clean", "infobatch"]
    assert gate["difference"]["mean"] == pytest.approx(0.0101)
    assert (gate["verdict"], infobatch["verdict"]) == ("better", "not worse")
    assert found["clean", "dense"]["difference"] is None


def test_claims_are_adjusted_for_their_number():
    weak = [0.9020, 0.9008, 0.9015]
    alone = rows(verdicts({"one": task(gate=runs(weak))}))["one", "gate"]
    assert alone["difference"]["p"] == alone["difference"]["p_holm"]
    many = verdicts({name: task(gate=runs(weak)) for name in "abc"})["table"]
    claims = [row for row in many if row["arm"] == "gate"]
    for kind in ("difference", "not_worse"):
        assert [row[kind]["p_holm"] / row[kind]["p"] for row in claims] == pytest.approx([3.0] * 3)
    significant = verdicts({name: task(gate=runs([0.905, 0.9041, 0.9055])) for name in "ab"})["table"]
    assert [row["verdict"] for row in significant if row["arm"] == "gate"] == ["better"] * 2
    diluted = verdicts({name: task(gate=runs([0.905, 0.9041, 0.9055])) for name in "abcdefgh"})["table"]
    assert all(row["difference"]["p"] < 0.05 for row in diluted if row["arm"] == "gate")
    assert [row["verdict"] for row in diluted if row["arm"] == "gate"] == ["not worse"] * 8


def test_random_again_is_no_claim_and_its_test_is_not_adjusted():
    off = [0.9023, 0.9013, 0.9019]
    tasks = {
        name: task(**{"random": runs([0.9, 0.9, 0.9]), "random-again": runs(again)})
        for name, again in (("a", off), ("b", ABOUT), ("c", ABOUT), ("d", ABOUT))
    }
    again = verdicts(tasks)["again"]
    assert 0.05 / 4 < again["tests"]["a"]["p"] < 0.05  # an adjustment would have hidden it
    assert again["differs"] == ["a"]
    assert not again["passed"]
    assert all("p_holm" not in row["difference"] for row in verdicts(tasks)["table"] if row["arm"] == "random-again")
    del tasks["a"]
    assert verdicts(tasks)["again"]["passed"]
    assert verdicts({"clean": task()})["again"] is None


def test_not_worse_needs_evidence_not_its_absence():
    wild = [0.92, 0.88, 0.903]
    found = rows(verdicts({"clean": task(gate=runs(wild))}))["clean", "gate"]
    assert found["difference"]["mean"] > 0.0
    assert found["verdict"] == "undecided"
    assert found["not_worse"]["power"] < 0.1
    slightly = rows(verdicts({"clean": task(gate=runs([0.8981, 0.898, 0.8979]))}))["clean", "gate"]
    assert slightly["verdict"] == "worse, within the margin"
    assert rows(verdicts({"clean": task(gate=runs([0.8981, 0.898, 0.8979]))}, margin=0.001))["clean", "gate"][
        "verdict"
    ] == "worse"  # fmt: skip


def test_intervals_include_the_sampling_of_the_test_rows():
    right = np.zeros((3, 400))
    right[:, :360] = 1.0
    other = right.copy()
    other[:, 355:360] = 0.0  # every seed loses the same five rows: no spread over seeds
    other[:, 360:369] = 1.0  # and has the same nine right instead
    scores = {("clean", "dense", s): right[s] for s in range(3)} | {("clean", "gate", s): other[s] for s in range(3)}
    tasks = {"clean": task(gate=runs([0.91] * 3))}
    seeds_alone = rows(verdicts(tasks))["clean", "gate"]
    with_rows = rows(verdicts(tasks, scores))["clean", "gate"]
    assert seeds_alone["verdict"] == "better"
    assert with_rows["verdict"] == "undecided"  # 9 rows against 5, McNemar's p = 0.42
    assert with_rows["difference"] == {
        **crossed(np.stack([other[s] - right[s] for s in range(3)])).to_dict(),
        "p_holm": pytest.approx(with_rows["difference"]["p"]),
    }


def test_the_score_counts_verdicts_and_methods_are_chosen_on_validation_rows():
    tasks = {
        "a": task(gate=runs(SURELY, validation=0.89), infobatch=runs(ABOUT, validation=0.905)),
        "b": task(gate=runs([0.88, 0.8801, 0.8799], validation=0.89), infobatch=runs([0.92, 0.88, 0.9])),
    }
    score = verdicts(tasks)["score"]
    assert score["gate"] == {
        "tasks": 2,
        "better": 1,
        "not_worse": 1,
        "undecided": 0,
        "worse": 1,
        "worst": pytest.approx(-0.02),
        "validation": pytest.approx(-0.01),
    }
    assert score["infobatch"]["undecided"] == 1
    assert max(score, key=lambda method: score[method]["validation"]) == "infobatch"
