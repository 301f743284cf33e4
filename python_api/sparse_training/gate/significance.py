"""The significance of a row: a weighted sum of its statistics."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from sparse_training.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Significance:
    """Weights of the row statistics whose sum is a row's significance, one keyword for each term.

    A negative weight ranks rows down. Only ratios matter, because the gate's threshold finds its own scale.

    Args:
        loss: weight of -log p[target], in nats. Default 0.
        entropy: weight of the entropy, in nats. Default 0.
        grad_norm: weight of the norm of the loss's gradient in the logits (EL2N). Default 0.
        sum_squares: weight of the sum of the squared probabilities. Default 0.
        max_prob: weight of the largest probability. Default 0.
        margin: weight of the largest probability minus the second largest. Default 0.
        logsumexp: weight of the log-sum-exp of the logits. Default 0.

    Raises:
        UserError: a weight is not a finite number, or every weight is 0.

    Example:
        >>> gate = Gate(rate=0.1, significance=Significance(loss=0.7, entropy=0.3))
    """

    loss: float = 0.0
    entropy: float = 0.0
    grad_norm: float = 0.0
    sum_squares: float = 0.0
    max_prob: float = 0.0
    margin: float = 0.0
    logsumexp: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in asdict(self).items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise UserError(f"the weight `{name}` of a significance must be a finite number, got {weight!r}")
        if not self.weights:
            raise UserError("a significance must have at least one term, got weights of 0; use loss=1.0, for example")

    @property
    def weights(self) -> dict[str, float]:
        """Weights other than 0, by the statistic's name."""
        return {name: float(weight) for name, weight in asdict(self).items() if weight != 0.0}
