"""InfoBatch: pruning of well-learned rows, by past losses or, within a batch, by a scorer's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparse_training.samplers.infobatch import InfoBatch, check_prune, no_rows, prune_probability, whole_batch
from sparse_training.samplers.score_table import ScoreTable
from sparse_training.selection.policies.drawing import DrawingPolicy
from sparse_training.selection.policies.history import HistoryPolicy
from sparse_training.selection.types import CandidateIndices, WeightedIndices


class InfoBatchPolicy(HistoryPolicy):
    """Keeps every row but some of the well-learned ones; see ``InfoBatch``.

    As published, steps are as large as without it and fewer: the rows kept wait until they fill a batch, and in the
    meantime a step does nothing. The rate follows from the losses. The trainer's dense end, an eighth of the run by
    default, is the published delta = 0.875.

    Args:
        rate: not used. Default 1.
        seed: seed of the draws. Default 0.
        prune: probability of leaving out a well-learned row, in [0, 1). Default 0.5.
    """

    name = "infobatch"

    def __init__(self, rate: float = 1.0, seed: int = 0, prune: float = 0.5) -> None:
        super().__init__(rate, seed)
        self.prune = prune
        self.sampler: InfoBatch | None = None
        self.waiting = no_rows()

    def make_sampler(self, table: ScoreTable) -> None:
        """Make the sampler of a table."""
        self.sampler = InfoBatch(table, seed=self.seed, prune=self.prune)
        self.waiting = no_rows()

    def choose(self, candidates: CandidateIndices) -> WeightedIndices:
        """A whole batch of the rows kept so far, or no row while there are too few."""
        self.flush()
        assert self.sampler is not None
        kept = self.sampler.prune(candidates.ids, candidates.epoch)
        batch, self.waiting = whole_batch(self.waiting, kept, len(candidates.ids))
        return batch

    def get_extra_state(self) -> dict[str, Any]:
        """The table's state, the sampler's, and the rows waiting."""
        state = {**super().get_extra_state(), "waiting": tuple(self.waiting)}
        return {**state, "law": self.sampler.state_dict()} if self.sampler is not None else {}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of ``get_extra_state``."""
        super().set_extra_state(state)
        if self.sampler is not None and state:
            self.sampler.load_state_dict(state["law"])
            self.waiting = WeightedIndices(*(part.cpu() for part in state["waiting"]))


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
