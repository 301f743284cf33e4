"""No preference."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_training.gate.terms.base import Term
from sparse_training.gate.terms.context import Context


class Constant(Term):
    """1 for every row: no preference. With ``Gate(ties="random")`` the gate then keeps random rows.

    Args:
        weight: as for ``Term``.
    """

    def forward(self, context: Context) -> Tensor:
        """Return ones."""
        return torch.ones(context.rows, device=context.valid.device)
