"""Processes of torch.distributed: rank, world size, seeds and sums."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_training.errors import UserError
from sparse_training.rank_failures import wait_for


def check_process_group(group: Any) -> Any:
    """Return a process group as it was given, if it is one.

    Args:
        group: None, "world", a group, or what ``new_group`` returns to a process that it leaves out.

    Raises:
        UserError: it is something else.
    """
    some = dist.is_available() and (isinstance(group, dist.ProcessGroup) or group is dist.GroupMember.NON_GROUP_MEMBER)
    if group is None or group == "world" or some:
        return group
    raise UserError(f'`process_group` must be None, "world" or a group of torch.distributed, got {group!r}')


def resolve_process_group(group: Any) -> Any:
    """Resolve a process group.

    Args:
        group: "world" for the default group, or a group.

    Returns:
        The group.

    Raises:
        UserError: torch.distributed is not initialised, or this process is not in the group.
    """
    if group != "world":
        # dist.new_group returns this to a process that it leaves out; a collective of it would do nothing.
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise UserError("this process is not in `process_group`; make the gate on the ranks of the group alone")
        return group
    if not dist.is_available() or not dist.is_initialized():
        raise UserError(
            'process_group="world" needs torch.distributed; call torch.distributed.init_process_group first'
        )
    return dist.group.WORLD


def rank_seed(seed: int, rank: int) -> int:
    """Seed of a rank, 64 bits; rank 0's is ``seed``. With one seed for all, ranks would draw alike."""
    return (seed + rank * 0x9E3779B97F4A7C15) % 2**64


def rank_and_world_size() -> tuple[int, int]:
    """Rank of this process and number of processes; 0 and 1 where torch.distributed is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def launched() -> tuple[int, int]:
    """Rank and number of processes as torchrun started them; 0 and 1 without torchrun."""
    if dist.is_available() and dist.is_torchelastic_launched():
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def connect() -> None:
    """Initialise torch.distributed under torchrun, for the CPU and one GPU per process; no effect without torchrun."""
    if launched()[1] == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo")


def gather_numbers(*numbers: int) -> Tensor:
    """Gather integers from all processes, which all call this with as many.

    Returns:
        int64 [processes, numbers], on the CPU.
    """
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    wait_for(dist.all_gather(gathered, own, async_op=True), own.device)
    return torch.stack(gathered).cpu()


def sum_across_ranks(tensors: Sequence[Tensor]) -> None:
    """Sum tensors across the processes, in place, in one exchange.

    Args:
        tensors: floating tensors on the device of the training; every process passes the same shapes.
    """
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    flat = torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])
    wait_for(dist.all_reduce(flat, async_op=True), flat.device)
    with torch.no_grad():
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
