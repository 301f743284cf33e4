"""Lightning: a module whose ``training_step`` receives the samples that a gate keeps."""

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
    """Mixin whose ``training_step`` receives the samples that a gate keeps.

    It stands before ``LightningModule`` among the bases. Validation and prediction stay as they are. A training batch
    is scored by the module's own ``forward``, without gradient and in the trainer's precision, after it was transferred
    to the device. Every tensor of the batch has its samples in dim 0. The gate is a submodule ``gate``, so that
    checkpoints hold its state.

    Example:
        >>> class Model(GatedModule, LightningModule):
        ...     ...  # unchanged
        >>> model = Model(gate=0.3)

    Args:
        *arguments: positional arguments of the module's other bases.
        gate: a gate, or the rate of one to make, in (0, 1]. Default 0.1.
        **options: keyword arguments of the module's other bases.

    Raises:
        UserError: a gate with a temperature or a capacity.
    """

    def __init__(self, *arguments: Any, gate: Gate | float = 0.1, **options: Any) -> None:
        super().__init__(*arguments, **options)
        select = SampleGate(gate)
        self.gate = select.gate
        self.__dict__["_select"] = select  # not a submodule: the gate is already one

    def gate_inputs(self, batch: Any) -> Any:
        """Return the inputs of ``forward`` from a batch: all but the targets."""
        return default_inputs(batch)

    def gate_targets(self, batch: Any) -> Any:
        """Return the class indices of a batch."""
        return default_targets(batch)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Select the samples of a training batch; a hook of Lightning's."""
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        if not self.trainer.training:
            return batch
        with torch.no_grad(), evaluation_statistics(self), self.trainer.precision_plugin.forward_context():
            logits = forward(self, self.gate_inputs(batch))
        return self._select(logits, self.gate_targets(batch)).take(batch)
