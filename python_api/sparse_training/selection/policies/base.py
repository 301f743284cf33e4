"""The interface of policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sparse_kernels.trees import rows_at
from sparse_training.arguments import check_fraction
from sparse_training.selection.scorers.base import Scorer
from sparse_training.selection.scorers.model import SelfScorer
from sparse_training.selection.types import Batch, CandidateIndices, Scores, SelectedBatch, WeightedIndices


class Policy(nn.Module):
    """Trains on every row (``dense``), and is the base of the other policies.

    To add a policy, subclass it and override ``decide``, for one that ranks or draws by scores, or ``choose``, for one
    that needs none. State belongs in buffers or in the extra state.

    Args:
        rate: fraction of the rows to keep, in (0, 1]. Default 1.
        seed: seed of the policy's draws. Default 0.

    Attributes:
        name: name under which costs and results are filed; by default the class's, in lower case.
        uses_scores: True if the policy asks its scorer; otherwise ``decide`` is never called.
        scorer: the scorer it asks; the model itself by default.
        masks: True if rows left out are masked out of the loss, and cost as much as the others.
        watched: True if ``trace`` is called after the step under way, which may then compute more than a step needs.
        idle_together: True if a batch of which it chose no row before loading has none on any process.
        phased: True if a run's dense start and end train on every row; False if the policy selects in them too.

    Raises:
        UserError: the rate is out of range.

    Example:
        >>> class HardHalf(Policy):
        ...     uses_scores = True
        ...
        ...     def decide(self, scores):
        ...         return WeightedIndices(scores.losses.topk(len(scores.losses) // 2).indices)
        >>> trainer = SparseTrainer(model, policy=HardHalf())
    """

    name: str = "dense"
    uses_scores = False
    masks = False
    watched = False
    idle_together = False
    phased = True

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
        """True if rows left out are never loaded."""
        return self.uses_scores and self.scorer.before_loading

    def selects(self, *, numbered: bool) -> bool:
        """Tell whether the policy takes rows out of batches that are loaded already.

        Args:
            numbered: True if rows have numbers, by which they are chosen before they are loaded.
        """
        if self.masks:
            return False
        return not numbered if self.before_loading else self.uses_scores

    @property
    def needs_numbers(self) -> bool:
        """True if the policy knows rows by their numbers, from one epoch to the next."""
        return self.uses_scores and self.scorer.before_loading

    @property
    def target(self) -> float | None:
        """Fraction of rows that the policy aims to keep; None where it has no such aim."""
        return None

    def prepare(
        self,
        rows: int | None,
        targets: Tensor | None = None,
        duplicate_counts: Callable[[], Tensor | None] | None = None,
    ) -> None:
        """Called before each run, to allocate what depends on the data set.

        Args:
            rows: number of rows of the data set; None where they have no numbers.
            targets: targets of all rows, [rows, ...]; None where the loader does not hold them.
            duplicate_counts: returns how many rows have the same inputs as each, int64 [rows], or None; see
                ``Loader.duplicate_counts``.
        """
        self.scorer.prepare(rows)

    def decide(self, scores: Scores) -> WeightedIndices:
        """Select the rows to train on by their scores.

        Args:
            scores: the scorer's output for the rows.

        Returns:
            Positions of the selected rows, with their importance weights.
        """
        raise NotImplementedError

    def choose(self, candidates: CandidateIndices) -> WeightedIndices | None:
        """Choose the rows to load before any of them is loaded.

        Args:
            candidates: the rows that the loader offers.

        Returns:
            Row numbers to load in place of the candidates, with their importance weights; None for the candidates
            themselves.
        """
        if not self.before_loading:
            return None
        index, weight = self.decide(self.scorer.recall(candidates.ids))
        if weight is not None:  # the loss is divided by the rows loaded, and estimates the mean of the candidates
            weight = weight * (len(index) / len(candidates.ids))
        return WeightedIndices(candidates.ids[index], weight)

    def score(self, batch: Batch) -> Scores | None:
        """Score a loaded batch; None if ``select`` needs no scores of it."""
        if not self.uses_scores or self.before_loading:
            return None
        scores: Scores = self.scorer(batch)
        return scores

    def select(self, scores: Scores | None, batch: Batch) -> SelectedBatch:
        """Select the rows of a loaded batch to train on.

        Args:
            scores: what ``score`` returned for the batch.
            batch: the batch.

        Returns:
            The selected rows, packed.
        """
        if scores is None:
            rows = batch.rows if batch.counted is None else batch.counted
            return SelectedBatch(batch.inputs, batch.targets, rows, None, batch.weight, batch.divisor)
        index, weight = self.decide(scores)
        parts = (batch.inputs, batch.targets)
        inputs, targets = rows_at(parts, index, batch.rows)
        return SelectedBatch(inputs, targets, len(index), index, weight, batch.divisor)

    def observe(self, ids: Tensor, losses: Tensor, logits: Any) -> None:
        """Called with the model's outputs for the rows just trained on, from before it learned from them.

        It is called in the dense phases too, where rows have numbers.

        Args:
            ids: row numbers in the data set, int64 [n].
            losses: losses of the rows, [n].
            logits: the model's output for the rows, [n, classes] for a classifier.
        """
        self.scorer.observe(ids, losses)

    def observe_validation(self, loss: float) -> None:
        """Called with the loss of each evaluation that has one, for schedules that follow it.

        Args:
            loss: mean loss of the evaluation data.
        """

    def set_progress(self, progress: float) -> None:
        """Called before each sparse step, for policies that follow a schedule.

        Args:
            progress: fraction of the run that is done, 0 to 1.
        """

    def set_target_rate(self, rate: float) -> None:
        """Set the rate from the next step on.

        Args:
            rate: fraction of the rows to keep, in (0, 1].

        Raises:
            UserError: the rate is out of range.
        """
        self.rate = check_rate(rate)

    def likely_rows(self, rows: int) -> range:
        """Numbers of rows that are likely to be kept of a loaded batch, for the calibration to time.

        Args:
            rows: number of rows of the loaded batch.
        """
        all_of_them = self.target is None or self.before_loading or self.masks
        count = rows if all_of_them else max(1, round((self.target or 1.0) * rows))
        return range(count, count + 1)

    def trace(self) -> tuple[Tensor, ...] | None:
        """Rate, threshold and, for the last step that was ``watched``, grad-norm fraction, on the device.

        The grad-norm fraction is the share of the sum of the batch's gradient norms that the kept rows hold. None
        where there is no controller.
        """
        return None

    def take_news(self) -> list[str]:
        """Return what the policy has begun to do to the training since the last call, in sentences; each is said once.

        The trainer asks after every step and prints the sentences.
        """
        return []

    def warnings(self, rate: float | None) -> list[str]:
        """Warnings for a reader of the run's results.

        Args:
            rate: the rate that the run reached; None where it is unknown.
        """
        return []


def check_rate(rate: float) -> float:
    """Return the rate, if it is in (0, 1].

    Raises:
        UserError: it is not.
    """
    return check_fraction("rate", rate)
