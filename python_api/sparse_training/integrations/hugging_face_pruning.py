"""Hugging Face's ``Trainer`` on fewer samples, with the expected gradient of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from sparse_training.announcements import announce
from sparse_training.criterion import IGNORED
from sparse_training.data.numbered import Drawn, Draws
from sparse_training.data.row_numbers import unnumbered_reason
from sparse_training.errors import UserError
from sparse_training.evaluation import evaluation_statistics
from sparse_training.integrations.hugging_face import ITEMS, Base, GatedTrainer
from sparse_training.integrations.hugging_face_tasks import (
    TASKS,
    Rows,
    auxiliary_loss,
    find_objectives,
    objectives,
)
from sparse_training.objective import agrees
from sparse_training.samplers.indexed import Indexed
from sparse_training.selection.policies.infobatch import InfoBatchPolicy

STATE = "pruning.pt"
NUMBERS = "row_numbers"  # key of a batch


class PrunedTrainer(Base):  # type: ignore[misc]
    """Mixin that makes a ``transformers.Trainer`` leave out well-learned samples without bias, before they are read.

    It stands before the ``Trainer`` class among the bases, and trains as ``InfoBatchPolicy`` does: a sample whose last
    loss is below the mean is left out with probability ``prune``, or weighs 1 / (1 - prune). Each of the Trainer's
    batches is pruned by itself, so a run has the Trainer's own number of steps, and they are smaller. Divided by the
    targets of the whole batch, the loss's expected gradient is the Trainer's own. Evaluation stays as it is.

    Example:
        >>> class MyTrainer(PrunedTrainer, Trainer):
        ...     pass
        >>> MyTrainer(model, args, train_dataset=data).train()

    Args:
        *arguments: positional arguments of the ``Trainer``.
        prune: probability of leaving out a well-learned sample, in [0, 1). Default 0.5.
        delta: fraction of the run after which no sample is left out, in [0, 1]. Default 0.875.
        **options: keyword arguments of the ``Trainer``.

    Raises:
        UserError: an argument out of range. In training: several processes, data whose rows have no numbers, a
            function for the loss, or a loss of no known kind.
    """

    _host, _rows, _features = GatedTrainer._host, GatedTrainer._rows, GatedTrainer._features

    def __init__(self, *arguments: Any, prune: float = 0.5, delta: float = 0.875, **options: Any) -> None:
        if not 0.0 <= delta <= 1.0:
            raise UserError(f"`delta` must be in [0, 1], got {delta}")
        self.policy, self.delta = InfoBatchPolicy(prune=prune), delta
        super().__init__(*arguments, **options)
        self.policy.seed = self.args.seed
        if getattr(self, "compute_loss_func", None) is not None:
            raise UserError("PrunedTrainer computes the loss of each sample itself, got compute_loss_func")
        self._draws: _Batches | None = None
        self._objectives, self._found, self._by_target = objectives(TASKS), False, True
        # float32 [rows]: numbers of targets that the loss averages over in each, and that the Trainer counts
        self._targets, self._items = torch.empty(0), torch.empty(0)
        self._counted: list[str] = []

    def get_train_dataloader(self) -> Any:
        """Make the Trainer's own loader again, with a batch sampler that leaves rows out."""
        given = super().get_train_dataloader()
        if self.accelerator.num_processes > 1:
            raise UserError(f"PrunedTrainer needs one process, got {self.accelerator.num_processes}")
        plain = DataLoader(given.dataset, batch_size=None)
        if not isinstance(given.dataset, IterableDataset) and getattr(given, "batch_sampler", None) is not None:
            plain = DataLoader(given.dataset, batch_sampler=given.batch_sampler, collate_fn=given.collate_fn)
        reason = unnumbered_reason(plain, self._first_targets)
        if reason is not None:
            raise UserError(f"PrunedTrainer asks for rows by their number, and {reason}; use the Trainer itself")
        rows = len(given.dataset)
        if self.policy.rows != rows:
            self.policy.prepare(rows)
            self._targets, self._items = torch.zeros(rows), torch.zeros(rows)
        self._draws = _Batches(given.batch_sampler, rows)
        self._draws.choose = self.policy.choose
        workers = {"prefetch_factor": given.prefetch_factor} if given.num_workers else {}
        loader = DataLoader(
            Indexed(given.dataset), batch_sampler=self._draws, collate_fn=_Collate(given.collate_fn),
            num_workers=given.num_workers, pin_memory=given.pin_memory, worker_init_fn=given.worker_init_fn,
            persistent_workers=given.persistent_workers, **workers,
        )  # fmt: skip
        return self.accelerator.prepare(loader)

    def _first_targets(self, batch: Mapping[str, Any]) -> Tensor:
        """Targets of a batch, whatever their name."""
        names = [name for name in (*self.label_names, "labels", "start_positions") if name in batch]
        if not names:
            raise UserError(f"a batch must have labels, got {', '.join(map(str, batch))}")
        targets: Tensor = batch[names[0]]
        return targets

    def get_batch_samples(self, *arguments: Any, **options: Any) -> Any:
        """Fetch the batches of an optimizer step, with the number of targets that they have with the rows left out.

        Args:
            *arguments: those of ``transformers.Trainer.get_batch_samples``.
            **options: those of ``transformers.Trainer.get_batch_samples``.

        Returns:
            The batches, and the number of targets or None.
        """
        batches, items = super().get_batch_samples(*arguments, **options)
        assert self._draws is not None
        ends = self.state.max_steps > 0 and self.state.global_step >= self.delta * self.state.max_steps
        self._draws.choose = None if ends else self.policy.choose
        for sentence in self.policy.take_news():
            announce(sentence)
        if items is not None and batches:
            items = torch.as_tensor(items)
            self._find_counted(batches, int(items))
            items = torch.full_like(items, sum(self._offered_items(batch) for batch in batches))
        return batches, items

    def _find_counted(self, batches: Sequence[Mapping[str, Any]], items: int) -> None:
        """Find which labels the Trainer counts: all of them, or those after the first of each sample."""
        totals: dict[str, int] = {}
        for batch in batches:
            for name, counts in _counted_labels(batch).items():
                totals[name] = totals.get(name, 0) + int(counts.sum())
        fits = [name for name, total in totals.items() if total == items and name in (self._counted or totals)]
        if not fits:
            raise UserError(f"the Trainer counts {items} targets, and the labels have {totals}; use the Trainer itself")
        self._counted = fits

    def _offered_items(self, batch: Mapping[str, Any]) -> int:
        """Number of targets that the Trainer would count in a batch with the rows left out of it."""
        drawn = self._drawn(batch)
        self._items[drawn.index] = _counted_labels(batch)[self._counted[0]].float().cpu()
        return int(self._items[drawn.offered].sum())

    def _drawn(self, batch: Mapping[str, Any]) -> Drawn:
        assert self._draws is not None
        return self._draws.by_rows[tuple(batch[NUMBERS].tolist())]

    # --- the loss -------------------------------------------------------------------------------

    def compute_loss(self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, **options: Any) -> Any:
        """Compute the loss of the rows kept, weighted; the Trainer's own in evaluation.

        Args:
            model: the model.
            inputs: a batch, with its targets.
            return_outputs: True to return the model's outputs as well. Default False.
            **options: further arguments of ``transformers.Trainer.compute_loss``.

        Returns:
            The loss, or the loss and the outputs.
        """
        batch = {name: value for name, value in inputs.items() if name != NUMBERS}
        if not model.training:
            return super().compute_loss(model, batch, return_outputs, **options)
        items = options.get("num_items_in_batch")
        if not self._found:
            self._find_objective(model, batch, counts_items=items is not None)
        drawn, outputs = self._drawn(inputs), model(**self._features(batch))
        rows = self._rows(outputs, batch)
        losses, counts = rows.criterion(rows.logits, rows.targets), self._counts(rows)
        weight = drawn.weights().to(losses.device) * (len(drawn.offered) / len(drawn.index))  # as drawn: 1/p
        self._targets[drawn.index] = counts.float().cpu()
        by_items = items is not None and self._objectives[0].by_items
        divisor: Any = items if by_items else float(self._targets[drawn.offered].sum())
        loss: Any = (losses * counts * weight).sum() / max(divisor, 1) + auxiliary_loss(outputs, self._host)
        self.policy.observe(drawn.index, losses.detach(), None)
        return (loss, outputs) if return_outputs else loss

    def _find_objective(self, model: Any, batch: Mapping[str, Any], *, counts_items: bool) -> None:
        """Find how the Trainer's own loss is made, which is computed for it."""
        items = ITEMS if counts_items else None
        options = {} if items is None else {"num_items_in_batch": torch.tensor(items, device=self.args.device)}
        with torch.no_grad(), evaluation_statistics(model), self.compute_loss_context_manager():
            loss, outputs = super().compute_loss(model, dict(batch), return_outputs=True, **options)
        self._objectives = find_objectives(self._objectives, loss, outputs, batch, self._host, items)
        rows = self._rows(outputs, batch)
        losses, mean = rows.criterion(rows.logits, rows.targets), rows.mean()
        for self._by_target in (True, False):
            counts = self._counts(rows)
            if not bool(mean.isfinite()) or agrees((losses * counts).sum() / counts.sum().clamp(min=1), mean):
                break
        else:
            task = self._objectives[0].task.__name__
            raise UserError(f"the loss of {task} is no mean over samples or targets; use the Trainer itself")
        self._found = len(self._objectives) == 1

    def _counts(self, rows: Rows) -> Tensor:
        """Number of targets of each sample that the loss averages over; 1 where it averages over samples."""
        counts = (rows.targets != IGNORED).reshape(len(rows.targets), -1).sum(1)
        return counts if self._by_target else torch.ones_like(counts)

    # --- checkpoints ----------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = output_dir if output_dir is not None else self.args.output_dir
        torch.save(
            {"policy": self.policy.state_dict(), "targets": self._targets, "items": self._items}, Path(folder) / STATE
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / STATE
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.policy.load_state_dict(state["policy"])
            self._targets, self._items = state["targets"], state["items"]


def _counted_labels(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Numbers of labels that count in each sample, int64 [B], by what of the labels is counted."""

    def number(labels: Tensor) -> Tensor:
        return (labels != IGNORED).reshape(len(labels), -1).sum(1)

    if "shift_labels" in batch:
        return {"shift_labels": number(batch["shift_labels"])}
    labels = batch["labels"]
    return {"all": number(labels), **({"after the first": number(labels[..., 1:])} if labels.ndim > 1 else {})}


class _Batches(Draws):
    """Batch sampler of the rows that are kept of each batch of the Trainer's own.

    Attributes:
        by_rows: what was drawn, by the row numbers of its batch, in this epoch.
    """

    def __init__(self, given: Any, rows: int) -> None:
        super().__init__(given, rows)
        self.together, self.next_epoch = True, 0
        self.by_rows: dict[tuple[int, ...], Drawn] = {}

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch that begins next, as accelerate does."""
        self.next_epoch = epoch
        for sampler in (self.batch_sampler, getattr(self.batch_sampler, "sampler", None)):
            if callable(set_epoch := getattr(sampler, "set_epoch", None)):
                set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        self.begin(self.next_epoch)
        self.next_epoch += 1
        self.by_rows = {}
        for rows in super().__iter__():
            self.by_rows[tuple(rows)] = self.drawn[-1]
            yield rows


class _Collate:
    """Collates items and adds their row numbers to the batch.

    Args:
        collate: the Trainer's own function.
    """

    def __init__(self, collate: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        batch = self.collate([item for _, item in items])
        return {**batch, NUMBERS: torch.tensor([number for number, _ in items])}
