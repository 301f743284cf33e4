"""Loader of any iterable of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparse_kernels.trees import rows_at
from sparse_training.data.loader import Loader
from sparse_training.errors import UserError
from sparse_training.selection.types import Batch, CandidateIndices, WeightedIndices

TARGET_KEYS = ("labels", "label", "targets", "target", "y")


class StreamLoader(Loader):
    """Loader of any iterable of batches, such as a DataLoader; every batch is loaded whole.

    A sampler with ``set_epoch`` receives the epoch's number. On resume, the batches of the epoch that were already
    used are drawn again, from the generator state at the epoch's start, and skipped.

    Args:
        batches: iterable of tuples (inputs..., targets), or of mappings with the targets under one of
            ``TARGET_KEYS``: "labels", "label", "targets", "target", "y".
        inputs: function from a batch of any other structure to the model's inputs. Default: all but the targets.
        targets: function from such a batch to its targets. Default: the last of a tuple, or the mapping's targets.
        device: PyTorch device to move batches to. Default "cpu".
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        inputs: Callable[[Any], Any] | None = None,
        targets: Callable[[Any], Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.source = batches
        self.inputs = inputs or default_inputs
        self.targets = targets or default_targets
        self.device = torch.device(device)
        self._epoch_rng: Tensor | None = None  # torch's CPU generator when the epoch began

    def batches(self) -> int | None:
        """Return the number of batches in an epoch; None for data without a length."""
        if not isinstance(self.source, Sized):
            return None
        try:
            return len(self.source)
        except TypeError:  # a DataLoader over an iterable data set has a __len__ that raises
            return None

    def __iter__(self) -> Iterator[Any]:
        set_epoch = getattr(getattr(self.source, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self.epoch)
        if self.position and self._epoch_rng is not None:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self._epoch_rng.cpu())
                source = iter(self.source)
                for _ in range(self.position):
                    next(source, None)
        else:
            self._epoch_rng = torch.get_rng_state()
            source = iter(self.source)
        for batch in source:
            self.position += 1
            yield batch
        if not self.position:
            raise UserError("the training data yielded no batch; it must be an iterable that can be iterated again")
        self.epoch, self.position = self.epoch + 1, 0

    def offer(self, item: Any) -> CandidateIndices:
        """Return the positions of an item's rows in the batch."""
        return CandidateIndices(torch.arange(self.targets(item).shape[0]), self.epoch)

    def load(self, item: Any, choice: WeightedIndices | None = None) -> Batch:
        """Move an item to the device, or the rows of it that were chosen."""

        def to_device(tensor: Tensor) -> Tensor:
            return tensor.to(self.device, non_blocking=True)

        parts = (self.inputs(item), self.targets(item))
        offered = parts[1].shape[0]
        if choice is not None:
            parts = rows_at(parts, choice.index, offered)
        weight = None if choice is None else choice.weight
        inputs, targets, weight = pytree.tree_map_only(Tensor, to_device, (*parts, weight))
        return Batch(inputs, targets, None, offered, weight)

    def probe(self) -> Iterator[Any]:
        """Yield batches without end, for timing.

        Raises:
            UserError: the data is a one-shot iterator.
        """
        if isinstance(self.source, Iterator):
            raise UserError("a one-shot iterator cannot be timed beforehand; use a DataLoader, or a budget of steps=")
        while True:
            yield from self.source

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the generator state at the epoch's start, for a checkpoint."""
        return {**super().state_dict(), "epoch_rng": self._epoch_rng}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        super().load_state_dict(state)
        self._epoch_rng = state.get("epoch_rng")


def default_inputs(batch: Any) -> Any:
    """Return all of a batch but its targets; of a pair, the first element itself.

    Raises:
        UserError: a batch that is neither a sequence of at least two elements nor a mapping with targets.
    """
    if isinstance(batch, Mapping):
        key = _target_key(batch)
        return {name: value for name, value in batch.items() if name != key}
    if isinstance(batch, Sequence) and len(batch) >= 2:
        return batch[0] if len(batch) == 2 else tuple(batch[:-1])
    raise _unknown_structure(batch)


def default_targets(batch: Any) -> Any:
    """Return the last element of a sequence, or a mapping's value under one of ``TARGET_KEYS``.

    Raises:
        UserError: a batch that is neither a sequence of at least two elements nor a mapping with targets.
    """
    if isinstance(batch, Mapping):
        return batch[_target_key(batch)]
    if isinstance(batch, Sequence) and len(batch) >= 2:
        return batch[-1]
    raise _unknown_structure(batch)


def _unknown_structure(batch: Any) -> UserError:
    return UserError(
        f"a batch must be (inputs, targets) or a mapping, got {type(batch).__name__}; "
        "give inputs= and targets= to take them from it"
    )


def _target_key(batch: Mapping[str, Any]) -> str:
    for key in TARGET_KEYS:
        if key in batch:
            return key
    raise UserError(
        f"a batch must have one of the keys {', '.join(TARGET_KEYS)}, got {', '.join(map(str, batch))}; "
        "give targets= to take the targets from it"
    )
