"""Loader of images held on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sparse_training.arguments import check_integer, check_number, check_positive
from sparse_training.data.loader import Loader
from sparse_training.devices import find
from sparse_training.errors import UserError
from sparse_training.ranks import rank_and_world_size, rank_seed
from sparse_training.selection.types import Batch, CandidateIndices, WeightedIndices
from sparse_training.user_code import described


class ArraySplit(Protocol):
    """Images with their labels, such as ``load_data(...).train``."""

    @property
    def images(self) -> Tensor:
        """Images, uint8 [N, C, H, W]."""

    @property
    def labels(self) -> Tensor:
        """Labels, int64 [N]."""


class ResidentLoader(Loader):
    """Loader of images held on the device as uint8, normalised when a batch is fetched.

    With several processes each holds the images rank, rank + ranks, ..., numbers them from 0, and yields as many
    batches as the others, each row once. Its last batch may be empty where another process has a row more.

    Example:
        >>> data = load_data("digits")
        >>> loader = ResidentLoader(data.train, batch_size=64, mean=data.mean, std=data.std)

    Args:
        split: images uint8 [N, C, H, W] and labels int64 [N].
        batch_size: rows in a batch of this process, from 1 to the rows it holds.
        seed: seed of the order of the rows, mixed with the epoch's number. Default 0.
        mean: mean of each channel, of images / 255; one value serves all channels. Default (0.0,).
        std: standard deviation of each channel, likewise, above 0. Default (1.0,).
        device: PyTorch device that holds the images, such as "cuda:0". Default "cpu".
        shuffle: True for a new order in each epoch, False for the order of the split. Default True.
        drop_last: True to leave out a short last batch. Default False.
        rank: rank of this process. Default: torch.distributed's, 0 without it.
        ranks: number of processes. Default: torch.distributed's, 1 without it.

    Raises:
        UserError: a batch size out of range, no images, or fewer images than processes.
    """

    divided = True

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
        own_rank, world_size = rank_and_world_size()
        self.rank = own_rank if rank is None else rank
        self.ranks = world_size if ranks is None else ranks
        for name in ("images", "labels"):
            if not isinstance(getattr(split, name, None), Tensor):
                raise UserError(
                    f"`split` must have tensors `images` and `labels`, such as load_data(...).train, got "
                    f"{described(split)}"
                )
        batch_size, seed = check_integer("batch_size", batch_size), check_integer("seed", seed)
        _check_channels(split.images, mean, std)
        rows = len(split.labels)
        if not 0 <= self.rank < self.ranks <= max(rows, 1):
            raise UserError(f"each process needs a row, got rank {self.rank} of {self.ranks} processes for {rows} rows")
        own = slice(self.rank, None, self.ranks)
        self.size: int = len(split.labels[own])
        self._least, self._most = rows // self.ranks, -(-rows // self.ranks)  # rows that a process holds
        if not 1 <= batch_size <= self._most:
            holder = "the data set" if self.ranks == 1 else "a process"
            raise UserError(f"`batch_size` must be 1 to {self._most}, the rows of {holder}, got {batch_size}")
        self.device = find(device)
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
        """Return the number of batches in an epoch."""
        return self._least // self.batch_size if self.drop_last else -(-self._most // self.batch_size)

    __len__ = batches

    def duplicate_counts(self) -> Tensor:
        """Count the rows with the same image as each, itself included; reads all images once."""
        images = self.images.flatten(1).cpu().numpy()
        keys = torch.tensor([hash(image.tobytes()) for image in images], device="cpu")
        _, number, count = torch.unique(keys, return_inverse=True, return_counts=True)
        duplicate_counts: Tensor = count[number]
        return duplicate_counts

    def order(self, epoch: int) -> Tensor:
        """Return the order of the rows in an epoch, int64 [N] on the CPU."""
        if not self.shuffle:
            return torch.arange(self.size, device="cpu")
        # PyTorch's CPU generator reads the low 32 bits of a seed.
        seed = rank_seed(self.seed * 1_000_003 + epoch, self.rank)
        generator = torch.Generator().manual_seed(seed % 2**32)
        return torch.randperm(self.size, generator=generator, device="cpu")

    def __iter__(self) -> Iterator[Tensor]:
        order = self.order(self.epoch)
        while self.position < self.batches():
            start = self.position * self.batch_size
            self.position += 1
            yield order[start : start + self.batch_size]
        self.epoch, self.position = self.epoch + 1, 0

    def fetch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images of rows, normalised, float32 [n, C, H, W], and their labels, int64 [n]."""
        index = index.to(self.device, non_blocking=True)
        images = self.images.index_select(0, index).float().mul_(self.scale).add_(self.shift)
        return images, self.labels.index_select(0, index)

    def offer(self, item: Tensor) -> CandidateIndices:
        """Return the indices of an item's rows, which are the item itself."""
        return CandidateIndices(item, self.epoch)

    def load(self, item: Tensor, choice: WeightedIndices | None = None) -> Batch:
        """Load the batch of an item, or of the rows chosen in its place, which may be any of the data set."""
        index, weight = (item, None) if choice is None else choice
        index = index.to(self.device, non_blocking=True)
        if weight is not None:
            weight = weight.to(self.device, non_blocking=True)
        return Batch(*self.fetch(index), index, len(item), weight)

    def probe(self) -> Iterator[Tensor]:
        """Yield a full batch and the short last one in turn, or only full ones where none is short."""
        order = self.order(0)
        tail = 0 if self.drop_last else self.size % self.batch_size
        while True:
            yield order[: self.batch_size]
            if tail:
                yield order[-tail:]


def _check_channels(images: Tensor, mean: Any, std: Any) -> None:
    """Refuse a normalisation that does not fit the images, or divides by 0."""
    channels = images.shape[1] if images.ndim == 4 else 1  # rows of another kind, of a subclass
    for name, values in (("mean", mean), ("std", std)):
        numbers = values if isinstance(values, Sequence) and not isinstance(values, str) else ()
        for value in numbers:
            check_number(name, value, "finite", math.isfinite) if name == "mean" else check_positive(name, value)
        if len(numbers) not in (1, channels):
            raise UserError(f"`{name}` must have one value, or one for each of {channels} channels, got {values!r}")
