"""A data set whose items come with their row numbers."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from sparse_training.errors import UserError


class Indexed(Dataset[tuple[int, Any]]):
    """A data set whose items come with their row numbers, (index, item), as ``HistorySampler`` needs them.

    Args:
        dataset: map-style data set.

    Raises:
        UserError: the data set is iterable, or has no length.

    Example:
        >>> loader = DataLoader(Indexed(dataset), batch_sampler=HistorySampler(dataset, batch_size=128))
        >>> for index, (inputs, targets) in loader: ...
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset
        self.rows = rows_of(dataset)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> tuple[int, Any]:
        _check_numbers([index])
        return index, self.dataset[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[int, Any]]:
        """Fetch a batch in one call where the data set can, as DataLoader asks for it."""
        _check_numbers(indices[:1])
        fetch = getattr(self.dataset, "__getitems__", None)
        items = fetch(indices) if callable(fetch) else [self.dataset[index] for index in indices]
        return list(zip(indices, items, strict=True))


def _check_numbers(indices: list[Any]) -> None:
    """Refuse batches of numbers in place of numbers, as of a batch sampler that is given as ``sampler``."""
    if any(isinstance(index, list | tuple) for index in indices):
        raise UserError("a row has one number, got a list of them; give the sampler to the loader as `batch_sampler`")


def rows_of(dataset: Any) -> int:
    """Number of rows of a map-style data set.

    Raises:
        UserError: the data set is iterable, or has no length.
    """
    if isinstance(dataset, IterableDataset):
        raise UserError(
            f"{type(dataset).__name__} is an IterableDataset: its rows come in its own order and cannot be asked for "
            "by number, so none can be left unread; use a map-style data set"
        )
    if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        raise UserError(f"{type(dataset).__name__} has no length or no rows by number; use a map-style data set")
    return len(dataset)
