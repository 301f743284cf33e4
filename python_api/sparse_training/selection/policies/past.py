"""Rows by what training last made of them: none is scored, and none that is left out is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_training.errors import UserError
from sparse_training.samplers.importance import Importance
from sparse_training.samplers.infobatch import InfoBatch
from sparse_training.samplers.score_table import ScoreTable
from sparse_training.selection.policies.base import Policy
from sparse_training.selection.types import CandidateIndices, WeightedIndices


class PastPolicy(Policy):
    """The base of policies that choose rows by their numbers, by what training last made of each.

    The next choice hangs on the last step's losses, so on an accelerator it waits for that step.
    """

    rows: int | None = None  # of the data set, once known
    _observed: tuple[Tensor, Tensor, Any] | None = None  # not yet entered
    _loaded = False  # a state was loaded that no step has changed since

    @property
    def before_loading(self) -> bool:
        return True

    def prepare(
        self,
        rows: int | None,
        targets: Tensor | None = None,
        duplicate_counts: Callable[[], Tensor | None] | None = None,
    ) -> None:
        if rows is None:
            raise UserError(
                f"the policy {self.name} asks for rows by their number: wanted data held in memory (ResidentLoader); "
                "for a DataLoader there is HistorySampler"
            )
        if not self._loaded:  # a run begins without a past, which may be that of other rows or other labels
            self._observed = None
            self.start(rows, targets, duplicate_counts)
            self.rows = rows
        elif self.rows != rows:
            raise UserError(f"the policy {self.name} knows {self.rows} rows: wanted as many, given {rows}")

    def start(self, rows: int, targets: Tensor | None, duplicate_counts: Callable[[], Tensor | None] | None) -> None:
        """Make what remembers the rows; the arguments are those of ``prepare``."""
        raise NotImplementedError

    def enter(self, ids: Tensor, losses: Tensor, logits: Any) -> None:
        """Remember what was observed; this may wait for the device."""
        raise NotImplementedError

    def observe(self, ids: Tensor, losses: Tensor, logits: Any) -> None:
        self._loaded = False
        self.up_to_date()
        self._observed = ids, losses, logits

    def up_to_date(self) -> None:
        """Enter what was last observed: here, not in ``observe``, where it would wait for the step."""
        if self._observed is not None:
            self.enter(*self._observed)
            self._observed = None


class HistoryPolicy(PastPolicy):
    """Chooses by each row's loss when it was last trained on."""

    table: ScoreTable | None = None

    def start(self, rows: int, targets: Tensor | None, duplicate_counts: Callable[[], Tensor | None] | None) -> None:
        self.table = ScoreTable(rows)
        self.set_law(self.table)

    def set_law(self, table: ScoreTable) -> None:
        """Make what draws from the table."""
        raise NotImplementedError

    def observe(self, ids: Tensor, losses: Tensor, logits: Any) -> None:
        super().observe(ids, losses, None)  # a step's logits would be held for nothing

    def enter(self, ids: Tensor, losses: Tensor, logits: Any) -> None:
        self.known().update(ids, losses)

    def known(self) -> ScoreTable:
        """The table."""
        assert self.table is not None, "prepare was not called"
        return self.table

    def warnings(self, rate: float | None) -> list[str]:
        self.up_to_date()
        table, found = self.known(), []
        if table.seen < table.rows:
            found.append(
                f"{table.rows - table.seen} of {table.rows} rows were never trained on: the run was too short for "
                "their past to matter"
            )
        if table.invalid:
            found.append(f"{table.invalid} losses were not finite and left out of the table")
        return found

    def get_extra_state(self) -> dict[str, Any]:
        self.up_to_date()
        return {} if self.table is None else {"table": self.table.state_dict()}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        self._observed = None
        if state:
            self._loaded = self.rows is not None
            self.prepare(len(state["table"]["scores"]))
            self.known().load_state_dict(state["table"])
            self._loaded = True


class ImportancePolicy(HistoryPolicy):
    """As many rows as ``random`` keeps, drawn from the whole data set by their last losses, weighted 1/p.

    See ``history.Importance``; rows never trained on come first.
    """

    name = "importance"

    def __init__(self, rate: float = 0.1, seed: int = 0, uniform: float = 0.1) -> None:
        super().__init__(rate, seed)
        self.uniform = uniform
        self.law: Importance | None = None

    @property
    def target(self) -> float:
        return self.rate

    def set_law(self, table: ScoreTable) -> None:
        self.law = Importance(table, seed=self.seed, uniform=self.uniform)

    def choose(self, offer: CandidateIndices) -> WeightedIndices:
        self.up_to_date()
        assert self.law is not None
        return WeightedIndices(*self.law.draw(max(1, round(self.rate * len(offer.ids)))))

    def get_extra_state(self) -> dict[str, Any]:
        state = super().get_extra_state()
        return {**state, "law": self.law.state_dict()} if self.law is not None else state

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        super().set_extra_state(state)
        if self.law is not None and state:
            self.law.load_state_dict(state["law"])


class InfoBatchPolicy(HistoryPolicy):
    """Every row but some of the well-learned ones; see ``history.InfoBatch``.

    As published, steps are as large as without it and fewer: rows that one batch has too few of wait for
    the next one, and in the meantime a step does nothing. The rate follows from the losses; ``rate`` is
    not used. The trainer's anneal, an eighth of the run by default, is the published delta = 0.875.
    """

    name = "infobatch"

    def __init__(self, rate: float = 1.0, seed: int = 0, prune: float = 0.5) -> None:
        super().__init__(rate, seed)
        self.prune = prune
        self.law: InfoBatch | None = None
        self.waiting = WeightedIndices(torch.empty(0, dtype=torch.int64), torch.empty(0))

    def set_law(self, table: ScoreTable) -> None:
        self.law = InfoBatch(table, seed=self.seed, prune=self.prune)
        self.waiting = WeightedIndices(torch.empty(0, dtype=torch.int64), torch.empty(0))

    def choose(self, offer: CandidateIndices) -> WeightedIndices:
        self.up_to_date()
        assert self.law is not None
        kept = self.law.prune(offer.ids, offer.epoch)
        index = torch.cat((self.waiting.index, kept.index))
        weight = torch.cat((self.waiting.weights(), kept.weights()))
        size = len(offer.ids) if len(index) >= len(offer.ids) else 0
        self.waiting = WeightedIndices(index[size:], weight[size:])
        return WeightedIndices(index[:size], weight[:size])

    def get_extra_state(self) -> dict[str, Any]:
        state = {**super().get_extra_state(), "waiting": tuple(self.waiting)}
        return {**state, "law": self.law.state_dict()} if self.law is not None else {}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        super().set_extra_state(state)
        if self.law is not None and state:
            self.law.load_state_dict(state["law"])
            self.waiting = WeightedIndices(*(part.cpu() for part in state["waiting"]))
