"""Batches in two stages, so that a policy can choose rows before they are loaded.

A loader yields *items*, one per batch. ``offer`` returns the indices of an item's rows, a policy chooses among them,
and ``load`` turns the item and the choice into a ``Batch`` on the device. For data resident on the device an item is a
list of row indices: a policy may choose any row, of this item or not, and rows left out are never read. For a
DataLoader whose rows have numbers, rows are chosen when its workers are sent for them, and an item is what they bring.
For any other iterable an item is the batch itself, and rows are chosen after it was loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from sparse_training.errors import UserError
from sparse_training.selection.types import Batch, CandidateIndices, WeightedIndices

Choose = Callable[[CandidateIndices], WeightedIndices | None]


class Loader(ABC):
    """Iterates over the rest of an epoch's items, from where the last iteration stopped.

    Attributes:
        size: rows of the data set; None where unknown.
        labels: targets of all rows, [size, ...]; None where they are not held.
        epoch: number of the current epoch, from 0.
        position: number of this epoch's items already yielded.
        divided: True where process r of n holds the rows r, r + n, ... alone, and numbers them from 0.
    """

    size: int | None = None
    labels: Tensor | None = None
    divided = False

    def __init__(self) -> None:
        self.epoch = 0
        self.position = 0

    @abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """Iterate over the rest of the current epoch."""

    @abstractmethod
    def offer(self, item: Any) -> CandidateIndices:
        """Return the indices of an item's rows."""

    def draw_by(self, choose: Choose) -> None:
        """Choose the rows of items that are drawn from now on, in a loader that draws them ahead of training.

        Called before each item is asked for; others leave it to ``choose``.

        Args:
            choose: the policy's ``choose`` for the present phase.
        """
        return

    def choose(self, item: Any, choose: Choose) -> WeightedIndices | None:
        """Choose the rows to load of an item, or in its place; None for all of it, or where they were chosen before.

        Args:
            item: an item that iterating yields.
            choose: the policy's ``choose``.
        """
        return choose(self.offer(item))

    @abstractmethod
    def load(self, item: Any, choice: WeightedIndices | None = None) -> Batch:
        """Load the batch of an item, or of the rows chosen in its place."""

    @abstractmethod
    def probe(self) -> Iterator[Any]:
        """Yield items without end, for timing; epoch and position stay as they are."""

    @abstractmethod
    def batches(self) -> int | None:
        """Return the number of items in an epoch; None where unknown."""

    def options(self) -> dict[str, Any]:
        """Return what decides the rows of each batch, as plain values: sizes, and the kinds of samplers."""
        return options_of(self)

    def data_rows(self) -> int | None:
        """Return the number of rows of a DataLoader's data set, whatever part of it is this process's; else None."""
        return None

    def duplicate_counts(self) -> Tensor | None:
        """Count the rows with the same inputs as each, itself included: int64 [size] on the CPU; None where unknown."""
        return None

    def check_resumable(self) -> None:
        """Refuse data that a checkpoint cannot be continued with; called before a run with checkpoints."""
        return

    def state_dict(self) -> dict[str, Any]:
        """Return the position, for a checkpoint."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self.epoch, self.position = int(state["epoch"]), int(state["position"])

    def load_rank_states(self, states: Sequence[Mapping[str, Any]], batches: int | None) -> None:
        """Continue from the states of another number of processes.

        An epoch that had begun goes on after as large a part of its batches, rounded down. Its order is that of the
        present number of processes.

        Args:
            states: states of ``state_dict``, one of each process in order of their ranks.
            batches: number of items in an epoch of one of those processes; None where unknown.

        Raises:
            UserError: an epoch that had begun cannot go on.
        """
        epoch, position = int(states[0]["epoch"]), int(states[0]["position"])
        if batches is not None and position >= batches:
            epoch, position = epoch + 1, 0
        if position:
            now = self.batches()
            if batches is None or now is None:
                raise UserError(
                    "an epoch of training data without a length cannot go on with another number of processes; use a "
                    "checkpoint from the end of an epoch"
                )
            position = position * now // batches
        self.epoch, self.position = epoch, position


def options_of(data: Any) -> dict[str, Any]:
    """Return what decides the rows of a DataLoader's or a sampler's batches, as plain values."""
    sizes = {name: getattr(data, name, None) for name in ("batch_size", "drop_last", "shuffle")}
    parts = {name: getattr(data, name, None) for name in ("sampler", "batch_sampler")}
    return {
        **{name: value for name, value in sizes.items() if isinstance(value, bool | int)},
        **{name: type(part).__name__ for name, part in parts.items() if part is not None},
    }
