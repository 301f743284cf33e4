"""A gate that selects the samples of a batch for another trainer."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_kernels import Selection
from sparse_training.criterion import Criterion
from sparse_training.errors import UserError
from sparse_training.gate.gate import Gate
from sparse_training.selection.policies.gate import GatePolicy
from sparse_training.selection.types import Scores

LEAST = 2


class SampleGate:
    """Selects the samples of a batch that another trainer trains on.

    Such a trainer takes the mean over the samples it gets: it needs at least one, and BatchNorm needs two. So at least
    the two most significant samples are kept; the gate's controller does not count those added for this.

    Args:
        gate: a gate, or the rate of one to make, in (0, 1].

    Raises:
        UserError: a gate with a temperature or a capacity, whose weights and padding a plain mean ignores.
    """

    def __init__(self, gate: Gate | float) -> None:
        self.gate = gate if isinstance(gate, Gate) else Gate(gate)
        if self.gate.temperature or self.gate.capacity is not None:
            raise UserError(
                "a gate under another trainer must have temperature=0 and no capacity, because the trainer takes the "
                f"plain mean of its samples; got temperature={self.gate.temperature}, capacity={self.gate.capacity}"
            )
        self.policy = GatePolicy(gate=self.gate)

    def __call__(
        self, logits: Tensor | None, targets: Tensor | None, criterion: Criterion | None = None, *,
        losses: Tensor | None = None,
    ) -> Selection:  # fmt: skip
        """Select samples by their significance.

        Args:
            logits: outputs [B, ...]; for classes [B, classes], or with several targets per sample, whose mean counts.
                None with ``losses``.
            targets: targets, [B] or [B, ...]. None with ``losses``.
            criterion: loss of the samples. Default: cross-entropy.
            losses: losses [B], where they are all that is known. Default: those of the criterion.
        """
        known = logits if losses is None else losses
        assert known is not None
        self.gate.to(known.device)
        scores = Scores(
            targets, criterion or Criterion(), logits=None if logits is None else logits.detach(), losses=losses
        )
        selection = self.policy.gated(scores)
        least = min(LEAST, len(known))
        if len(selection.index) >= least:
            return selection
        assert self.gate.last is not None
        most = self.gate.last.significance.nan_to_num(-torch.inf).topk(least).indices.sort().values
        count = torch.full_like(selection.count, least)
        return selection._replace(index=most, weight=torch.ones(least, device=most.device), count=count)
