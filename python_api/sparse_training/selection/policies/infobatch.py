"""InfoBatch: pruning of well-learned rows, by past losses or, within a batch, by a scorer's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from sparse_training.ranks import rank_and_world_size
from sparse_training.samplers.infobatch import (
    InfoBatch,
    check_prune,
    common_batch,
    no_rows,
    prune_probability,
    whole_batch,
)
from sparse_training.samplers.resharding import NewRank
from sparse_training.samplers.score_table import ScoreTable
from sparse_training.selection.policies.drawing import DrawingPolicy
from sparse_training.selection.policies.history import HistoryPolicy
from sparse_training.selection.types import CandidateIndices, WeightedIndices


class InfoBatchPolicy(HistoryPolicy):
    """Keeps every row but some of the well-learned ones; see ``InfoBatch``.

    A row whose last loss is below the mean loss is left out of a pass with probability ``prune``, or weighs
    1 / (1 - prune). So the expected gradient of a pass is that of all rows, whatever the loss, the classes or the
    labels. As published, steps are as large as without it and fewer: the rows kept wait until they fill a batch, and in
    the meantime a step does nothing. The rate follows from the losses. The trainer's dense end, an eighth of the run by
    default, is the published delta = 0.875. Where a batch sampler of the user's arranged the batches, each of them is
    pruned by itself, and steps are smaller in place of fewer.

    Processes that train together take their steps together: once all of them have rows enough for a step, each trains
    on those that it has. A process knows the losses of the rows that it trained on itself.

    Args:
        rate: not used. Default 1.
        seed: seed of the draws. Default 0.
        prune: probability of leaving out a well-learned row, in [0, 1). Default 0.5.

    Attributes:
        every_row: reason for which every row of the run is trained on, because rows have no numbers; None (the
            default) to refuse such data.

    Raises:
        UserError: ``prune`` is out of range.
    """

    name = "infobatch"
    every_row: str | None = None

    def __init__(self, rate: float = 1.0, seed: int = 0, prune: float = 0.5) -> None:
        super().__init__(rate, seed)
        self.prune = check_prune(prune)
        self.sampler: InfoBatch | None = None
        self.waiting = no_rows()
        self.batch_size = 0  # the largest number of rows offered

    def make_sampler(self, table: ScoreTable) -> None:
        """Make the sampler of a table."""
        self.sampler = InfoBatch(table, seed=self.seed, prune=self.prune)
        self.waiting = no_rows()

    def prepare(
        self,
        rows: int | None,
        targets: Tensor | None = None,
        duplicate_counts: Callable[[], Tensor | None] | None = None,
    ) -> None:
        """Allocate the table, or nothing where every row is trained on.

        Args:
            rows: number of rows of the data set; None where they have no numbers.
            targets: not used.
            duplicate_counts: not used.

        Raises:
            UserError: rows have no numbers, or there are more or fewer than in the state.
        """
        if self.every_row is None:
            super().prepare(rows, targets, duplicate_counts)

    def selects(self, *, numbered: bool) -> bool:
        """Tell whether rows are taken out of loaded batches: not where every row is trained on."""
        return self.every_row is None and super().selects(numbered=numbered)

    def choose(self, candidates: CandidateIndices) -> WeightedIndices | None:
        """A whole batch of the rows kept so far, or no row while there are too few."""
        if self.every_row is not None:
            self.idle_together = False
            return None
        self.flush()
        assert self.sampler is not None
        self.idle_together = not candidates.together
        kept, offered = self.sampler.prune(candidates.ids, candidates.epoch, candidates.places), len(candidates.ids)
        if candidates.together:  # the loss is divided by the rows loaded, and estimates the mean of the candidates
            return WeightedIndices(kept.index, kept.weights() * (len(kept.index) / max(offered, 1)))
        if rank_and_world_size()[1] == 1:
            batch, self.waiting = whole_batch(self.waiting, kept, offered)
            return batch
        self.batch_size = max(self.batch_size, offered)
        batch, self.waiting = common_batch(self.waiting, kept, self.batch_size)
        return batch

    def take_news(self) -> list[str]:
        """Return what has begun since the last call, in sentences."""
        return [] if self.sampler is None else self.sampler.take_news()

    def unseen_reason(self) -> str:
        """Reason for which some rows were never trained on: rows without a loss are kept, once they are offered."""
        table, sampler = self.require_table(), self.sampler
        unseen = table.scores.isnan()
        unseen[self.waiting.index] = False
        if sampler is None or sampler.epoch < 1 or not unseen.any():
            return super().unseen_reason()
        return "the sampler of the data did not give them"

    def warnings(self, rate: float | None) -> list[str]:
        """Warn of rows never trained on, of losses that were not finite, and of a run on every row."""
        return super().warnings(rate) if self.every_row is None else [self.every_row]

    def get_extra_state(self) -> dict[str, Any]:
        """The table's state, the sampler's, and the rows waiting."""
        state = {**super().get_extra_state(), "waiting": tuple(self.waiting), "batch size": self.batch_size}
        return {**state, "law": self.sampler.state_dict()} if self.sampler is not None else {}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of ``get_extra_state``."""
        super().set_extra_state(state)
        if self.sampler is not None and state:
            self.sampler.load_state_dict(state["law"])
            self.batch_size = int(state.get("batch size", 0))  # absent from version 0.1.0
            self.waiting = WeightedIndices(*(part.cpu() for part in state["waiting"]))

    def reshard(self, states: Sequence[Mapping[str, Any]], now: NewRank) -> dict[str, Any]:
        """Make this process's extra state from those of other processes; the mean loss is taken of its own rows."""
        state = super().reshard(states, now)
        if not state:
            return {}
        waiting = [WeightedIndices(*(part.cpu() for part in each["waiting"])) for each in states]
        return {**state, "waiting": tuple(now.waiting(waiting)), "law": {"epoch": -1, "threshold": 0.0}}


class BatchInfoBatchPolicy(DrawingPolicy):
    """Prunes the well-learned rows of a batch at random, by the scorer's losses.

    It is ``infobatch`` where a scorer that scores batches is named. Rows whose loss is below the batch's mean are left
    out with probability ``prune`` or weighted 1 / (1 - prune). The rate follows from the losses.

    Args:
        rate: not used. Default 1.
        seed: seed of the draws. Default 0.
        prune: probability of leaving out a well-learned row, in [0, 1). Default 0.5.

    Raises:
        UserError: an argument is out of range.
    """

    name = "infobatch"

    def __init__(self, rate: float = 1.0, seed: int = 0, prune: float = 0.5) -> None:
        super().__init__(rate, seed)
        self.prune = check_prune(prune)

    def probability(self, losses: Tensor) -> Tensor:
        """Probability of keeping each row."""
        return (1.0 - prune_probability(losses, losses.mean(), self.prune)).float()

    def likely_rows(self, rows: int) -> range:
        """Numbers of rows that may be kept of a batch of ``rows``."""
        return range(min(rows, max(1, rows // 2)), rows + 1)
