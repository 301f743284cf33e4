"""Rows drawn by weights that correct label errors, duplicates and class imbalance, each where it is switched on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from sparse_training.errors import UserError
from sparse_training.samplers.adaptive_weights import (
    BALANCE_FROM,
    NOISE,
    SWITCHES,
    SamplingWeights,
    check_switches,
)
from sparse_training.samplers.resharding import NewRank
from sparse_training.selection.policies.history import PastPolicy
from sparse_training.selection.types import CandidateIndices, WeightedIndices


class AdaptivePolicy(PastPolicy):
    """Draws as many rows as are offered, from the whole data set, by their ``SamplingWeights``.

    Each switch changes what is trained on and rests on an assumption about the data; none of them is on by default, and
    at least one must be. Without any, passes would be ordinary epochs. Draws have no importance weights, so the
    objective is no longer the mean over the rows as given. The policy costs no forward pass, and every switch says when
    it begins to act. The trainer's dense phases do not apply. Processes that train together, each on the whole data
    set, need seeds of their own.

    Args:
        rate: not used. Default 1.
        seed: seed of the draws. Default 0.
        denoise: draw rows rarely whose label seems wrong, at least once in ten passes. It assumes that wrong labels
            were replaced at random, evenly over all other classes, and that classes hardly overlap. Where classes do
            overlap, a right label looks like a wrong one: hard rows near the border are then drawn too rarely, and up
            to a seventh of the labels is reported as wrong. It acts from an estimated 5% of wrong labels on, with at
            least three classes. Default False.
        deduplicate: let the rows with the same inputs share the draws of one. It assumes that copies are an accident
            of collection; where they say how frequent an input is, they should count. Copies are found byte by byte.
            Default False.
        balance: draw every class equally often in the last two fifths of the run, a row at most ten times a pass. It
            assumes that all classes matter alike; where the test data have the classes' shares of the training data,
            it costs accuracy. Default False.

    Attributes:
        sampler: the weights; None until ``prepare`` is called.

    Raises:
        UserError: no switch is on.
    """

    name = "adaptive"
    phased = False

    def __init__(
        self,
        rate: float = 1.0,
        seed: int = 0,
        *,
        denoise: bool = False,
        deduplicate: bool = False,
        balance: bool = False,
    ) -> None:
        super().__init__(rate, seed)
        self.denoise, self.deduplicate, self.balance = denoise, deduplicate, balance
        chosen = [switch for switch in SWITCHES if getattr(self, switch)]
        check_switches(chosen)
        self.name = "+".join(("adaptive", *chosen))
        self.sampler: SamplingWeights | None = None
        self.progress = 0.0
        self._state: Mapping[str, Any] | None = None  # to continue from, once there is a sampler

    @classmethod
    def from_name(cls, name: str, rate: float = 1.0, seed: int = 0) -> AdaptivePolicy:
        """Make the policy from a name such as "adaptive+denoise+balance".

        Raises:
            UserError: the name has no switch, an unknown one, or one twice.
        """
        chosen = name.split("+")[1:]
        check_switches(chosen)
        return cls(rate, seed, **dict.fromkeys(chosen, True))

    def start(self, rows: int, targets: Tensor | None, duplicate_counts: Callable[[], Tensor | None] | None) -> None:
        """Allocate the weights.

        Raises:
            UserError: a switch needs what the data do not have.
        """
        counts = duplicate_counts() if self.deduplicate and duplicate_counts is not None else None
        if self.deduplicate and counts is None:
            raise UserError(
                "`deduplicate` needs to know the copies of each row, which this data does not say; use data held in "
                "memory (ResidentLoader), or for a DataLoader HistorySampler with duplicate_counts="
            )
        self.sampler = SamplingWeights(
            rows, targets, counts,
            denoise=self.denoise, balance_from=BALANCE_FROM if self.balance else None, seed=self.seed,
        )  # fmt: skip
        self.progress = 0.0
        if self._state is not None:
            self.sampler.load_state_dict(self._state)
            self._state = None

    def set_progress(self, progress: float) -> None:
        """Set the fraction of the run that is done, 0 to 1."""
        self.progress = progress

    def choose(self, candidates: CandidateIndices) -> WeightedIndices:
        """Draw rows of the whole data set in place of the candidates."""
        self.flush()
        return WeightedIndices(self._prepared().draw(len(candidates.ids), self.progress))

    def _prepared(self) -> SamplingWeights:
        assert self.sampler is not None, "prepare was not called"
        return self.sampler

    def record(self, ids: Tensor, losses: Tensor, logits: Any) -> None:
        """Enter observed outputs into the weights."""
        self._prepared().update(ids, losses, logits)

    def take_news(self) -> list[str]:
        """Return what has begun since the last call, in sentences."""
        return [] if self.sampler is None else self.sampler.take_news()

    def warnings(self, rate: float | None) -> list[str]:
        """Warn of what the weights assumed and of what they could not know."""
        self.flush()
        sampler, found = self._prepared(), []
        if new := int(sampler.probability.isnan().count_nonzero()):
            found.append(
                f"{new} of {sampler.rows} rows were never trained on: the run was too short for past outputs to matter"
            )
        if sampler.noise >= NOISE:
            found.append(
                f"{sampler.noise:.0%} of the labels seem wrong: rows with suspected label errors were sampled rarely"
            )
        if sampler.invalid:
            found.append(f"{sampler.invalid} losses were not finite and left out of account")
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

    def reshard(self, states: Sequence[Mapping[str, Any]], now: NewRank) -> dict[str, Any]:
        """Refuse: weights over all rows cannot be told from those of one process's rows.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"the weights of {self.name} are of {len(states)} processes and cannot be dealt out to {now.ranks}; resume "
            f"with {len(states)}"
        )
