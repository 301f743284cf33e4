"""Terms in a compiled call of a gate: the whole call in one graph, and the same selection and state."""

from __future__ import annotations

import copy

import pytest
import torch

from sparse_training import Gate, Significance
from sparse_training.gate.terms import (
    Constant,
    Contrast,
    Difficulty,
    Feedback,
    LearningValue,
    LossChange,
    Novelty,
    Term,
    Uncertainty,
)

ROWS, CLASSES = 48, 5


def batch(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "logits": torch.randn(ROWS, CLASSES, generator=g),
        "targets": torch.randint(CLASSES, (ROWS,), generator=g),
        "index": torch.randperm(ROWS, generator=g),
        "embedding": torch.randn(ROWS, 8, generator=g),
        "inputs": torch.rand(ROWS, 1, 4, 4, generator=g),
    }


TERMS = [
    LearningValue(), LossChange(rows=ROWS), Difficulty(), Novelty(), Novelty(memory=20), Uncertainty(), Feedback(),
    Feedback(table=torch.linspace(0, 1, ROWS)), Contrast(), Constant(),
]  # fmt: skip


@pytest.mark.parametrize("term", TERMS, ids=str)
def test_a_compiled_call_is_one_graph_that_does_the_same(term: Term) -> None:
    torch._dynamo.reset()
    eager = Gate(0.25, significance=Significance(loss=0.1, terms=(term,)))
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for seed in range(4):
        assert torch.equal(eager(**batch(seed)).index, compiled(**batch(seed)).index)
    for one, two in zip(eager.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, equal_nan=True)


def test_feedback_of_a_call_is_taken_in_a_graph() -> None:
    torch._dynamo.reset()
    gate = Gate(0.25, significance=Significance(terms=(Feedback(),)))
    torch.compile(gate, fullgraph=True, backend="aot_eager")(**batch(0), feedback=torch.linspace(0, 1, ROWS))
    torch.testing.assert_close(gate.last.significance, torch.linspace(0, 1, ROWS))


@pytest.mark.parametrize("number", [-1, ROWS])
@pytest.mark.parametrize("term", [LossChange(rows=ROWS), Feedback(table=torch.zeros(ROWS))], ids=str)
def test_row_numbers_out_of_range_are_refused_by_a_graph_too(term: Term, number: int) -> None:
    torch._dynamo.reset()
    gate = Gate(0.25, significance=Significance(terms=(term,)))
    before = copy.deepcopy(gate.state_dict())
    given = batch(0)
    given["index"][3] = number
    with pytest.raises(RuntimeError, match=f"`index` must be row numbers from 0 to {ROWS - 1}"):
        torch.compile(gate, fullgraph=True, backend="aot_eager")(**given)
    assert str(before) == str(gate.state_dict())
