"""Collective operations of the processes that train one model together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparse_training.errors import UserError
from sparse_training.ranks import rank_and_world_size


def split_wrapper(model: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """Tell a model from what wraps it for several processes.

    Args:
        model: a module; or one in DistributedDataParallel, compiled or not; or one that FSDP shards.

    Returns:
        The model itself, and the module that training passes go through; None where nothing wraps the model.

    Raises:
        UserError: a wrapped part within a model that is not wrapped.
    """
    inner = getattr(model, "_orig_mod", model)  # of torch.compile
    if isinstance(inner, DistributedDataParallel):
        return inner.module, model
    if is_sharded(inner):
        return model, model
    if inside := [name for name, module in model.named_modules() if isinstance(module, DistributedDataParallel)]:
        raise UserError(f"DistributedDataParallel must wrap the whole model or none of it, got its {inside[0]}")
    return model, None


def is_sharded(model: nn.Module) -> bool:
    """Tell whether FSDP shards a model: ``fully_shard``, or the older wrapper."""
    if not dist.is_available():
        return False
    from torch.distributed import fsdp

    return isinstance(model, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel))


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
