"""Images held on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sparse_training.data.loader import Loader
from sparse_training.errors import UserError
from sparse_training.ranks import rank_and_world_size, rank_seed
from sparse_training.selection.types import Batch, CandidateIndices, WeightedIndices


class ArraySplit(Protocol):
    """Images uint8 [N, C, H, W] and labels int64 [N]."""

    @property
    def images(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...


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
        here, there = rank_and_world_size()
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

    def duplicate_counts(self) -> Tensor:
        """Goes through all images once."""
        images = self.images.flatten(1).cpu().numpy()
        keys = torch.tensor([hash(image.tobytes()) for image in images])
        _, number, count = torch.unique(keys, return_inverse=True, return_counts=True)
        duplicate_counts: Tensor = count[number]
        return duplicate_counts

    def order(self, epoch: int) -> Tensor:
        """int64 [N], on the CPU: the rows in the order of that epoch."""
        if not self.shuffle:
            return torch.arange(self.size)
        # PyTorch's CPU generator reads the low 32 bits of a seed.
        seed = rank_seed(self.seed * 1_000_003 + epoch, self.rank)
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

    def offer(self, item: Tensor) -> CandidateIndices:
        return CandidateIndices(item, self.epoch)

    def load(self, item: Tensor, choice: WeightedIndices | None = None) -> Batch:
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
