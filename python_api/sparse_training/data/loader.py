"""Batches in two stages, so that a policy can choose rows before they are loaded.

A loader yields *items*, one a batch. ``offer`` names an item's rows, a policy chooses among them, and
``load`` turns the item and the choice into a ``Batch`` on the device. For data resident on the device an
item is a list of row numbers: any row may be chosen, of this item or not, and the others are never
touched. For any other iterable an item is the batch itself, and choosing happens after loading.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from sparse_training.selection.types import Batch, CandidateIndices, WeightedIndices


class Loader(ABC):
    """An epoch of items from where the last one stopped; ``epoch`` and ``position`` say where."""

    size: int | None = None  # rows of the data set, where known
    labels: Tensor | None = None  # [size, ...], the targets of all of them, where held

    def __init__(self) -> None:
        self.epoch = 0
        self.position = 0  # items of this epoch already yielded

    @abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """The rest of the current epoch."""

    @abstractmethod
    def offer(self, item: Any) -> CandidateIndices:
        """The rows of an item."""

    @abstractmethod
    def load(self, item: Any, choice: WeightedIndices | None = None) -> Batch:
        """The batch of an item, or of the rows chosen in its place."""

    @abstractmethod
    def probe(self) -> Iterator[Any]:
        """Items without end for timing; epoch and position stay as they are."""

    @abstractmethod
    def batches(self) -> int | None:
        """Items in an epoch, None where unknown."""

    def duplicate_counts(self) -> Tensor | None:
        """int64 [size], on the CPU: how many rows have the same inputs as each, itself included; None where unknown."""
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
