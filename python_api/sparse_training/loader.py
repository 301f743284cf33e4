"""Batches in two stages, so that a policy can choose rows before they are loaded.

A loader yields *items*, one a batch. ``offer`` names an item's rows, a policy chooses among them, and
``load`` turns the item and the choice into a ``Batch`` on the device. For data resident on the device an
item is a list of row numbers: any row may be chosen, of this item or not, and the others are never
touched. For any other iterable an item is the batch itself, and choosing happens after loading.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparse_training.errors import UserError
from sparse_training.ranks import own_seed, place

TARGET_KEYS = ("labels", "label", "targets", "target", "y")


class Offer(NamedTuple):
    """The rows of an item, for a policy to choose from before they are loaded."""

    ids: Tensor  # int64 [B], on the CPU: row numbers in the data set; of a stream, positions in the batch
    epoch: int


class Choice(NamedTuple):
    """The rows to load in place of the ones offered."""

    ids: Tensor  # int64 [n], on the CPU
    weight: Tensor | None = None  # float32 [n], on the CPU: what each counts in the loss, None for 1


class Batch(NamedTuple):
    """One batch on the training device; dim 0 of every tensor counts its rows."""

    inputs: Any  # a tensor, or a tuple or mapping of tensors
    targets: Tensor
    ids: Tensor | None  # int64 row numbers in the data set, where the loader knows them
    offered: int  # rows there were before the policy chose
    weight: Tensor | None = None  # float32 [rows], the choice's; 0 for rows that do not count
    counted: Tensor | None = None  # how many count, where it is not all of them

    @property
    def rows(self) -> int:
        return self.targets.shape[0]

    @property
    def divisor(self) -> int | Tensor:
        """What a sum over the rows that count is to be divided by; 1 where there are none."""
        return self.rows if self.counted is None else self.counted.clamp(min=1)


class ArraySplit(Protocol):
    """Images uint8 [N, C, H, W] and labels int64 [N]."""

    @property
    def images(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...


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
    def offer(self, item: Any) -> Offer:
        """The rows of an item."""

    @abstractmethod
    def load(self, item: Any, choice: Choice | None = None) -> Batch:
        """The batch of an item, or of the rows chosen in its place."""

    @abstractmethod
    def probe(self) -> Iterator[Any]:
        """Items without end for timing; epoch and position stay as they are."""

    @abstractmethod
    def batches(self) -> int | None:
        """Items in an epoch, None where unknown."""

    def copies(self) -> Tensor | None:
        """int64 [size], on the CPU: how many rows have the same inputs as each, itself included; None where unknown."""
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.position = int(state["epoch"]), int(state["position"])


class ResidentLoader(Loader):
    """Images held on the device as uint8, normalised when a batch of them is fetched.

    Of several processes each holds the images rank, rank + ranks, ..., numbers them from 0, and gives as many
    batches as the others, each row once: the last batch may be empty where another process has a row more.

    Args:
        split: images uint8 [N, C, H, W] and labels int64 [N].
        batch_size: rows in a batch of this process, 1 to the rows it holds.
        seed: with the epoch's number it determines the order of the rows.
        mean, std: per channel, of images / 255.
        drop_last: leave out a short last batch.
        rank, ranks: of this process and how many there are; by default torch.distributed's.

    Raises:
        UserError: batch_size outside 1..N, no images, or fewer than processes.
    """

    def __init__(
        self,
        split: ArraySplit,
        *,
        batch_size: int,
        seed: int = 0,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        device: torch.device | str = "cpu",
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int | None = None,
        ranks: int | None = None,
    ) -> None:
        super().__init__()
        here, there = place()
        self.rank, self.ranks = here if rank is None else rank, there if ranks is None else ranks
        rows = len(split.labels)
        if not 0 <= self.rank < self.ranks <= max(rows, 1):
            raise UserError(f"rank {self.rank} of {self.ranks} over {rows} rows: wanted a row a process")
        own = slice(self.rank, None, self.ranks)
        self.size: int = len(split.labels[own])
        self._least, self._most = rows // self.ranks, -(-rows // self.ranks)  # that a process holds
        if not 1 <= batch_size <= self._most:
            whose = "the data set" if self.ranks == 1 else "a process"
            raise UserError(f"batch size {batch_size}: wanted 1 to {self._most}, the rows of {whose}")
        self.device = torch.device(device)
        self.images = split.images[own].to(self.device)
        self.labels: Tensor = split.labels[own].to(self.device)
        # (v / 255 - mean) / std as one multiplication and one addition.
        spread = torch.tensor(std, dtype=torch.float32).reshape(1, -1, 1, 1)
        centre = torch.tensor(mean, dtype=torch.float32).reshape(1, -1, 1, 1)
        self.scale = (1.0 / (255.0 * spread)).to(self.device)
        self.shift = (-centre / spread).to(self.device)
        self.batch_size, self.seed = batch_size, seed
        self.shuffle, self.drop_last = shuffle, drop_last

    def batches(self) -> int:
        return self._least // self.batch_size if self.drop_last else -(-self._most // self.batch_size)

    __len__ = batches

    def copies(self) -> Tensor:
        """Goes through all images once."""
        images = self.images.flatten(1).cpu().numpy()
        keys = torch.tensor([hash(image.tobytes()) for image in images])
        _, number, count = torch.unique(keys, return_inverse=True, return_counts=True)
        copies: Tensor = count[number]
        return copies

    def order(self, epoch: int) -> Tensor:
        """int64 [N], on the CPU: the rows in the order of that epoch."""
        if not self.shuffle:
            return torch.arange(self.size)
        # PyTorch's CPU generator reads the low 32 bits of a seed.
        seed = own_seed(self.seed * 1_000_003 + epoch, self.rank)
        generator = torch.Generator().manual_seed(seed % 2**32)
        return torch.randperm(self.size, generator=generator)

    def __iter__(self) -> Iterator[Tensor]:
        order = self.order(self.epoch)
        while self.position < self.batches():
            start = self.position * self.batch_size
            self.position += 1
            yield order[start : start + self.batch_size]
        self.epoch, self.position = self.epoch + 1, 0

    def fetch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images float32 [n, C, H, W], normalised, and labels int64 [n] of the rows in ``index``."""
        index = index.to(self.device, non_blocking=True)
        images = self.images.index_select(0, index).float().mul_(self.scale).add_(self.shift)
        return images, self.labels.index_select(0, index)

    def offer(self, item: Tensor) -> Offer:
        return Offer(item, self.epoch)

    def load(self, item: Tensor, choice: Choice | None = None) -> Batch:
        index, weight = (item, None) if choice is None else choice
        index = index.to(self.device, non_blocking=True)
        if weight is not None:
            weight = weight.to(self.device, non_blocking=True)
        return Batch(*self.fetch(index), index, len(item), weight)

    def probe(self) -> Iterator[Tensor]:
        """A full batch and the short last one in turn (only full ones where none is short)."""
        order = self.order(0)
        tail = 0 if self.drop_last else self.size % self.batch_size
        while True:
            yield order[: self.batch_size]
            if tail:
                yield order[-tail:]


class StreamLoader(Loader):
    """Any iterable of batches, such as a DataLoader; every batch is loaded whole.

    A sampler with ``set_epoch`` is told the epoch. On resume the batches of the epoch that were
    already used are drawn again, from the generator state the epoch began with, and passed over.

    Args:
        batches: tuples (inputs..., targets), or mappings with the targets under one of TARGET_KEYS.
        inputs, targets: how to take them from a batch of any other structure.
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
            raise UserError("the training data gave no batch: wanted an iterable that can be gone through again")
        self.epoch, self.position = self.epoch + 1, 0

    def offer(self, item: Any) -> Offer:
        return Offer(torch.arange(self.targets(item).shape[0]), self.epoch)

    def load(self, item: Any, choice: Choice | None = None) -> Batch:
        def to_device(tensor: Tensor) -> Tensor:
            return tensor.to(self.device, non_blocking=True)

        parts = (self.inputs(item), self.targets(item))
        offered = parts[1].shape[0]
        if choice is not None:
            parts = pytree.tree_map_only(Tensor, lambda t: t.index_select(0, choice.ids.to(t.device)), parts)
        weight = None if choice is None else choice.weight
        inputs, targets, weight = pytree.tree_map_only(Tensor, to_device, (*parts, weight))
        return Batch(inputs, targets, None, offered, weight)

    def probe(self) -> Iterator[Any]:
        if isinstance(self.source, Iterator):
            raise UserError("a one-shot iterator cannot be timed beforehand: give a DataLoader, or steps= for a budget")
        while True:
            yield from self.source

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "epoch_rng": self._epoch_rng}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._epoch_rng = state.get("epoch_rng")


def default_inputs(batch: Any) -> Any:
    """All of a batch but its targets; a pair's first half bare."""
    if isinstance(batch, Mapping):
        key = _target_key(batch)
        return {name: value for name, value in batch.items() if name != key}
    if isinstance(batch, Sequence) and len(batch) >= 2:
        return batch[0] if len(batch) == 2 else tuple(batch[:-1])
    raise UserError(
        f"a batch of type {type(batch).__name__}: wanted (inputs, targets), a mapping, or inputs= and targets="
    )


def default_targets(batch: Any) -> Any:
    """The last of a sequence, or what a mapping holds under one of TARGET_KEYS."""
    if isinstance(batch, Mapping):
        return batch[_target_key(batch)]
    if isinstance(batch, Sequence) and len(batch) >= 2:
        return batch[-1]
    raise UserError(
        f"a batch of type {type(batch).__name__}: wanted (inputs, targets), a mapping, or inputs= and targets="
    )


def _target_key(batch: Mapping[str, Any]) -> str:
    for key in TARGET_KEYS:
        if key in batch:
            return key
    raise UserError(
        f"a batch with the keys {', '.join(map(str, batch))}: wanted one of {', '.join(TARGET_KEYS)}, or targets="
    )
