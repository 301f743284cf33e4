"""Hugging Face's ``Trainer`` on the samples or tokens that a gate keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_kernels import row_stats
from sparse_training.criterion import GRANULARITIES, Criterion
from sparse_training.errors import UserError
from sparse_training.evaluation import evaluation_statistics
from sparse_training.gate.gate import Gate
from sparse_training.integrations.sample_gate import SampleGate

if TYPE_CHECKING:
    Base = Any
else:
    Base = object

STATE = "gate.pt"


class GatedTrainer(Base):  # type: ignore[misc]
    """Mixin that makes a ``transformers.Trainer`` train on the samples or tokens that a gate keeps.

    It stands before the ``Trainer`` class among the bases. Evaluation stays as it is.

    Example:
        >>> class MyTrainer(GatedTrainer, Trainer):
        ...     pass
        >>> MyTrainer(model, args, train_dataset=data, gate=0.3).train()

    Args:
        *arguments: positional arguments of the ``Trainer``.
        gate: a gate, or the rate of one to make, in (0, 1]. Its state is saved with the trainer's checkpoints.
            Default 0.1.
        granularity: "sample": the batch is scored without gradient, and the trainer's own loss is computed on the kept
            samples alone. "token": one forward pass, and the mean cross-entropy of the kept tokens; a causal language
            model's logits are compared with the next token. That saves the loss's own work, not the model's.
            Default "sample".
        **options: keyword arguments of the ``Trainer``.

    Raises:
        UserError: an unknown granularity; with "sample", a gate with a temperature or a capacity; with "token", labels
            that are not class indices.
    """

    def __init__(self, *arguments: Any, gate: Gate | float = 0.1, granularity: str = "sample", **options: Any) -> None:
        if granularity not in GRANULARITIES:
            raise UserError(f"`granularity` must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
        self.select = SampleGate(gate) if granularity == "sample" else None
        self.gate = self.select.gate if self.select is not None else gate if isinstance(gate, Gate) else Gate(gate)
        super().__init__(*arguments, **options)
        # The losses here are means over the kept rows of one batch, which the Trainer must still divide.
        self.loss_is_scaled_for_ga = False

    def compute_loss(self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, **options: Any) -> Any:
        """Compute the loss of the kept samples or tokens; of all in evaluation.

        Args:
            model: the model.
            inputs: a batch, with its targets under "labels".
            return_outputs: True to return the model's outputs as well. Default False.
            **options: further arguments of ``transformers.Trainer.compute_loss``.

        Returns:
            The loss, or the loss and the outputs.
        """
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, **options)
        # The number of items is that of the batch before the gate.
        options.pop("num_items_in_batch", None)
        labels = inputs["labels"]
        features = {name: value for name, value in inputs.items() if name != "labels"}
        if self.select is None:
            outputs = model(**features)
            loss = self._loss_of_tokens(outputs["logits"], labels)
            return (loss, outputs) if return_outputs else loss
        with torch.no_grad(), evaluation_statistics(model), self.compute_loss_context_manager():
            logits, targets = self._aligned(model(**features)["logits"], labels)
        selection = self.select(logits, targets)
        rows = labels.shape[0]
        selected = {name: selection.take(value) if _rows_of(value) == rows else value for name, value in inputs.items()}
        return super().compute_loss(model, selected, return_outputs, **options)

    def _aligned(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and their targets: a causal language model's are the next tokens."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        name = type(self.accelerator.unwrap_model(self.model)).__name__
        if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            return logits[:, :-1], labels[:, 1:]
        return logits, labels

    def _loss_of_tokens(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits, labels = Criterion(class_dim=-1).tokens(*self._aligned(logits, labels))
        self.gate.to(logits.device)
        kept = self.gate(logits, labels)
        logits, labels = kept.take((logits, labels))
        losses = row_stats(logits, labels, outputs=("loss",), ignore_index=self.gate.ignore_index).loss
        assert losses is not None
        loss: Tensor = (losses * kept.weight).sum() / self.gate.divisor()
        return loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = output_dir if output_dir is not None else self.args.output_dir
        torch.save(self.gate.state_dict(), Path(folder) / STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / STATE
        if path.exists():
            self.gate.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))


def _rows_of(value: Any) -> int | None:
    """Return the rows in dim 0 of a tensor or an array, or the length of a list; None for what has neither."""
    if isinstance(value, (list, tuple)):
        return len(value)
    shape: Any = getattr(value, "shape", ())
    return int(shape[0]) if len(shape) else None
