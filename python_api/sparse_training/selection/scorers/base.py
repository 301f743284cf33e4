"""The interface of scorers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sparse_training.precision import scoring_dtype
from sparse_training.selection.types import Batch, LossFunction, Scores, SelectedBatch


class Scorer(nn.Module):
    """Scores the rows of a batch for a policy.

    To add a scorer, subclass it and override ``logits`` or ``forward``. A policy owns its scorer; the trainer attaches
    it to the model before the first step.

    Args:
        precision: precision of the scoring pass, "float32", "bfloat16", "float16" or "auto"; None (the default) for the
            trainer's ``scoring_precision``.

    Attributes:
        name: name of the scorer, as in ``SparseTrainer(scorer=...)``.
        before_loading: True if it needs row numbers alone (``recall``), so that rows left out are never loaded.
        dtype: autocast type of the scoring pass; None for the model's own.
        device: device of the model.

    Raises:
        UserError: the precision is unknown.
    """

    name: str = "scorer"
    before_loading = False
    dtype: torch.dtype | None = None

    def __init__(self, *, precision: str | None = None) -> None:
        super().__init__()
        self.precision = precision
        if precision is not None:
            scoring_dtype(precision, torch.device("cpu"))  # refuses an unknown name
        self.device = torch.device("cpu")
        self._attached: tuple[nn.Module, LossFunction] | None = None  # in a tuple: not part of the scorer's state

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        assert self._attached is not None, "the scorer is not attached to a model"
        return self._attached[0]

    @property
    def criterion(self) -> LossFunction:
        """The loss that the model is trained on."""
        assert self._attached is not None, "the scorer is not attached to a model"
        return self._attached[1]

    def attach(
        self, model: nn.Module, criterion: LossFunction, *, device: torch.device, precision: str = "auto"
    ) -> None:
        """Attach the scorer to the model that is trained.

        Args:
            model: the model.
            criterion: its loss, one per row.
            device: device of the model.
            precision: precision of the scoring pass, for a scorer made without one. Default "auto".
        """
        self._attached, self.device = (model, criterion), device
        self.dtype = scoring_dtype(self.precision or precision, device)

    def prepare(self, rows: int | None) -> None:
        """Called before each run, to allocate what depends on the data set.

        Args:
            rows: number of rows of the data set; None where they have no numbers.
        """

    def build(self, batch: Batch, logits: Any) -> None:
        """Called with each run's first batch, to allocate what depends on its shape.

        Args:
            batch: the batch.
            logits: the model's output for it.

        Raises:
            UserError: the scorer cannot score such a batch.
        """

    def logits(self, inputs: Any) -> Any:
        """Class logits of the inputs; ``forward`` calls it without gradient and under autocast."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Scores:
        """Score the rows of a batch."""
        with torch.no_grad(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self.logits(batch.inputs)
        return Scores(batch.targets, self.criterion, logits=logits)

    def recall(self, ids: Tensor) -> Scores:
        """Score rows by their numbers, int64 [B]; only where ``before_loading``."""
        raise NotImplementedError

    def watch(self) -> AbstractContextManager[None]:
        """Context of the training forward pass, for scorers that read the model's layers during it."""
        return nullcontext()

    def learn(self, kept: SelectedBatch) -> None:
        """Train the scorer's own network, if any, on the rows that the model was just trained on.

        With several processes all call it in every step; one that kept none of its rows passes no row, or padding.

        Args:
            kept: the rows.
        """

    def observe(self, ids: Tensor, losses: Tensor) -> None:
        """Called with the losses of the rows just trained on, in the dense phases too, where rows have numbers.

        Args:
            ids: row numbers in the data set, int64 [n].
            losses: losses of the rows, [n].
        """

    def set_learning_rate(self, factor: float) -> None:
        """Set the learning rate of the scorer's own network, if any.

        Args:
            factor: multiple of the initial learning rate, as the model's schedule gives it.
        """

    def extra_repr(self) -> str:
        """Settings that a resumed run must share."""
        return f"precision={self.precision}" if self.precision else ""
