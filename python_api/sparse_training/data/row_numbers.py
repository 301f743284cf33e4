"""Reasons for which the rows of training data have no numbers by which they can be asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, default_collate

from sparse_kernels.trees import map_rows
from sparse_training.generators import (
    generator_state,
    own_generators,
    rng_state,
    set_generator_state,
    set_rng_state,
)

CPU = torch.device("cpu")
TRIED = 8  # rows that an unknown collate function is tried on


def unnumbered_reason(source: Any, targets: Callable[[Any], Tensor], *, processes: int = 1) -> str | None:
    """Say why rows of training data cannot be asked for by their number.

    Args:
        source: the training data, such as a DataLoader. It is not changed; a collate function other than PyTorch's is
            tried on a few rows.
        targets: function from a batch to its targets.
        processes: number of processes that train together. Default 1.

    Returns:
        The reason, which can follow "because"; None where a ``NumberedLoader`` serves the data.
    """
    if not isinstance(source, DataLoader):
        return f"a {type(source).__name__} of batches has no rows that can be asked for by their number"
    if isinstance(source.dataset, IterableDataset):
        return f"the rows of the IterableDataset {type(source.dataset).__name__} come in its own order"
    if source.batch_sampler is None:
        return "the DataLoader has batch_size=None, so its data set makes batches whose rows have no numbers"
    if any(getattr(type(source), name) is not getattr(DataLoader, name) for name in ("__iter__", "_get_iterator")):
        return f"{type(source).__name__} iterates in a way of its own"
    if not getattr(source, "in_order", True):
        return "the DataLoader has in_order=False, so rows come in an order that changes from run to run"
    if processes > 1 and type(source.batch_sampler) is not BatchSampler:
        return f"processes cannot prune the batches of {type(source.batch_sampler).__name__} alike"
    if without := [type(part).__name__ for part in (source.dataset, source.batch_sampler) if not _has_length(part)]:
        return f"{without[0]} has no length"
    return _collate_reason(source, targets)


def _has_length(part: Any) -> bool:
    try:
        len(part)
    except TypeError:  # a batch sampler's length is its sampler's, which may have none
        return False
    return True


def _collate_reason(source: DataLoader[Any], targets: Callable[[Any], Tensor]) -> str | None:
    """Say why the rows of a batch may not be those of its items, one for one and in order, as far as a trial tells."""
    rows = len(source.dataset)  # type: ignore[arg-type]
    count = min(TRIED, rows)
    if source.collate_fn is default_collate or count < 2:
        return None
    numbers = [place * (rows - 1) // (count - 1) for place in range(count)]
    try:
        forward, backward = (_collated(source, order, targets) for order in (numbers, numbers[::-1]))
    except Exception as error:
        return f"its collate function could not be tried on rows {numbers}: {type(error).__name__}: {error}"
    if len(forward[0]) != count:
        return f"its collate function makes {len(forward[0])} rows of {count}"
    if not torch.equal(forward[0], backward[0].flip(0)):
        return "its collate function mixes rows or gives them another order"
    pairs = [(a, b.flip(0)) for a, b in zip(forward, backward, strict=True) if a.shape[:1] == b.shape[:1] == (count,)]
    if not any(torch.equal(a, b) and not torch.equal(a, a.flip(0)) for a, b in pairs):
        return "its collate function cannot be seen to keep rows in order"
    return None


def _collated(source: DataLoader[Any], numbers: list[int], targets: Callable[[Any], Tensor]) -> list[Tensor]:
    """Collate rows, without a trace in any generator; return the targets and the other tensors of the batch."""
    with _generators_kept(source):
        # Items are fetched for each trial: a collate function may change them.
        batch = source.collate_fn([source.dataset[number] for number in numbers])
    tensors: list[Tensor] = [torch.as_tensor(targets(batch))]
    map_rows(batch, lambda part: tensors.append(torch.as_tensor(part)))
    return tensors


@contextmanager
def _generators_kept(source: Any) -> Iterator[None]:
    state, own = rng_state(CPU), own_generators(source)
    states = {path: generator_state(generator) for path, generator in own.items()}
    try:
        yield
    finally:
        set_rng_state(state, CPU)
        for path, generator in own.items():
            set_generator_state(generator, states[path])
