"""Speed-up bounds, from given costs and from measured ones."""

import io

import pytest
import torch
from rich.console import Console
from scorer_parts import network, resident

from sparse_training.errors import UserError
from sparse_training.profiling.speedup import SpeedupBound, speedup_bound, speedup_bounds
from sparse_training.reporting.speedup import print_speedup_bounds, speedup_sentence
from sparse_training.selection.policies.masked import MaskedPolicy
from sparse_training.selection.registry import make_policy
from sparse_training.trainer import SparseTrainer
from sparse_training.training.clock import Costs

FREE = {"score": ((100,), (0.0,)), "select": ((100,), (0.0,))}
COSTS = Costs(
    shared={"load": ((10, 100), (1.0, 10.0)), "train": ((1, 100), (1.0, 100.0))},
    own={
        "dense": FREE,
        "topk": {"score": ((100,), (15.0,)), "select": ((100,), (2.0,))},
        "topk@proxy": {"score": ((100,), (4.0,)), "select": ((100,), (2.0,)), "observe": ((10, 100), (1.0, 10.0))},
        "topk@history": FREE,
        "masked": {"score": ((100,), (30.0,)), "select": ((100,), (0.0,))},
    },
    rounds=7,
)


@pytest.mark.parametrize(
    ("name", "s", "step"),
    [("topk", 0.45, 10 + 15 + 2 + 10), ("topk@proxy", 0.15, 10 + 4 + 2 + 10 + 1), ("topk@history", 0.0, 1 + 10)],
)
def test_the_bound_follows_from_the_scorers_cost(name, s, step):
    found = speedup_bound(COSTS, make_policy(name, rate=0.1, seed=0), batch_size=100, rate=0.1)
    assert found.scorer_cost == pytest.approx(s)
    assert found.ceiling == pytest.approx(3 / (s + 0.3))
    assert found.speedup == pytest.approx(110 / step)
    assert found.share == pytest.approx(found.speedup / found.ceiling)


def test_what_is_masked_out_costs_as_much_as_what_is_not():
    found = speedup_bound(COSTS, MaskedPolicy(0.1), batch_size=100, rate=0.1)
    assert found.ceiling == pytest.approx(3 / 3.9)
    assert found.speedup == pytest.approx(110 / 140)


@pytest.mark.slow
def test_bounds_are_measured_on_a_model_that_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(
        "sparse_training.profiling.calibration.CALIBRATION_SECONDS", 0.2
    )  # nothing is made of the seconds
    trainer = SparseTrainer(network(), policy="dense")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    names = ["topk", "topk@early:2", "topk@proxy", "gate@history", "random"]
    told = []
    found = speedup_bounds(trainer, resident(), names, (0.25, 0.5), rounds=2, progress=told.append)
    assert told == [0.0, 0.25, 0.5, 0.5, 0.75, 1.0]
    assert [(one.policy, one.rate) for one in found] == [(name, rate) for rate in (0.25, 0.5) for name in names]
    assert [one.scorer for one in found[:5]] == ["self", "early", "proxy", "history", None]
    assert all(one.speedup > 0 for one in found)
    assert all(one.scorer_cost > 0 for one in found[:3])
    torch.testing.assert_close(dict(trainer.model.state_dict()), before, rtol=0, atol=0)
    with pytest.raises(UserError, match="no layer 'x'"):
        speedup_bounds(trainer, resident(), ["topk@early:x"], (0.5,))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_is_printed_speaks_of_the_model_that_was_timed(encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    found = [
        SpeedupBound("gate@self", 0.1, "self", 1.0, 3 / 1.3, 2.0),
        SpeedupBound("random", 0.1, None, 0.0, 10.0, 9.0),
        SpeedupBound("gate@self", 0.357, "self", 1.0, 3 / 2.071, 1.4),
        SpeedupBound("gate@self", 0.8, "self", 1.0, 3 / 3.4, 0.8),
    ]
    print_speedup_bounds(found, Console(file=stream, width=80), of="mine on digits, batches of 64, cpu:")
    stream.flush()
    lines = stream.buffer.getvalue().decode(encoding).replace("x", "×").replace("|", " ").splitlines()
    rows = [line.split() for line in lines if "gate@self" in line or line.strip().startswith("random")]
    assert rows == [
        ["10", "%", "gate@self", "1.00", "2.31×", "2.00×", "87", "%"],
        ["random", "0.00", "10.00×", "9.00×", "90", "%"],
        ["35.7", "%", "gate@self", "1.00", "1.45×", "1.40×", "97", "%"],
        ["80", "%", "gate@self", "1.00", "0.88×", "0.80×", "91", "%"],
    ]
    words = " ".join(" ".join(lines).split())
    assert words.startswith("mine on digits, batches of 64, cpu:")
    assert words.endswith("Fastest: random at a rate of 0.1, whose step takes 11% of a dense step's time.")
    assert speedup_sentence(found[3:]).startswith("No step is faster than a dense one")
    assert max(map(len, lines)) <= 80
