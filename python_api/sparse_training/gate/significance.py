"""The significance of a row: a weighted sum of its statistics and of further terms."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, fields
from typing import Any

from sparse_training.errors import UserError
from sparse_training.gate.schedules import Weight, schedule_name
from sparse_training.gate.terms.base import Term


@dataclass(frozen=True, kw_only=True)
class Significance:
    """Weights of the row statistics whose sum is a row's significance, one keyword for each, and further terms.

    A negative weight ranks rows down. Only ratios matter, because the gate's threshold finds its own scale. A weight
    may be a callable of the fraction of the run that is done, such as ``Transition(0.2, 1.0)``, and then follows
    ``Gate.set_progress``.

    Args:
        loss: weight of -log p[target], in nats. Default 0.
        entropy: weight of the entropy, in nats. Default 0.
        grad_norm: weight of the norm of the loss's gradient in the logits (EL2N). Default 0.
        sum_squares: weight of the sum of the squared probabilities. Default 0.
        max_prob: weight of the largest probability. Default 0.
        margin: weight of the largest probability minus the second largest. Default 0.
        logsumexp: weight of the log-sum-exp of the logits. Default 0.
        terms: terms beyond a weighted statistic, each with its weight, such as ``Novelty(0.2)``. Their sum enters the
            fused pass as the offset of each row. Default: none.

    Raises:
        UserError: a weight is not a finite number, or every weight is 0 and there is no term.

    Example:
        >>> gate = Gate(rate=0.1, significance=Significance(loss=0.7, entropy=0.3))
    """

    loss: float | Weight = 0.0
    entropy: float | Weight = 0.0
    grad_norm: float | Weight = 0.0
    sum_squares: float | Weight = 0.0
    max_prob: float | Weight = 0.0
    margin: float | Weight = 0.0
    logsumexp: float | Weight = 0.0
    terms: tuple[Term, ...] = ()

    def __post_init__(self) -> None:
        for name, weight in self._given.items():
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool) and math.isfinite(weight)
            if not (number or callable(weight)):
                raise UserError(f"the weight `{name}` of a significance must be a finite number, got {weight!r}")
        terms = self.terms
        if not isinstance(terms, (tuple, list)) or not all(isinstance(term, Term) for term in terms):
            raise UserError(f"`terms` must be terms such as Novelty(0.2), got {terms!r}")
        object.__setattr__(self, "terms", tuple(terms))
        if not self._counting and not self.terms:
            raise UserError("a significance must have at least one term, got weights of 0; use loss=1.0, for example")

    @property
    def _given(self) -> dict[str, Any]:
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "terms"}

    @property
    def _counting(self) -> dict[str, Any]:
        return {name: weight for name, weight in self._given.items() if callable(weight) or weight != 0.0}

    @property
    def weights(self) -> dict[str, float]:
        """Weights other than 0, by the statistic's name.

        Raises:
            UserError: a weight follows a schedule, see ``at``.
        """
        if self.schedules:
            raise UserError(f"the weights {', '.join(self.schedules)} follow schedules, which cannot be served here")
        return self.at(0.0)

    def at(self, progress: float) -> dict[str, float]:
        """Weights, by the statistic's name, that are not always 0.

        Args:
            progress: fraction of the run that is done, 0 to 1.

        Raises:
            UserError: a schedule gave a weight that is not finite.
        """
        return {name: weight_at(weight, progress, f"`{name}`") for name, weight in self._counting.items()}

    @property
    def schedules(self) -> dict[str, Weight]:
        """Schedules among the statistics' weights, by name."""
        return {name: weight for name, weight in self._given.items() if callable(weight)}

    def copy(self) -> Significance:
        """Return a copy whose terms and schedules have state of their own; itself where there are none."""
        return copy.deepcopy(self) if self.terms or self.schedules else self

    @property
    def settings(self) -> dict[str, Any]:
        """Weights, and terms with what they were made with, for a checkpoint to compare."""
        weights = {name: schedule_name(w) if callable(w) else float(w) for name, w in self._counting.items()}
        return {**weights, **{f"term {number}": repr(term) for number, term in enumerate(self.terms)}}


def weight_at(weight: float | Weight, progress: float, name: str) -> float:
    """Evaluate a weight.

    Args:
        weight: a number, or a schedule.
        progress: fraction of the run that is done, 0 to 1.
        name: name of the weight, for the message.

    Raises:
        UserError: a schedule gave what is no finite number.
    """
    value = weight(progress) if callable(weight) else weight
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"the weight {name} must be a finite number, got {value!r} at progress {progress:g}")
    return float(value)
