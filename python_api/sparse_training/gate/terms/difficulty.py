"""How hard a row is for the model now."""

from __future__ import annotations

from torch import Tensor

from sparse_training.gate.terms.base import ScaledTerm
from sparse_training.gate.terms.context import Context


class Difficulty(ScaledTerm):
    """Loss, on its running scale.

    A weight of ``Transition(-0.25, 0.25)`` is the curriculum that begins with easy rows and ends with hard ones.

    Args:
        weight: as for ``Term``.
    """

    statistics = ("loss",)

    def magnitude(self, context: Context) -> Tensor:
        """Loss of each row, from 0."""
        return context.statistic("loss", self).clamp(min=0.0)
