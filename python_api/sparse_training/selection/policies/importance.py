"""Importance sampling: from the whole data set by past losses, or within a batch by a scorer's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sparse_training.samplers.importance import Importance, check_uniform, inclusion_probability
from sparse_training.samplers.resharding import NewRank
from sparse_training.samplers.score_table import ScoreTable
from sparse_training.selection.policies.drawing import DrawingPolicy
from sparse_training.selection.policies.history import HistoryPolicy
from sparse_training.selection.types import CandidateIndices, WeightedIndices


class ImportancePolicy(HistoryPolicy):
    """Draws round(rate * B) rows from the whole data set by their last losses, weighted 1/p.

    Rows never trained on come first; see ``Importance``.

    Args:
        rate: rows drawn by rows offered, in (0, 1]. Default 0.1.
        seed: seed of the draws. Default 0.
        uniform: share of draws that ignore the losses, in (0, 1]. Default 0.1.
    """

    name = "importance"

    def __init__(self, rate: float = 0.1, seed: int = 0, uniform: float = 0.1) -> None:
        super().__init__(rate, seed)
        self.uniform = check_uniform(uniform)
        self.sampler: Importance | None = None

    @property
    def target(self) -> float:
        """Fraction of rows to keep."""
        return self.rate

    def make_sampler(self, table: ScoreTable) -> None:
        """Make the sampler of a table."""
        self.sampler = Importance(table, seed=self.seed, uniform=self.uniform)

    def choose(self, candidates: CandidateIndices) -> WeightedIndices:
        """Draw rows of the whole data set in place of the candidates."""
        self.flush()
        assert self.sampler is not None
        return WeightedIndices(*self.sampler.draw(max(1, round(self.rate * len(candidates.ids)))))

    def get_extra_state(self) -> dict[str, Any]:
        """The table's state and the sampler's."""
        state = super().get_extra_state()
        return {**state, "law": self.sampler.state_dict()} if self.sampler is not None else state

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of ``get_extra_state``."""
        super().set_extra_state(state)
        if self.sampler is not None and state:
            self.sampler.load_state_dict(state["law"])

    def reshard(self, states: Sequence[Mapping[str, Any]], now: NewRank) -> dict[str, Any]:
        """Make this process's extra state from those of other processes; rows without a score still come first."""
        state = super().reshard(states, now)
        return {**state, "law": {"step": max(each["law"]["step"] for each in states), "first": 0}} if state else {}


class BatchImportancePolicy(DrawingPolicy):
    """Draws round(rate * B) rows of a batch, give or take one, in proportion to the scorer's losses.

    It is ``importance`` where a scorer that scores batches is named. No row is drawn twice.

    Args:
        rate: fraction of the rows to keep, in (0, 1]. Default 0.1.
        seed: seed of the draws. Default 0.
        uniform: share of draws that ignore the losses, in (0, 1]. Default 0.1.

    Raises:
        UserError: an argument is out of range.
    """

    name = "importance"

    def __init__(self, rate: float = 0.1, seed: int = 0, uniform: float = 0.1) -> None:
        super().__init__(rate, seed)
        self.uniform = check_uniform(uniform)

    @property
    def target(self) -> float:
        """Fraction of rows to keep."""
        return self.rate

    def probability(self, losses: Tensor) -> Tensor:
        """Probability of keeping each row; see ``inclusion_probability``."""
        return inclusion_probability(losses, self.rate, self.uniform)

    def likely_rows(self, rows: int) -> range:
        """Numbers of rows that may be kept of a batch of ``rows``."""
        count = max(1, round(self.rate * rows))
        return range(rows, rows + 1) if self.before_loading else range(max(1, count - 1), min(rows, count + 1) + 1)
