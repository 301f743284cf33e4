"""Hugging Face's ``Trainer`` on the samples or tokens that a gate keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_kernels import Selection, row_stats
from sparse_training.criterion import GRANULARITIES, IGNORED
from sparse_training.errors import UserError
from sparse_training.evaluation import evaluation_statistics
from sparse_training.gate.gate import Gate
from sparse_training.integrations.hugging_face_tasks import (
    BY_TOKEN,
    TASKS,
    Host,
    Objective,
    Rows,
    auxiliary_loss,
    find_objectives,
    objectives,
)
from sparse_training.integrations.sample_gate import SampleGate
from sparse_training.objective import without_wrappers

if TYPE_CHECKING:
    Base = Any
else:
    Base = object

STATE = "gate.pt"
ITEMS = 0.5  # number of items that no batch has: tells a loss that is divided by it from a mean
LABELS = ("labels", "shift_labels", "start_positions", "end_positions")


class GatedTrainer(Base):  # type: ignore[misc]
    """Mixin that makes a ``transformers.Trainer`` train on the samples or tokens that a gate keeps.

    It stands before the ``Trainer`` class among the bases. Evaluation stays as it is. How outputs and labels make the
    loss of a sample or token is found by the first batch: it is the way that gives the trainer's own loss of it.

    Example:
        >>> class MyTrainer(GatedTrainer, Trainer):
        ...     pass
        >>> MyTrainer(model, args, train_dataset=data, gate=0.3).train()

    Args:
        *arguments: positional arguments of the ``Trainer``.
        gate: a gate, or the rate of one to make, in (0, 1]. Its state is saved with the trainer's checkpoints.
            Default 0.1.
        granularity: "sample": the batch is scored without gradient, and the trainer's own loss is computed on the kept
            samples alone. "token": one forward pass, and the mean cross-entropy of the kept tokens, with the trainer's
            label smoothing and the model's auxiliary loss; that saves the loss's own work, not the model's. Default
            "sample".
        losses: function of (outputs, inputs) that returns one loss per sample, [B], to select samples by, where the
            trainer's own loss is of no known kind. Default None.
        **options: keyword arguments of the ``Trainer``.

    Raises:
        UserError: an unknown granularity; with "sample", a gate with a temperature or a capacity; with "token",
            ``losses`` or ``compute_loss_func``. In training: a loss of no known kind; with "sample", inputs without a
            row for each sample; with "token", labels that are not classes of tokens, samples or pixels.
    """

    def __init__(
        self,
        *arguments: Any,
        gate: Gate | float = 0.1,
        granularity: str = "sample",
        losses: Callable[[Any, Mapping[str, Any]], Tensor] | None = None,
        **options: Any,
    ) -> None:
        if granularity not in GRANULARITIES:
            raise UserError(f"`granularity` must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
        self.select = SampleGate(gate) if granularity == "sample" else None
        self.gate = self.select.gate if self.select is not None else gate if isinstance(gate, Gate) else Gate(gate)
        if self.gate.ignore_index != IGNORED:
            raise UserError(f"labels that do not count are {IGNORED} here; the gate has {self.gate.ignore_index}")
        super().__init__(*arguments, **options)
        if self.select is None:
            functions = {"losses": losses, "compute_loss_func": getattr(self, "compute_loss_func", None)}
            if given := [name for name, function in functions.items() if function is not None]:
                raise UserError(
                    f'granularity="token" computes the loss of the kept tokens itself, got {given[0]}; use '
                    'granularity="sample"'
                )
        self.losses_of_samples = losses
        self._objectives: tuple[Objective, ...] = objectives(TASKS if self.select is not None else BY_TOKEN)
        self._found = False

    def compute_loss(self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, **options: Any) -> Any:
        """Compute the loss of the kept samples or tokens; of all in evaluation.

        Args:
            model: the model.
            inputs: a batch, with its targets.
            return_outputs: True to return the model's outputs as well. Default False.
            **options: further arguments of ``transformers.Trainer.compute_loss``.

        Returns:
            The loss, or the loss and the outputs.
        """
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, **options)
        outputs, items = None, options.get("num_items_in_batch")
        if self.losses_of_samples is None and not self._found:
            outputs = self._find_objective(model, inputs, counts_items=items is not None)
        if self.select is None:
            return self._loss_of_tokens(model, inputs, return_outputs, items)
        if outputs is None:
            with torch.no_grad(), evaluation_statistics(model), self.compute_loss_context_manager():
                outputs = model(**self._features(inputs))
        selection, share = self._select_samples(outputs, inputs)
        if items is not None:  # the batch keeps its part of an accumulated batch's items
            options["num_items_in_batch"] = items * share
        selected = _rows_of(inputs, selection)
        return super().compute_loss(model, selected, return_outputs, **options)

    # --- what the loss is of --------------------------------------------------------------------

    @property
    def _host(self) -> Host:
        smoother = getattr(self, "label_smoother", None)
        smoothing = 0.0 if smoother is None else float(smoother.epsilon)
        return Host(without_wrappers(self.accelerator.unwrap_model(self.model)), smoothing)

    def _find_objective(self, model: Any, inputs: Mapping[str, Any], *, counts_items: bool) -> Any:
        """Find how the trainer's own loss is made, which is computed for it; return the outputs."""
        items = ITEMS if counts_items else None
        options = {} if items is None else {"num_items_in_batch": torch.tensor(items, device=self.args.device)}
        with torch.no_grad(), evaluation_statistics(model), self.compute_loss_context_manager():
            loss, outputs = super().compute_loss(model, dict(inputs), return_outputs=True, **options)
        if self.select is None and not any(task(outputs, inputs, self._host) for task in BY_TOKEN):
            labels = inputs.get("labels")
            shape = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise UserError(f'granularity="token" needs labels that are classes of tokens, got labels of {shape}')
        found = find_objectives(self._objectives, loss / self._scale(items), outputs, inputs, self._host, items)
        self._found, self._objectives = len(found) == 1, found
        return outputs

    def _scale(self, items: Any) -> int:
        """Number that the Trainer multiplies a loss with, which ranks will average."""
        if items is None or not self.args.average_tokens_across_devices:
            return 1
        return int(self.accelerator.num_processes // getattr(self, "get_tp_size", lambda: 1)())

    def _rows(self, outputs: Any, inputs: Mapping[str, Any]) -> Rows:
        task = self._objectives[0].task
        rows = task(outputs, inputs, self._host)
        if rows is None:
            raise UserError(f"the batch's labels must be like the first batch's, of {task.__name__}")
        return rows

    def _features(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs without the labels, with an encoder-decoder model's decoder inputs made of them."""
        left_out = {*LABELS, *self.label_names}
        features = {name: value for name, value in inputs.items() if name not in left_out}
        prepare = getattr(self._host.model, "prepare_decoder_input_ids_from_labels", None)
        if prepare is not None and not {"decoder_input_ids", "decoder_inputs_embeds"} & features.keys():
            features["decoder_input_ids"] = prepare(labels=inputs["labels"])
        return features

    # --- samples --------------------------------------------------------------------------------

    def _select_samples(self, outputs: Any, inputs: Mapping[str, Any]) -> tuple[Selection, Tensor]:
        """Select samples; return their part of the targets that count, too."""
        assert self.select is not None
        if self.losses_of_samples is not None:
            losses, labels = self.losses_of_samples(outputs, inputs).detach(), inputs.get("labels")
            if losses.ndim != 1:
                raise UserError(f"`losses` must return one loss per sample, [B], got {list(losses.shape)}")
            selection = self.select(None, None, losses=losses)
            counts = torch.ones_like(losses) if labels is None else (labels != IGNORED).reshape(len(labels), -1).sum(1)
        else:
            rows = self._rows(outputs, inputs)
            selection = self.select(rows.logits, rows.targets, rows.criterion)
            counts = (rows.targets != IGNORED).reshape(len(rows.targets), -1).sum(1)
        kept = selection.take(counts).sum()
        return selection, kept.clamp(min=1) / counts.sum().clamp(min=1)

    # --- tokens ---------------------------------------------------------------------------------

    def _loss_of_tokens(self, model: Any, inputs: Mapping[str, Any], return_outputs: bool, items: Any) -> Any:
        outputs = model(**self._features(inputs))
        rows = self._rows(outputs, inputs)
        logits, targets = rows.criterion.tokens(rows.logits, rows.targets)
        self.gate.to(logits.device)
        kept = self.gate(logits, targets)
        logits, targets = kept.take((logits, targets))
        losses = row_stats(
            logits, targets, outputs=("loss",), ignore_index=IGNORED, label_smoothing=self._host.label_smoothing
        ).loss
        assert losses is not None
        loss: Any = (losses * kept.weight).sum() / self.gate.divisor()
        if items is not None and self._objectives[0].by_items:  # its part of an accumulated batch
            loss = loss * (rows.counted() / items)
        loss = (loss + auxiliary_loss(outputs, self._host)) * self._scale(items)
        return (loss, outputs) if return_outputs else loss

    # --- checkpoints ----------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = output_dir if output_dir is not None else self.args.output_dir
        torch.save(self.gate.state_dict(), Path(folder) / STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / STATE
        if path.exists():
            self.gate.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))


def _rows_of(inputs: Mapping[str, Any], selection: Selection) -> dict[str, Any]:
    """Take the selected samples of a batch.

    Raises:
        UserError: a tensor, array or list has another number of rows than the batch, and not a single one for all.
    """
    rows, selected = selection.size, dict[str, Any]()
    for name, value in inputs.items():
        of_list = isinstance(value, (list, tuple))
        shape: Any = (len(value),) if of_list else getattr(value, "shape", ())
        if len(shape) == 0 or (shape[0] == 1 and rows != 1):
            selected[name] = value
        elif shape[0] != rows:
            raise UserError(
                f'granularity="sample" needs a row of every input for each of {rows} samples, got {shape[0]} of {name};'
                ' use granularity="token"'
            )
        else:
            index = selection.index.tolist() if of_list else None
            selected[name] = selection.take(value) if index is None else [value[place] for place in index]
    return selected
