"""Hugging Face's ``Trainer``, on the samples or tokens that a gate keeps.

class MyTrainer(GatedTrainer, Trainer):
    ...

MyTrainer(model, args, train_dataset=data, gate=0.3).train()
"""

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
    """Put before a ``transformers.Trainer`` class among the bases; evaluation is left as it is.

    Args:
        gate: a gate, or a rate for one. Its state is saved with the trainer's checkpoints.
        granularity: "sample": the batch is scored without gradient, and the trainer's own loss is taken of the samples
            kept alone. "token": one forward pass, and the mean cross-entropy of the tokens kept of its logits; for a
            causal language model each token is judged by the next one. That saves the loss's own work, not the
            model's.

    Raises:
        UserError: as ``SampleGate``; with "token", labels that are no class indices.
    """

    def __init__(self, *arguments: Any, gate: Gate | float = 0.1, granularity: str = "sample", **options: Any) -> None:
        if granularity not in GRANULARITIES:
            raise UserError(f"`granularity` must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
        self.select = SampleGate(gate) if granularity == "sample" else None
        self.gate = self.select.gate if self.select is not None else gate if isinstance(gate, Gate) else Gate(gate)
        super().__init__(*arguments, **options)
        # The losses here are means over what each batch keeps, so that they are still to be divided.
        self.loss_is_scaled_for_ga = False

    def compute_loss(self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, **options: Any) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, **options)
        # How many items there were is of the batch before the gate.
        options.pop("num_items_in_batch", None)
        labels = inputs["labels"]
        features = {name: value for name, value in inputs.items() if name != "labels"}
        if self.select is None:
            outputs = model(**features)
            loss = self._loss_of_tokens(outputs["logits"], labels)
            return (loss, outputs) if return_outputs else loss
        with torch.no_grad(), evaluation_statistics(model), self.compute_loss_context_manager():
            logits, wanted = self._aligned(model(**features)["logits"], labels)
        selection = self.select(logits, wanted)
        rows = labels.shape[0]
        taken = {
            name: selection.take(value) if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value
            for name, value in inputs.items()
        }
        return super().compute_loss(model, taken, return_outputs, **options)

    def _aligned(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and what they are of: a language model's are of the next token."""
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
