"""The processes that train one model together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_training.ranks import rank_and_world_size


class Ranks:
    """The processes that train one model together, all of torch.distributed's; alone where there are no others.

    Every method is to be called by all of them, in the same order; alone each gives back what it was given.
    What the host asks goes by gloo, so that it waits for no accelerator.
    """

    def __init__(self) -> None:
        self.rank, self.size = rank_and_world_size()
        self._group: Any = None
        if self.size > 1 and "gloo" not in dist.get_backend():
            self._group = dist.new_group(backend="gloo")

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # a handle

    @property
    def alone(self) -> bool:
        return self.size == 1

    def sum_later(self, values: Tensor) -> Callable[[], Tensor]:
        """Starts to add up tensors on the training's device, in place; call what it gives to wait for the sum."""
        if self.alone:
            return lambda: values
        work = dist.all_reduce(values, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return values

        return wait

    def total(self, number: float) -> float:
        """The sum of every rank's number."""
        if self.alone:
            return number
        held = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(held, group=self._group)
        return held.item()

    def first(self, number: float) -> float:
        """Rank 0's number."""
        return self.total(number if self.rank == 0 else 0.0)

    def all(self, value: Any) -> list[Any]:
        """Every rank's value, anything that can be pickled."""
        found: list[Any] = [value] * self.size
        if not self.alone:
            dist.all_gather_object(found, value, group=self._group)
        return found
