"""Significances by name: the original system's five terms, with its weights, for four kinds of data."""

from __future__ import annotations

from collections.abc import Callable

from sparse_training.errors import UserError
from sparse_training.gate.significance import Significance
from sparse_training.gate.terms.base import Term
from sparse_training.gate.terms.constant import Constant
from sparse_training.gate.terms.contrast import Contrast
from sparse_training.gate.terms.difficulty import Difficulty
from sparse_training.gate.terms.feedback import Feedback
from sparse_training.gate.terms.learning import LearningValue, LossChange
from sparse_training.gate.terms.novelty import Novelty
from sparse_training.gate.terms.uncertainty import Uncertainty

MEMORY = 1000  # embeddings, where classes are too many or too alike for centroids


def _five(*more: Term, feedback: float = 0.10, memory: int | None = None) -> tuple[Term, ...]:
    """The five terms with the original's weights; only their ratios matter."""
    return (
        LearningValue(0.35), Difficulty(0.25), Novelty(0.20, memory=memory), Uncertainty(0.10), Feedback(feedback),
        *more,
    )  # fmt: skip


ALONE = ("learning", "loss-change", "difficulty", "novelty", "uncertainty", "feedback", "contrast")
SIGNIFICANCES: dict[str, Callable[[], tuple[Term, ...]]] = {
    "vision": lambda: _five(Contrast(0.10)),
    "language": lambda: _five(memory=MEMORY),
    "audio": lambda: _five(),
    "robot": lambda: _five(feedback=0.20, memory=MEMORY),
    "five": lambda: _five(),
    "learning": lambda: (LearningValue(),),
    "loss-change": lambda: (LossChange(),),
    "difficulty": lambda: (Difficulty(),),
    "novelty": lambda: (Novelty(),),
    "uncertainty": lambda: (Uncertainty(),),
    "feedback": lambda: (Feedback(),),
    "contrast": lambda: (Contrast(),),
    "none": lambda: (Constant(),),
}


def preset(name: str) -> Significance:
    """Make a significance by its name.

    Args:
        name: "vision" (the five terms and the images' contrast), "language" and "robot" (novelty by a memory of 1,000
            embeddings; for robots feedback counts twice), "audio" or "five" (the five terms), one term alone
            ("learning", "loss-change", "difficulty", "novelty", "uncertainty", "feedback", "contrast"), "none" (every
            row alike), or "default" (0.7 loss + 0.3 entropy).

    Returns:
        The significance.

    Raises:
        UserError: the name is unknown.

    Example:
        >>> gate = Gate(rate=0.1, significance=preset("audio"))
    """
    if name == "default":
        return Significance(loss=0.7, entropy=0.3)
    if name not in SIGNIFICANCES:
        raise UserError(f"`significance` must be one of default, {', '.join(SIGNIFICANCES)}, got {name!r}")
    return Significance(terms=SIGNIFICANCES[name]())


def own_significance(given: Significance | str | None, *, by_grad_norm: bool) -> Significance:
    """Return a gate's own copy of a significance.

    Args:
        given: a significance, the name of one, or None for the default.
        by_grad_norm: True for a gate with a grad-norm fraction, which has another default.

    Raises:
        UserError: it is neither.
    """
    if given is None:
        return Significance(grad_norm=1.0) if by_grad_norm else preset("default")
    if isinstance(given, str):
        return preset(given)
    if not isinstance(given, Significance):
        raise UserError(
            f"`significance` must be a Significance or its name, got {given!r}; use Significance(loss=1.0), for example"
        )
    return given.copy()
