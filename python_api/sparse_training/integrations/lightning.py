"""Lightning: a module whose ``training_step`` is given the rows that a gate keeps.

class Model(GatedModule, LightningModule):
    ...  # as it was

Model(gate=0.3)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sparse_training.data.stream import default_inputs, default_targets
from sparse_training.evaluation import evaluation_statistics, forward
from sparse_training.gate.gate import Gate
from sparse_training.integrations.sample_gate import SampleGate

if TYPE_CHECKING:
    Base = Any
else:
    Base = object


class GatedModule(Base):  # type: ignore[misc]
    """Put before ``LightningModule`` among the bases; validation and prediction are left as they are.

    A training batch is scored by the module's own ``forward``, without gradient and in the trainer's precision, when
    it has been transferred to the device, and its kept rows are what the step gets. Every tensor of it has its rows in
    dim 0. The gate is a submodule ``gate``, so that checkpoints hold its state.

    Args:
        gate: a gate, or a rate for one.

    Raises:
        UserError: as ``SampleGate``.
    """

    def __init__(self, *arguments: Any, gate: Gate | float = 0.1, **options: Any) -> None:
        super().__init__(*arguments, **options)
        select = SampleGate(gate)
        self.gate = select.gate
        self.__dict__["_select"] = select  # holds the gate, which is a part of the module once

    def gate_inputs(self, batch: Any) -> Any:
        """What ``forward`` is given of a batch: all but the targets."""
        return default_inputs(batch)

    def gate_targets(self, batch: Any) -> Any:
        """The class indices of a batch."""
        return default_targets(batch)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        if not self.trainer.training:
            return batch
        with torch.no_grad(), evaluation_statistics(self), self.trainer.precision_plugin.forward_context():
            logits = forward(self, self.gate_inputs(batch))
        return self._select(logits, self.gate_targets(batch)).take(batch)
