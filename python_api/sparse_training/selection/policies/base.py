"""The interface of policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparse_training.errors import UserError
from sparse_training.selection.scorers.base import Scorer
from sparse_training.selection.scorers.model import SelfScorer
from sparse_training.selection.types import Batch, CandidateIndices, Scores, SelectedBatch, WeightedIndices


class Policy(nn.Module):
    """Every row; the base of the others. State belongs in buffers or in the extra state.

    Attributes:
        uses_scores: True where it asks its scorer; otherwise ``decide`` is never called.
        scorer: the scorer it asks, the model itself by default.
    """

    name: str = "dense"
    uses_scores = False
    masks = False  # whether the rows left out are masked out of the loss, and cost as much as the others
    watched = False  # whether ``trace`` is asked for after the step under way: it may find out more than a step needs
    phased = True  # whether a run's warm-up and anneal train on every row; if not, it chooses in them too

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in vars(cls):  # results and costs are filed under it: no two may share one
            cls.name = cls.__name__.lower()

    def __init__(self, rate: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        self.rate = check_rate(rate)
        self.seed = seed
        self.scorer: Scorer = SelfScorer()

    @property
    def before_loading(self) -> bool:
        """Whether what it leaves out is never loaded."""
        return self.uses_scores and self.scorer.before_loading

    @property
    def target(self) -> float | None:
        """The fraction of rows that it aims to keep; None where it aims at none."""
        return None

    def prepare(
        self,
        rows: int | None,
        targets: Tensor | None = None,
        duplicate_counts: Callable[[], Tensor | None] | None = None,
    ) -> None:
        """Told before a run what it is about.

        Args:
            rows: of the data set; None where none can be had by its number.
            targets: [rows, ...], of all of them, where the loader holds them.
            duplicate_counts: asks the loader for int64 [rows], how many rows have the same inputs; see
                ``Loader.duplicate_counts``.
        """
        self.scorer.prepare(rows)

    def decide(self, scores: Scores) -> WeightedIndices:
        """The rows to train on, by what the scorer says of them."""
        raise NotImplementedError

    def choose(self, offer: CandidateIndices) -> WeightedIndices | None:
        """The rows to load in place of those offered; None for just these."""
        if not self.before_loading:
            return None
        index, weight = self.decide(self.scorer.recall(offer.ids))
        if weight is not None:  # the loss is divided by the rows loaded, and estimates the mean of those offered
            weight = weight * (len(index) / len(offer.ids))
        return WeightedIndices(offer.ids[index], weight)

    def score(self, batch: Batch) -> Scores | None:
        """What ``select`` needs to know of the batch, None for nothing."""
        if not self.uses_scores or self.before_loading:
            return None
        found: Scores = self.scorer(batch)
        return found

    def select(self, scores: Scores | None, batch: Batch) -> SelectedBatch:
        """The rows of a loaded batch to train on."""
        if scores is None:
            rows = batch.rows if batch.counted is None else batch.counted
            return SelectedBatch(batch.inputs, batch.targets, rows, None, batch.weight, batch.divisor)
        index, weight = self.decide(scores)
        parts = (batch.inputs, batch.targets)
        inputs, targets = pytree.tree_map_only(Tensor, lambda tensor: tensor.index_select(0, index), parts)
        return SelectedBatch(inputs, targets, len(index), index, weight, batch.divisor)

    def observe(self, ids: Tensor, losses: Tensor, logits: Any) -> None:
        """What the model made of the rows just trained on, before it learned from them; where rows have numbers.

        Args:
            ids: int64 [n]; of the dense phases too.
            losses: [n].
            logits: what the model gave, [n, classes] for a classifier.
        """
        self.scorer.observe(ids, losses)

    def set_progress(self, progress: float) -> None:
        """Told before each gated step how far the run is, 0 to 1, for what follows a schedule."""

    def set_target_rate(self, rate: float) -> None:
        """Another rate from the next step on."""
        self.rate = check_rate(rate)

    def likely_rows(self, rows: int) -> range:
        """How many of a loaded batch's rows this policy may well train on, for the clock to time."""
        all_of_them = self.target is None or self.before_loading or self.masks
        count = rows if all_of_them else max(1, round((self.target or 1.0) * rows))
        return range(count, count + 1)

    def trace(self) -> tuple[Tensor, ...] | None:
        """Rate and threshold, on the device, where there is a controller to watch; and, where it is known, the mass of
        the last step that was ``watched``: the share of the sum of its rows' gradient norms that the rows kept have."""
        return None

    def warnings(self, rate: float | None) -> list[str]:
        """What a reader of the run must know, given the rate it reached."""
        return []


def check_rate(rate: float) -> float:
    """The rate, if it is in (0, 1]; otherwise a UserError."""
    if not 0.0 < rate <= 1.0:
        raise UserError(f"rate {rate}: wanted more than 0 and at most 1")
    return rate
