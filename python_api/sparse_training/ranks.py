"""Several processes: one gate over all of them, and what a trainer says to its like.

Of a gate's batch what each rank's rows add up to is gathered, and all advance the same state: 15 float64 numbers a
rank, gathered without waiting. Every rank merges them in the order of the ranks and applies the law to the same
sums, so the states stay equal bit for bit and nothing is ever broadcast.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_kernels import ControlState
from sparse_kernels.control_law import Sums, advance, means, single, sums
from sparse_training.errors import UserError


def resolve(group: Any) -> Any:
    """The process group meant: "world" is the default one.

    Raises:
        UserError: torch.distributed is not initialised, or this process is not in the group.
    """
    if group != "world":
        # What dist.new_group gives to a process that it leaves out; a collective of it would do nothing.
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise UserError("a process_group that this process is not in; wanted a gate on the group's ranks alone")
        return group
    if not dist.is_available() or not dist.is_initialized():
        raise UserError('process_group="world" before torch.distributed.init_process_group; wanted it called first')
    return dist.group.WORLD


def own_seed(seed: int, rank: int) -> int:
    """A rank's own seed, of 64 bits, for its rows have the numbers of other ranks' rows; rank 0's is ``seed``."""
    return (seed + rank * 0x9E3779B97F4A7C15) % 2**64


def place() -> tuple[int, int]:
    """This process's rank and how many there are: 0 and 1 where torch.distributed is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def launched() -> tuple[int, int]:
    """The rank and the number of processes that torchrun started this one with; 0 and 1 without it."""
    if dist.is_available() and dist.is_torchelastic_launched():
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def connect() -> None:
    """Initialises torch.distributed under torchrun, for the processor and for a GPU a process; nothing without it."""
    if launched()[1] == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo")


def add_up(tensors: Sequence[Tensor]) -> None:
    """Every process's sum, in place, of floating tensors on the training's device: one exchange for all of them."""
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    flat = torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])
    dist.all_reduce(flat)
    with torch.no_grad():
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


class Ranks:
    """The processes that train one model together, all of torch.distributed's; alone where there are no others.

    Every method is to be called by all of them, in the same order; alone each gives back what it was given.
    What the host asks goes by gloo, so that it waits for no accelerator.
    """

    def __init__(self) -> None:
        self.rank, self.size = place()
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


class Exchange:
    """A batch's sums on their way between the ranks, and what is to be done when they are there.

    Args:
        state: moved by ``finish``, not before.
        significance: floating [rows], 0 or more. valid: bool [rows]. mass: optional floating [rows].
        setpoint: float32, one element; copied, for it may change meanwhile.
        kept, overflow: integers, one element, of this rank's selection.
        temperature, p_min: the gate's.
    """

    def __init__(
        self, group: Any, state: ControlState, significance: Tensor, valid: Tensor, mass: Tensor | None,
        setpoint: Tensor, kept: Tensor, overflow: Tensor, temperature: float, p_min: float,
    ) -> None:  # fmt: skip
        with torch.no_grad():
            self.state, self.setpoint = state, setpoint.clone()
            self.ranks = dist.get_world_size(group)
            rows = valid.sum() - (valid & significance.isnan()).sum()
            if not significance.shape[0]:  # the least of nothing is not defined: a row that does not count is
                significance, valid = significance.new_zeros(1), valid.new_zeros(1)
                mass = None if mass is None else mass.new_zeros(1)
            found = sums(
                significance.double(), valid, None if mass is None else mass.double(), state.values[0],
                temperature, p_min,
            )  # fmt: skip
            # Behind the sums three counts of rows: kept, valid, beyond the capacity.
            own = torch.stack([x.double() for x in (*found, kept, rows, overflow)])
            self.gathered = [torch.empty_like(own) for _ in range(self.ranks)]
            # A compiler knows no collective but those that wait.
            self.work = dist.all_gather(self.gathered, own, group=group, async_op=not torch.compiler.is_compiling())

    def finish(self) -> tuple[Tensor, Tensor]:
        """Waits (on CUDA, its stream does) and moves the state.

        Returns:
            Rows kept and valid rows, over all ranks and divided by their number: float32, one element each.
        """
        if self.work is not None:
            self.work.wait()
        with torch.no_grad():
            of_ranks = torch.stack(self.gathered)
            *added, kept, valid, overflow = of_ranks.sum(0).unbind()
            low, high = (of_ranks[:, Sums._fields.index(name)] for name in ("low", "high"))
            found = Sums(*added)._replace(low=low.amin(), high=high.amax(), invalid=added[-1].long())
            batch = single(means(found))
            after = advance(self.state, batch, self.setpoint.reshape(()), overflow.long())
            self.state.values.copy_(after.values)
            self.state.counters.copy_(after.counters)
            return (kept / self.ranks).float(), (valid / self.ranks).float()
