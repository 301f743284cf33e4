"""A table of past losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_training.errors import UserError
from sparse_training.selection.scorers.base import Scorer
from sparse_training.selection.types import Scores


class HistoryScorer(Scorer):
    """Each row's loss when it was last trained on: s = 0, and rows left out are neither loaded nor run.

    Rows that were never trained on come before all others. A policy that takes the largest never looks again at what
    it left out, and by these losses that is for ever, but for the dense phases: what draws with weights does not.
    """

    name = "history"
    before_loading = True

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None  # float32 [rows], on the CPU; NaN before a row's first loss
        self._observed: tuple[Tensor, Tensor] | None = None  # not yet in the table
        self._loaded = False  # a state was loaded that no step has changed since

    def prepare(self, rows: int | None) -> None:
        if rows is None:
            raise UserError(
                "the scorer history asks for rows by their number: wanted data held in memory (ResidentLoader); "
                "for a DataLoader there is HistorySampler"
            )
        if self.table is None or not self._loaded:
            self._observed = None
            self.table = torch.full((rows,), torch.nan)
        elif len(self.table) != rows:
            raise UserError(f"the scorer history has a table of {len(self.table)} rows: wanted one of {rows}")

    def observe(self, ids: Tensor, losses: Tensor) -> None:
        self._loaded = False
        self._enter()
        self._observed = ids, losses

    def _enter(self) -> Tensor:
        assert self.table is not None, "prepare was not called"
        if self._observed is not None:
            ids, losses = (part.cpu() for part in self._observed)  # waits for the step before
            self.table[ids] = torch.where(losses.isfinite(), losses.float(), self.table[ids])
            self._observed = None
        return self.table

    def recall(self, ids: Tensor) -> Scores:
        losses = self._enter()[ids]
        largest = losses.nan_to_num(0.0).max() if len(losses) else 0.0
        return Scores(None, self.criterion, losses=torch.where(losses.isnan(), largest, losses))

    def get_extra_state(self) -> dict[str, Any]:
        return {} if self.table is None else {"table": self._enter()}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        self._observed = None
        if state:
            self.table, self._loaded = state["table"].cpu(), True
