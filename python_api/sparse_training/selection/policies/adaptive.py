"""The default policy: rows drawn by weights that correct label errors, duplicates and class imbalance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sparse_training.samplers.adaptive_weights import BALANCE_FROM, NOISE, SamplingWeights
from sparse_training.selection.policies.history import PastPolicy
from sparse_training.selection.types import CandidateIndices, WeightedIndices


class AdaptivePolicy(PastPolicy):
    """Draws as many rows as are offered, from the whole data set, by their ``SamplingWeights``.

    Rows with suspected label errors are sampled rarely, duplicates of one input together as often as any other row,
    and towards the end of the run every class as often as the others. On data with none of these, passes are ordinary
    epochs. It costs no forward pass. The trainer's dense phases do not apply. Rows without numbers, of a stream, are
    trained on as they come. Processes that train together, each on the whole data set, need seeds of their own.

    Args:
        rate: not used. Default 1.
        seed: seed of the draws. Default 0.
        balance: draw classes equally often towards the end. Default True; False where the classes' shares in the data
            are those that count.

    Attributes:
        sampler: the weights; None until ``prepare`` is called.
    """

    name = "adaptive"
    phased = False

    def __init__(self, rate: float = 1.0, seed: int = 0, balance: bool = True) -> None:
        super().__init__(rate, seed)
        self.balance = balance
        self.sampler: SamplingWeights | None = None
        self.progress = 0.0
        self._state: Mapping[str, Any] | None = None  # to continue from, once there is a sampler
        self._stream = False

    def prepare(
        self,
        rows: int | None,
        targets: Tensor | None = None,
        duplicate_counts: Callable[[], Tensor | None] | None = None,
    ) -> None:
        """Allocate what depends on the number of rows; nothing for rows without numbers.

        Args:
            rows: number of rows of the data set; None where they have no numbers.
            targets: targets of all rows, [rows, ...]; None where the loader does not hold them.
            duplicate_counts: returns how many rows have the same inputs as each, int64 [rows], or None.

        Raises:
            UserError: there are more or fewer rows than in a state just loaded.
        """
        self._stream = rows is None
        if rows is not None:
            super().prepare(rows, targets, duplicate_counts)

    def start(self, rows: int, targets: Tensor | None, duplicate_counts: Callable[[], Tensor | None] | None) -> None:
        """Allocate the weights."""
        counts = None if duplicate_counts is None else duplicate_counts()
        self.sampler = SamplingWeights(
            rows, targets, counts, seed=self.seed, balance_from=BALANCE_FROM if self.balance else None
        )
        self.progress = 0.0
        if self._state is not None:
            self.sampler.load_state_dict(self._state)
            self._state = None

    def set_progress(self, progress: float) -> None:
        """Set the fraction of the run that is done, 0 to 1."""
        self.progress = progress

    def choose(self, candidates: CandidateIndices) -> WeightedIndices | None:
        """Draw rows of the whole data set in place of the candidates."""
        if self.sampler is None:
            return None
        self.flush()
        return WeightedIndices(self.sampler.draw(len(candidates.ids), self.progress))

    def record(self, ids: Tensor, losses: Tensor, logits: Any) -> None:
        """Enter observed outputs into the weights."""
        if self.sampler is not None:
            self.sampler.update(ids, losses, logits)

    def warnings(self, rate: float | None) -> list[str]:
        """Warn of what the weights assumed and of what they could not know."""
        if self._stream:
            return [
                "rows without numbers: every one was trained on as it came; use data held in memory, or for a "
                'DataLoader HistorySampler(method="adaptive")'
            ]
        self.flush()
        found = []
        if self.sampler is not None and (new := int(self.sampler.probability.isnan().count_nonzero())):
            found.append(
                f"{new} of {self.sampler.rows} rows were never trained on: the run was too short for past outputs to "
                "matter"
            )
        if self.sampler is not None and self.sampler.noise >= NOISE:
            found.append(
                f"{self.sampler.noise:.0%} of the labels seem wrong: rows with suspected label errors were sampled "
                "rarely"
            )
        if self.sampler is not None and self.sampler.invalid:
            found.append(f"{self.sampler.invalid} losses were not finite and left out of account")
        return found

    def get_extra_state(self) -> dict[str, Any]:
        """State of the weights; empty until ``prepare`` is called."""
        self.flush()
        return {} if self.sampler is None else self.sampler.state_dict()

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of ``get_extra_state``, before ``prepare`` or after it."""
        self._observed, self._state = None, state or None
        if self.sampler is not None and state:
            self.sampler.load_state_dict(state)
            self._state, self._loaded = None, True
