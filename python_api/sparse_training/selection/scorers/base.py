"""The interface of scorers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sparse_training.precision import scoring_dtype
from sparse_training.selection.types import Batch, LossFunction, Scores, SelectedBatch


class Scorer(nn.Module):
    """What the rows of a batch are judged by. To add one, subclass it and override ``logits`` or ``forward``.

    A policy owns its scorer; the trainer attaches it to the model before the first step.

    Attributes:
        name: as in ``SparseTrainer(scorer=...)``.
        before_loading: it needs row numbers alone (``recall``), so that rows left out are never loaded.
        dtype: of autocast in the scoring pass, None for the model's own.
    """

    name: str = "scorer"
    before_loading = False
    dtype: torch.dtype | None = None

    def __init__(self, *, precision: str | None = None) -> None:
        super().__init__()
        self.precision = precision
        if precision is not None:
            scoring_dtype(precision, torch.device("cpu"))  # refuses a name that there is not
        self.device = torch.device("cpu")
        self._attached: tuple[nn.Module, LossFunction] | None = None  # in a tuple: not a part of the scorer's state

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        assert self._attached is not None, "the scorer is not attached to a model"
        return self._attached[0]

    @property
    def criterion(self) -> LossFunction:
        assert self._attached is not None, "the scorer is not attached to a model"
        return self._attached[1]

    def attach(
        self, model: nn.Module, criterion: LossFunction, *, device: torch.device, precision: str = "auto"
    ) -> None:
        """Told what is trained, on what loss and where; ``precision`` is for scorers made without one."""
        self._attached, self.device = (model, criterion), device
        self.dtype = scoring_dtype(self.precision or precision, device)

    def prepare(self, rows: int | None) -> None:
        """Told before a run how many rows the data set has; None where none can be had by its number."""

    def build(self, batch: Batch, logits: Any) -> None:
        """Told the first batch and the model's logits of it, for what hangs on their shapes; every time a run starts.

        Raises:
            UserError: the scorer cannot score such a batch.
        """

    def logits(self, inputs: Any) -> Any:
        """Class logits of the inputs; called by ``forward`` without gradient and under autocast."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Scores:
        with torch.no_grad(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self.logits(batch.inputs)
        return Scores(batch.targets, self.criterion, logits=logits)

    def recall(self, ids: Tensor) -> Scores:
        """What is known of rows by their numbers, int64 [B]; where ``before_loading``."""
        raise NotImplementedError

    def watch(self) -> AbstractContextManager[None]:
        """Entered around the training forward, for what reads the model's layers in passing."""
        return nullcontext()

    def learn(self, kept: SelectedBatch) -> None:
        """Train what is trained beside the model, on the rows that the model was just trained on.

        Of several processes all call it in every step, one that kept none of its rows with no row, or with padding.
        """

    def observe(self, ids: Tensor, losses: Tensor) -> None:
        """The losses, [n], of the rows just trained on, of the dense phases too; where rows have numbers."""

    def set_learning_rate(self, factor: float) -> None:
        """What the learning rate of anything trained beside is a multiple of, as the model's is."""

    def extra_repr(self) -> str:
        return f"precision={self.precision}" if self.precision else ""
