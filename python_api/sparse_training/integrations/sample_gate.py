"""Samples of a batch, for other trainers."""

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
    """Which of a batch's samples a trainer of somebody else's is given.

    Such a trainer takes the mean over what it gets, which may not be nothing, nor for BatchNorm a single sample: so at
    least the two most significant ones are kept, which the gate's controller does not see.

    Args:
        gate: a gate, or a rate for one.

    Raises:
        UserError: a gate with weights or padding, which a plain mean does not honour.
    """

    def __init__(self, gate: Gate | float) -> None:
        self.gate = gate if isinstance(gate, Gate) else Gate(gate)
        if self.gate.temperature or self.gate.capacity is not None:
            raise UserError(
                f"a gate with temperature={self.gate.temperature}, capacity={self.gate.capacity}: wanted temperature=0 "
                "and no capacity, for the trainer takes the plain mean of the samples it is given"
            )
        self.policy = GatePolicy(gate=self.gate)

    def __call__(self, logits: Tensor, targets: Tensor) -> Selection:
        """Selects by logits [B, classes], or of several targets a sample, by their mean significance."""
        self.gate.to(logits.device)
        selection = self.policy.gated(Scores(targets, Criterion(), logits=logits.detach()))
        least = min(LEAST, len(targets))
        if len(selection.index) >= least:
            return selection
        assert self.gate.last is not None
        most = self.gate.last.significance.nan_to_num(-torch.inf).topk(least).indices.sort().values
        count = torch.full_like(selection.count, least)
        return selection._replace(index=most, weight=torch.ones(least, device=most.device), count=count)
