"""What a newcomer gives a gate, a schedule, a budget or Compact: refused in one line where it cannot be served."""

import re

import pytest
import torch

from sparse_training import Budget, Compact, Gate, Ramp, Significance, UserError, build_model
from sparse_training.gate.terms import Difficulty, Feedback

BUDGET = {"total": 9.0, "steps": 3, "dense": 1.0}


@pytest.mark.parametrize("logits", [torch.rand(4, 2).numpy(), torch.rand(4, 2).tolist(), {"logits": torch.rand(4, 2)}])
def test_logits_that_are_no_tensor(logits):
    with pytest.raises(TypeError, match=r"`logits` must be a torch\.Tensor"):
        Gate(0.5)(logits, torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("progress", [3, -0.1, "half", float("nan")])
def test_progress_is_a_fraction_of_the_run(progress):
    """A number of steps would be taken for the end of every schedule."""
    gate = Gate(Ramp(1.0, 0.1))
    with pytest.raises(UserError, match="`progress` must be the fraction of the run"):
        gate.set_progress(progress)
    assert gate.rate == 1.0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Gate(0.5, process_group="worlds"), '`process_group` must be None, "world" or a group'),
        (lambda: Gate(0.5, process_group=3), "got 3"),
        (lambda: Ramp("a", 0.1), "`start` must be in (0, 1], got 'a'"),
        (lambda: Ramp(1.0, 0.1, begin="a"), "`begin` must be a finite number"),
        (lambda: Budget(**{**BUDGET, "total": "9"}), "`total` must be above 0 and finite"),
        (lambda: Budget(**{**BUDGET, "steps": 2.5}), "`steps` must be a whole number"),
        (lambda: Budget(**BUDGET).spend(-1.0), "`cost` must be at least 0 and finite"),
        (lambda: Budget(**BUDGET).spend(float("nan")), "`cost` must be at least 0 and finite"),
        (lambda: Compact(1.5), "`capacity` must be an integer"),
        (lambda: Compact(-1), "`capacity` must be an integer of at least 0"),
        (lambda: build_model("cnn-tiny", shape=(1, 8, 8), classes=2.5), "`classes` must be an integer"),
    ],
)
def test_settings(make, said):
    with pytest.raises(UserError, match=re.escape(said)):
        make()


def test_feedback_that_no_term_reads_is_refused():
    logits, targets, reward = torch.randn(8, 3), torch.zeros(8, dtype=torch.int64), torch.rand(8)
    for significance in (Significance(loss=1.0), Significance(terms=(Difficulty(),))):
        gate = Gate(0.5, significance=significance)
        with pytest.raises(UserError, match="`feedback` is given, and no term of the gate's significance reads it"):
            gate(logits, targets, feedback=reward)
        assert int(gate.step) == 0
    Gate(0.5, significance=Significance(terms=(Feedback(),)))(logits, targets, feedback=reward)
