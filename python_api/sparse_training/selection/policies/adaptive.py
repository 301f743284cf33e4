"""The default: every row as often as it is worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sparse_training.samplers.adaptive_weights import BALANCE_FROM, NOISE, SamplingWeights
from sparse_training.selection.policies.past import PastPolicy
from sparse_training.selection.types import CandidateIndices, WeightedIndices


class AdaptivePolicy(PastPolicy):
    """As many rows as are offered, of the whole data set, each as often as it is worth; see ``worth.SamplingWeights``.

    Rows whose labels seem wrong come seldom, copies of one input as often together as any other, and towards the end
    every class as often as the others (``balance``; off where the classes' shares in the data are those that count).
    On data that gives no reason for any of it this is an epoch as any other. It costs no forward pass. ``rate`` is not
    used, and neither are the trainer's dense phases. Rows without numbers, of a stream, are trained on as they come.
    Processes that train together, each on the whole data set, want seeds of their own.
    """

    name = "adaptive"
    phased = False

    def __init__(self, rate: float = 1.0, seed: int = 0, balance: bool = True) -> None:
        super().__init__(rate, seed)
        self.balance = balance
        self.law: SamplingWeights | None = None
        self.progress = 0.0
        self._state: Mapping[str, Any] | None = None  # to go on from, once there is a law
        self._stream = False

    def prepare(
        self,
        rows: int | None,
        targets: Tensor | None = None,
        duplicate_counts: Callable[[], Tensor | None] | None = None,
    ) -> None:
        self._stream = rows is None
        if rows is not None:
            super().prepare(rows, targets, duplicate_counts)

    def start(self, rows: int, targets: Tensor | None, duplicate_counts: Callable[[], Tensor | None] | None) -> None:
        found = None if duplicate_counts is None else duplicate_counts()
        self.law = SamplingWeights(
            rows, targets, found, seed=self.seed, balance_from=BALANCE_FROM if self.balance else None
        )
        self.progress = 0.0
        if self._state is not None:
            self.law.load_state_dict(self._state)
            self._state = None

    def set_progress(self, progress: float) -> None:
        self.progress = progress

    def choose(self, offer: CandidateIndices) -> WeightedIndices | None:
        if self.law is None:
            return None
        self.up_to_date()
        return WeightedIndices(self.law.draw(len(offer.ids), self.progress))

    def enter(self, ids: Tensor, losses: Tensor, logits: Any) -> None:
        if self.law is not None:
            self.law.update(ids, losses, logits)

    def warnings(self, rate: float | None) -> list[str]:
        if self._stream:
            return [
                "rows without numbers: every one was trained on as it came; wanted data held in memory, or for a "
                'DataLoader HistorySampler(law="adaptive")'
            ]
        self.up_to_date()
        found = []
        if self.law is not None and (new := int(self.law.probability.isnan().count_nonzero())):
            found.append(f"{new} of {self.law.rows} rows were never trained on: the run was too short for their past")
        if self.law is not None and self.law.noise >= NOISE:
            found.append(
                f"{self.law.noise:.0%} of the labels seem wrong: rows whose label the model denies came seldom"
            )
        if self.law is not None and self.law.invalid:
            found.append(f"{self.law.invalid} losses were not finite and left out of account")
        return found

    def get_extra_state(self) -> dict[str, Any]:
        self.up_to_date()
        return {} if self.law is None else self.law.state_dict()

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        self._observed, self._state = None, state or None
        if self.law is not None and state:
            self.law.load_state_dict(state)
            self._state, self._loaded = None, True
