"""Scores by the loss minus a fixed reference model's loss."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_kernels.trees import rows_at
from sparse_training.errors import UserError
from sparse_training.evaluation import forward, unwrap
from sparse_training.selection.scorers.base import Scorer
from sparse_training.selection.scorers.model import SelfScorer
from sparse_training.selection.types import Batch, LossFunction, Scores, SelectedBatch


class ReferenceScorer(Scorer):
    """Scores by the loss minus the loss of a fixed model trained on other data: learnable and not yet learned.

    (RHO-loss; Mindermann et al., "Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet
    Learnt", ICML 2022.) Label noise is hard for both models, and what both know is easy for both.

    Where rows have numbers the reference runs once on each row, and its losses are kept: the cost is then the one of
    the scorer ``of``.

    Args:
        reference: the fixed model; or a file with the state of a model built as the trained one is, or with such a
            state under "model".
        of: scorer of the model that is trained; None (the default) for the model itself.

    Attributes:
        table: the reference's losses, float32 [rows of the data set], NaN where it has not run yet; None where rows
            have no numbers.

    Raises:
        UserError: ``of`` does not score batches; in ``attach``, the file cannot be read.
    """

    name = "reference"

    def __init__(self, reference: nn.Module | str | Path, *, of: Scorer | None = None) -> None:
        super().__init__()
        self.of = of if of is not None else SelfScorer()
        if self.of.before_loading:
            raise UserError(f"`of` must be a scorer that scores batches, got {self.of.name}")
        self._reference: nn.Module | str | Path
        self.__dict__["_reference"] = reference  # not part of the state
        self.table: Tensor | None = None

    def attach(
        self, model: nn.Module, criterion: LossFunction, *, device: torch.device, precision: str = "auto"
    ) -> None:
        """Attach the scorer to the model that is trained, and load the reference; see ``Scorer.attach``."""
        super().attach(model, criterion, device=device, precision=precision)
        self.of.attach(model, criterion, device=device, precision=precision)
        self.dtype = self.of.dtype
        if not isinstance(self._reference, nn.Module):
            self.__dict__["_reference"] = load_reference(self._reference, unwrap(model))
        self._reference.to(device).requires_grad_(False).eval()  # type: ignore[union-attr]

    def prepare(self, rows: int | None) -> None:
        """Allocate the table of the reference's losses."""
        self.of.prepare(rows)
        if rows is not None and self.table is None:
            self.table = torch.full((rows,), torch.nan, device=self.device)

    def build(self, batch: Batch, logits: Any) -> None:
        """Build the scorer ``of``."""
        self.of.build(batch, logits)

    def forward(self, batch: Batch) -> Scores:
        """Score the rows of a batch: the reference's loss is the offset."""
        scores: Scores = self.of(batch)
        scores.offset = -self.losses(batch)
        return scores

    def losses(self, batch: Batch) -> Tensor:
        """Losses of the reference: float32 [B]."""
        if self.table is None or batch.ids is None:
            return self._run(batch.inputs, batch.targets)
        found = self.table[batch.ids]
        new = found.isnan()
        if new.any():  # waits for an accelerator
            index = new.nonzero().squeeze(1)
            parts = rows_at((batch.inputs, batch.targets), index, batch.rows)
            found[index] = self._run(*parts)
            self.table[batch.ids] = found
        return found

    @torch.no_grad()
    def _run(self, inputs: Any, targets: Tensor) -> Tensor:
        assert isinstance(self._reference, nn.Module)
        # A loss that is not finite would be computed again each time.
        return (
            self.criterion(forward(self._reference, inputs, self.criterion), targets).float().nan_to_num(0.0, 0.0, 0.0)
        )

    def watch(self) -> Any:
        """Context of the training forward pass of the scorer ``of``."""
        return self.of.watch()

    def learn(self, kept: SelectedBatch) -> None:
        """Train the scorer ``of``."""
        self.of.learn(kept)

    def set_learning_rate(self, factor: float) -> None:
        """Set the learning rate of the scorer ``of``."""
        self.of.set_learning_rate(factor)

    def get_extra_state(self) -> dict[str, Any]:
        """The reference's losses; empty until ``prepare`` is called."""
        return {} if self.table is None else {"table": self.table}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of ``get_extra_state``."""
        if state:
            self.table = state["table"].to(self.device)


def load_reference(path: str | Path, model: nn.Module) -> nn.Module:
    """Copy a model and load its state from a file.

    Args:
        path: file with the state, or with a mapping that holds it under "model".
        model: model to copy.

    Returns:
        The copy.

    Raises:
        UserError: the file is missing or cannot be read, or does not hold a state of such a model.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"the reference {path}: there is no such file") from None
    except Exception as error:  # a pickle's errors are of every kind
        raise UserError(f"the reference {path} cannot be read: {str(error).splitlines()[0]}") from None
    reference = copy.deepcopy(model)
    try:
        reference.load_state_dict(state.get("model", state))
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"the reference {path} is no state of the model: {' '.join(str(error).split())}") from None
    return reference
