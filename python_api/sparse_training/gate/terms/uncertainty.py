"""How undecided the model is."""

from __future__ import annotations

from torch import Tensor

from sparse_training.gate.terms.base import ScaledTerm
from sparse_training.gate.terms.context import Context


class Uncertainty(ScaledTerm):
    """Entropy of the predicted distribution, on its running scale.

    Args:
        weight: as for ``Term``.
    """

    statistics = ("entropy",)

    def magnitude(self, context: Context) -> Tensor:
        """Entropy of each row, in nats."""
        return context.statistic("entropy", self)
