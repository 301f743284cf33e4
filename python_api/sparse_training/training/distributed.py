"""Collective operations of the processes that train one model together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_training.ranks import rank_and_world_size


class Ranks:
    """Processes that train one model together: all of torch.distributed's, or this one alone.

    All of them call every method, in the same order; a process alone gets its own value back. Values of the host
    are exchanged through gloo, so that they wait for no accelerator.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    def __init__(self) -> None:
        self.rank, self.size = rank_and_world_size()
        self._group: Any = None
        if self.size > 1 and "gloo" not in dist.get_backend():
            self._group = dist.new_group(backend="gloo")

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # process groups cannot be copied, and a copy uses the same

    @property
    def alone(self) -> bool:
        """True where one process trains the model."""
        return self.size == 1

    def sum_later(self, values: Tensor) -> Callable[[], Tensor]:
        """Start to sum a tensor over the ranks, in place on its device; the returned function waits for the sum."""
        if self.alone:
            return lambda: values
        work = dist.all_reduce(values, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return values

        return wait

    def total(self, number: float) -> float:
        """Return the sum of the ranks' numbers."""
        if self.alone:
            return number
        total = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return total.item()

    def first(self, number: float) -> float:
        """Return rank 0's number."""
        return self.total(number if self.rank == 0 else 0.0)

    def all(self, value: Any) -> list[Any]:
        """Return every rank's value, in order of the ranks; any value that can be pickled."""
        values: list[Any] = [value] * self.size
        if not self.alone:
            dist.all_gather_object(values, value, group=self._group)
        return values
