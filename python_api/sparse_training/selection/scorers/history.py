"""Scores from a table of past losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_training.errors import UserError
from sparse_training.samplers.resharding import NewRank
from sparse_training.samplers.score_table import ScoreTable
from sparse_training.selection.scorers.base import Scorer
from sparse_training.selection.types import Scores


class HistoryScorer(Scorer):
    """Scores a row by its loss when it was last trained on: scoring is free, and rows left out are not loaded.

    Rows that were never trained on come before all others. A policy that takes the largest losses never looks again at
    the rows it left out, except in the dense phases; one that draws with weights does.

    Attributes:
        table: last losses of the rows; None until ``prepare`` is called.
    """

    name = "history"
    before_loading = True

    def __init__(self) -> None:
        super().__init__()
        self.table: ScoreTable | None = None
        self._observed: tuple[Tensor, Tensor] | None = None  # not yet in the table
        self._loaded = False  # a state was loaded that no step has changed since

    def prepare(self, rows: int | None) -> None:
        """Allocate the table.

        Args:
            rows: number of rows of the data set; None where they have no numbers.

        Raises:
            UserError: rows have no numbers, or there are more or fewer than in a state just loaded.
        """
        if rows is None:
            raise UserError(
                "the scorer history asks for rows by their number; use data held in memory (ResidentLoader), or for a "
                "DataLoader HistorySampler"
            )
        if self.table is None or not self._loaded:  # a run begins without a past, which may be that of other rows
            self._observed = None
            self.table = ScoreTable(rows, signed=True)
        elif self.table.rows != rows:
            raise UserError(f"the scorer history has a table of {self.table.rows} rows, got {rows} rows")

    def observe(self, ids: Tensor, losses: Tensor) -> None:
        """Keep the losses of the rows just trained on, to be entered before the next choice."""
        self._loaded = False
        self._flush()
        self._observed = ids, losses

    def _flush(self) -> ScoreTable:
        assert self.table is not None, "prepare was not called"
        if self._observed is not None:
            self.table.update(*self._observed)  # waits for the step before
            self._observed = None
        return self.table

    def recall(self, ids: Tensor) -> Scores:
        """Last losses of rows by their numbers, int64 [B]; the largest of them for rows never trained on."""
        losses = self._flush().scores[ids]
        largest = losses.nan_to_num(0.0).max() if len(losses) else 0.0
        return Scores(None, self.criterion, losses=torch.where(losses.isnan(), largest, losses))

    def get_extra_state(self) -> dict[str, Any]:
        """The table's losses; empty until ``prepare`` is called."""
        return {} if self.table is None else {"table": self._flush().scores}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of ``get_extra_state``."""
        self._observed = None
        if state:
            self.table = ScoreTable(len(state["table"]), signed=True)
            self.table.load_state_dict({"scores": state["table"], "invalid": 0})
            self._loaded = True

    def reshard(self, states: Sequence[Mapping[str, Any]], now: NewRank) -> dict[str, Any]:
        """Make this process's extra state from those of another number of processes, in order of their ranks."""
        return {"table": now.scores([state["table"] for state in states])} if all(states) else {}
