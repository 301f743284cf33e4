"""A run costs its budget, under each policy whose rate can be set."""

import pytest
import torch
from scorer_parts import network, resident, same, weights
from trainers import make_trainer

from sparse_training.errors import UserError
from sparse_training.gate.gate import Gate
from sparse_training.training.clock import Clock, Costs


def data():
    """Batches of 64, and a short one of 20."""
    return resident(212, batch_size=64)


def trainer_of(policy="gate", **options):
    return make_trainer(
        network(), policy=policy, dense_start=0.1, dense_end=0.1, scoring_precision="float32", **options
    )


def dense_operations(steps=60):
    """Operations of a run of dense steps alone."""
    return sum(trainer_of("dense").fit(data(), steps=steps).operations.values())


@pytest.mark.parametrize("policy", ["gate", "gate@early:2", "topk", "random", "importance@self", "gate@history"])
@pytest.mark.parametrize("share", [0.6])
def test_a_run_takes_the_operations_that_it_was_given(policy, share):
    total = share * dense_operations()
    trainer = trainer_of(policy)
    history = trainer.fit(data(), steps=60, cost_budget=(total, "flops"))
    assert sum(history.operations.values()) == pytest.approx(total, rel=0.02)
    assert not any("than its budget of" in text for text in history.warnings)


def costs(policy):
    own = {"score": ((1, 64), (0.02, 0.3)), "select": ((1,), (0.01,))}
    free = {"score": ((1,), (0.0,)), "select": ((1,), (0.0,))}
    shared = {"load": ((1, 64), (0.01, 0.1)), "train": ((1, 64), (0.2, 1.0))}
    return Costs(shared, {"dense": free, policy: own}, 1)


@pytest.mark.parametrize("policy", ["gate", "topk"])
def test_a_run_takes_the_seconds_that_it_was_given(policy):
    total = 0.8 * 60 * costs(policy).step("dense", 53, 53)["total"]
    history = trainer_of(policy).fit(data(), steps=60, cost_budget=(total, "seconds"), clock=Clock(costs(policy)))
    assert history.seconds == pytest.approx(total, rel=0.02)


def test_a_stopped_run_goes_on_to_the_same_total_bit_for_bit(tmp_path):
    total = 0.7 * dense_operations(40)

    def run(folder, stop_at=None, resume=False):
        trainer, asked = trainer_of(), iter(range(1, 100))
        torch.manual_seed(3 + resume)
        history = trainer.fit(
            data(), steps=40, cost_budget=(total, "flops"),
            checkpoint=tmp_path / folder, resume=resume, stop=lambda: next(asked) == stop_at,
        )  # fmt: skip
        return weights(trainer.model), history.operations, int(history.kept)

    whole = run("whole")
    run("part", stop_at=17)
    same(run("part", resume=True), whole)
    with pytest.raises(UserError, match=r"cost_budget .* is now None"):
        trainer_of().fit(data(), steps=40, checkpoint=tmp_path / "part", resume=True)


def test_a_total_that_cannot_be_met_is_said():
    history = trainer_of().fit(data(), steps=20, cost_budget=(10 * dense_operations(20), "flops"))
    assert "the run cost -" in history.warnings[-1]


@pytest.mark.parametrize(
    ("policy", "options", "words"),
    [
        (
            "gate",
            {"steps": 20, "cost_budget": (1.0, "flops")},
            r"must be at least .* flops, for 4 dense steps and the scoring of 16",
        ),
        ("gate", {"steps": 20, "cost_budget": (1e9, "joules")}, "must be flops or seconds, got 'joules'"),
        ("gate", {"rows": 2000, "cost_budget": (1e9, "flops")}, "needs a run of steps or epochs, got one of rows"),
        ("gate", {"steps": 20, "cost_budget": (1e9, "seconds"), "clock": Clock()}, "needs a calibrated clock"),
        ("dense", {"steps": 20, "cost_budget": (1e9, "flops")}, "dense has no such rate"),
        ("masked", {"steps": 20, "cost_budget": (1e9, "flops")}, "masked has no such rate"),
        (
            Gate(grad_norm_fraction=0.9),
            {"steps": 20, "cost_budget": (1e9, "flops")},
            "cannot be set with `grad_norm_fraction`",
        ),
    ],
)
def test_what_cannot_be_steered_is_refused(policy, options, words):
    with pytest.raises(UserError, match=words):
        trainer_of(policy).fit(data(), **options)
