"""Policies that choose rows by past outputs: no row is scored, and rows left out are not loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from sparse_training.errors import UserError
from sparse_training.ranks import rank_and_world_size
from sparse_training.samplers.resharding import NewRank
from sparse_training.samplers.score_table import ScoreTable
from sparse_training.selection.policies.base import Policy


class PastPolicy(Policy):
    """The base of policies that choose rows by their numbers, from the model's last output for each.

    The next choice depends on the last step's losses, so on an accelerator it waits for that step.

    Args:
        rate: fraction of the rows to keep, in (0, 1]. Default 1.
        seed: seed of the draws. Default 0.

    Attributes:
        rows: number of rows of the data set; None until ``prepare`` is called.
    """

    rows: int | None = None
    _observed: tuple[Tensor, Tensor, Any] | None = None  # not yet recorded
    _loaded = False  # a state was loaded that no step has changed since

    @property
    def before_loading(self) -> bool:
        """True: rows left out are never loaded."""
        return True

    @property
    def needs_numbers(self) -> bool:
        """True: rows are known by their numbers."""
        return True

    def prepare(
        self,
        rows: int | None,
        targets: Tensor | None = None,
        duplicate_counts: Callable[[], Tensor | None] | None = None,
    ) -> None:
        """Begin a run without a past, which may be that of other rows or other labels; but keep a state just loaded.

        Args:
            rows: number of rows of the data set; None where they have no numbers.
            targets: targets of all rows, [rows, ...]; None where the loader does not hold them.
            duplicate_counts: returns how many rows have the same inputs as each, int64 [rows], or None.

        Raises:
            UserError: rows have no numbers, or there are more or fewer than in the state.
        """
        if rows is None:
            raise UserError(
                f"the policy {self.name} asks for rows by their number; use data held in memory (ResidentLoader), or "
                "for a DataLoader HistorySampler"
            )
        if not self._loaded:
            self._observed = None
            self.start(rows, targets, duplicate_counts)
            self.rows = rows
        elif self.rows != rows:
            raise UserError(f"the policy {self.name} was prepared for {self.rows} rows, got {rows}")

    def start(self, rows: int, targets: Tensor | None, duplicate_counts: Callable[[], Tensor | None] | None) -> None:
        """Allocate the memory of the rows; the arguments are those of ``prepare``."""
        raise NotImplementedError

    def record(self, ids: Tensor, losses: Tensor, logits: Any) -> None:
        """Store observed outputs; this may wait for the device. The arguments are those of ``observe``."""
        raise NotImplementedError

    def observe(self, ids: Tensor, losses: Tensor, logits: Any) -> None:
        """Keep the outputs of the rows just trained on, to be recorded before the next choice."""
        self._loaded = False
        self.flush()
        self._observed = ids, losses, logits

    def flush(self) -> None:
        """Record what was last observed: here, not in ``observe``, where it would wait for the step."""
        if self._observed is not None:
            self.record(*self._observed)
            self._observed = None


class HistoryPolicy(PastPolicy):
    """The base of policies that choose by each row's loss when it was last trained on.

    Args:
        rate: fraction of the rows to keep, in (0, 1]. Default 1.
        seed: seed of the draws. Default 0.

    Attributes:
        table: last losses of the rows; None until ``prepare`` is called.
    """

    table: ScoreTable | None = None

    def start(self, rows: int, targets: Tensor | None, duplicate_counts: Callable[[], Tensor | None] | None) -> None:
        """Allocate the table and the sampler."""
        self.table = ScoreTable(rows)
        self.make_sampler(self.table)

    def make_sampler(self, table: ScoreTable) -> None:
        """Make what draws from the table."""
        raise NotImplementedError

    def observe(self, ids: Tensor, losses: Tensor, logits: Any) -> None:
        """Keep the losses; the step's logits are let go."""
        super().observe(ids, losses, None)

    def record(self, ids: Tensor, losses: Tensor, logits: Any) -> None:
        """Enter observed losses into the table."""
        self.require_table().update(ids, losses)

    def require_table(self) -> ScoreTable:
        """The table, which ``prepare`` made."""
        assert self.table is not None, "prepare was not called"
        return self.table

    def warnings(self, rate: float | None) -> list[str]:
        """Warn of rows never trained on and of losses that were not finite."""
        self.flush()
        table, found = self.require_table(), []
        if table.seen < table.rows:
            whose = "" if rank_and_world_size()[1] == 1 else " by this process"
            found.append(
                f"{table.rows - table.seen} of {table.rows} rows were never trained on{whose}: {self.unseen_reason()}"
            )
        if table.invalid:
            found.append(f"{table.invalid} losses were not finite and left out of the table")
        return found

    def unseen_reason(self) -> str:
        """Reason for which some rows were never trained on."""
        return "the run was too short for past losses to matter"

    def get_extra_state(self) -> dict[str, Any]:
        """The table's state; empty until ``prepare`` is called."""
        self.flush()
        return {} if self.table is None else {"table": self.table.state_dict()}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of ``get_extra_state``."""
        self._observed = None
        if state:
            self._loaded = self.rows is not None
            self.prepare(len(state["table"]["scores"]))
            self.require_table().load_state_dict(state["table"])
            self._loaded = True

    def reshard(self, states: Sequence[Mapping[str, Any]], now: NewRank) -> dict[str, Any]:
        """Make this process's extra state from those of another number of processes, in order of their ranks."""
        if not all(states):  # of a run whose rows had no numbers
            return {}
        tables = [state["table"] for state in states]
        invalid = sum(table["invalid"] for table in tables) if now.rank == 0 else 0
        return {"table": {"scores": now.scores([table["scores"] for table in tables]), "invalid": invalid}}
