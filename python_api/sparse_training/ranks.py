"""Processes of torch.distributed: rank, number, seeds and sums."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_training.errors import UserError


def resolve_process_group(group: Any) -> Any:
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


def rank_seed(seed: int, rank: int) -> int:
    """A rank's own seed, of 64 bits, for its rows have the numbers of other ranks' rows; rank 0's is ``seed``."""
    return (seed + rank * 0x9E3779B97F4A7C15) % 2**64


def rank_and_world_size() -> tuple[int, int]:
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


def sum_across_ranks(tensors: Sequence[Tensor]) -> None:
    """Every process's sum, in place, of floating tensors on the training's device: one exchange for all of them."""
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    flat = torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])
    dist.all_reduce(flat)
    with torch.no_grad():
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
