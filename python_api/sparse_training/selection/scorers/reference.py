"""The loss minus that of a fixed model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparse_training.errors import UserError
from sparse_training.evaluation import forward, unwrap
from sparse_training.selection.scorers.base import Scorer
from sparse_training.selection.scorers.model import SelfScorer
from sparse_training.selection.types import Batch, LossFunction, Scores, SelectedBatch


class ReferenceScorer(Scorer):
    """The loss minus that of a fixed model, trained on other data: what can be learned and is not yet.

    (RHO-loss; Mindermann et al., "Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet
    Learnt", ICML 2022.) Noise is hard for both models, and what both know is easy for both.

    Args:
        reference: the fixed model; or a file with the state of one built as the trained model is, or with such a
            state under "model".
        of: scorer of the model that is trained; None for the model itself.

    Where rows have numbers the reference runs once on each row, and its losses are kept: s is then that of ``of``.
    """

    name = "reference"

    def __init__(self, reference: nn.Module | str | Path, *, of: Scorer | None = None) -> None:
        super().__init__()
        self.of = of if of is not None else SelfScorer()
        if self.of.before_loading:
            raise UserError(f"a reference for the scorer {self.of.name}: wanted one that scores batches")
        self._reference: nn.Module | str | Path
        self.__dict__["_reference"] = reference  # not a part of the state
        self.table: Tensor | None = None  # float32 [rows of the data set], NaN where not yet run

    def attach(
        self, model: nn.Module, criterion: LossFunction, *, device: torch.device, precision: str = "auto"
    ) -> None:
        super().attach(model, criterion, device=device, precision=precision)
        self.of.attach(model, criterion, device=device, precision=precision)
        self.dtype = self.of.dtype
        if not isinstance(self._reference, nn.Module):
            self.__dict__["_reference"] = load_reference(self._reference, unwrap(model))
        self._reference.to(device).requires_grad_(False).eval()  # type: ignore[union-attr]

    def prepare(self, rows: int | None) -> None:
        self.of.prepare(rows)
        if rows is not None and self.table is None:
            self.table = torch.full((rows,), torch.nan, device=self.device)

    def build(self, batch: Batch, logits: Any) -> None:
        self.of.build(batch, logits)

    def forward(self, batch: Batch) -> Scores:
        scores: Scores = self.of(batch)
        scores.offset = -self.losses(batch)
        return scores

    def losses(self, batch: Batch) -> Tensor:
        """float32 [B]: the reference's."""
        if self.table is None or batch.ids is None:
            return self._run(batch.inputs, batch.targets)
        found = self.table[batch.ids]
        new = found.isnan()
        if new.any():  # waits for an accelerator, which once every row was met it need not
            index = new.nonzero().squeeze(1)
            parts = pytree.tree_map_only(Tensor, lambda tensor: tensor[index], (batch.inputs, batch.targets))
            found[index] = self._run(*parts)
            self.table[batch.ids] = found
        return found

    @torch.no_grad()
    def _run(self, inputs: Any, targets: Tensor) -> Tensor:
        assert isinstance(self._reference, nn.Module)
        # A loss that is not finite would be asked for again and again.
        return self.criterion(forward(self._reference, inputs), targets).float().nan_to_num(0.0, 0.0, 0.0)

    def watch(self) -> Any:
        return self.of.watch()

    def learn(self, kept: SelectedBatch) -> None:
        self.of.learn(kept)

    def set_learning_rate(self, factor: float) -> None:
        self.of.set_learning_rate(factor)

    def get_extra_state(self) -> dict[str, Any]:
        return {} if self.table is None else {"table": self.table}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        if state:
            self.table = state["table"].to(self.device)


def load_reference(path: str | Path, model: nn.Module) -> nn.Module:
    """A copy of the model with the state in a file.

    Raises:
        UserError: no such file, or not a state of such a model.
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
