"""What makes a row worth training on: a weighted sum of its statistics."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from sparse_training.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Significance:
    """Weights of the row statistics whose sum is a row's significance, one keyword a term.

    ``Significance(loss=0.7, entropy=0.3)`` ranks rows by 0.7 * loss + 0.3 * entropy. A negative
    weight ranks rows down; only ratios matter, for the gate's threshold finds its own scale.

    Raises:
        UserError: a weight that is not a finite number, or no weight other than zero.
    """

    loss: float = 0.0  # -log p[target], nats
    entropy: float = 0.0  # nats
    grad_norm: float = 0.0  # norm of the loss's gradient in the logits (EL2N)
    sum_squares: float = 0.0  # sum of p^2
    max_prob: float = 0.0  # largest probability
    margin: float = 0.0  # largest probability less the second largest
    logsumexp: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in asdict(self).items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise UserError(f"significance: {name}={weight!r}; wanted a finite number")
        if not self.weights:
            raise UserError("significance: every weight is 0; wanted at least one term, such as loss=1.0")

    @property
    def weights(self) -> dict[str, float]:
        """Statistic name -> weight, of the terms that count."""
        return {name: float(weight) for name, weight in asdict(self).items() if weight != 0.0}
