"""The report: what it says is worked out from the numbers, and it says it safely."""

import pytest
from comparison_results import CASES, RESULT, make_result, table

from sparse_training.reporting import comparison

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
