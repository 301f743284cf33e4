"""Lightning: a module whose ``training_step`` receives the samples that a gate keeps."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_training.criterion import Criterion, named_parts, targets_are_classes
from sparse_training.data.stream import default_inputs, default_targets
from sparse_training.errors import UserError
from sparse_training.evaluation import evaluation_statistics, forward
from sparse_training.gate.gate import Gate
from sparse_training.integrations.sample_gate import SampleGate
from sparse_training.objective import settle

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
        criterion: loss of the samples to select by, a ``Criterion`` or a function of (logits, targets) without
            reduction; the loss to train on stays that of ``training_step``. Default: cross-entropy of class indices,
            of the next tokens where a loss that ``forward`` computes of ``labels`` is of those.
        **options: keyword arguments of the module's other bases.

    Raises:
        UserError: a gate with a temperature or a capacity, or a criterion that reduces over the samples. In training:
            targets that are not class indices without a criterion, or an output without logits.
    """

    def __init__(
        self, *arguments: Any, gate: Gate | float = 0.1, criterion: Criterion | Any = None, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        select = SampleGate(gate)
        self.gate = select.gate
        criterion = copy.copy(criterion) if isinstance(criterion, Criterion) else Criterion(criterion)
        # Not submodules: the gate is one already, and a loss has no state of the model's.
        self.__dict__.update(_select=select, _criterion=criterion)
        self._settled = False

    def gate_inputs(self, batch: Any) -> Any:
        """Return the inputs of ``forward`` from a batch: all but the targets."""
        return default_inputs(batch)

    def gate_targets(self, batch: Any) -> Any:
        """Return the targets of a batch."""
        return default_targets(batch)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Select the samples of a training batch; a hook of Lightning's."""
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        if not self.trainer.training:
            return batch
        inputs, targets = self.gate_inputs(batch), self.gate_targets(batch)
        if not isinstance(targets, Tensor):
            raise UserError(f"`gate_targets` must return a tensor, got a {type(targets).__name__}")
        with torch.no_grad(), evaluation_statistics(self), self.trainer.precision_plugin.forward_context():
            logits = forward(self, inputs, self._criterion)
            if not self._settled:
                self._check(logits, targets)
                self._settled = settle(self._criterion, self, inputs, targets)
        with self._criterion.learning(learns=False):
            return self._select(logits, targets, self._criterion).take(batch)

    def _check(self, logits: Any, targets: Tensor) -> None:
        if not self._criterion.is_default or (isinstance(logits, Tensor) and targets_are_classes(logits, targets)):
            return
        given = f"{list(logits.shape)}" if isinstance(logits, Tensor) else named_parts(logits)
        raise UserError(
            f"`forward` must return logits for targets that are class indices, got {given} for {targets.dtype} targets "
            f"of {list(targets.shape)}; give criterion=, a loss without reduction or Criterion(loss, outputs=...)"
        )
