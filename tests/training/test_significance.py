"""Significance: named weights, and nothing that cannot rank rows."""

from __future__ import annotations

import math

import pytest

from sparse_training.errors import UserError
from sparse_training.gate.significance import Significance


def test_weights_are_the_terms_that_count() -> None:
    assert Significance(loss=0.7, entropy=0.3).weights == {"loss": 0.7, "entropy": 0.3}
    assert Significance(grad_norm=1).weights == {"grad_norm": 1.0}
    assert Significance(margin=-1.0).weights == {"margin": -1.0}


def test_is_a_value() -> None:
    assert Significance(loss=1.0) == Significance(loss=1.0)
    with pytest.raises(AttributeError):
        Significance(loss=1.0).loss = 2.0  # type: ignore[misc]


@pytest.mark.parametrize("weights", [{}, {"loss": 0.0}, {"entropy": 0.0, "margin": -0.0}])
def test_no_term_is_refused(weights: dict[str, float]) -> None:
    with pytest.raises(UserError, match="at least one term"):
        Significance(**weights)


@pytest.mark.parametrize("weight", [math.nan, math.inf, "1", True, None])
def test_a_weight_that_is_no_finite_number_is_refused(weight: object) -> None:
    with pytest.raises(UserError, match=r"`grad_norm` of a significance must be a finite number, got "):
        Significance(loss=1.0, grad_norm=weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["argmax", "confidence"])
def test_what_ranks_nothing_is_no_term(name: str) -> None:
    with pytest.raises(TypeError):
        Significance(**{name: 1.0})
