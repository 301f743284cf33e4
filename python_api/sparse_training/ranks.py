"""One gate over several processes: what each one's rows add up to is gathered, and all advance the same state.

A rank contributes 15 float64 numbers a batch, gathered without waiting. Every rank merges them in the order of the
ranks and applies the law to the same sums, so the states stay equal bit for bit and nothing is ever broadcast.
"""

from __future__ import annotations

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


def own_seed(seed: int, group: Any) -> int:
    """A rank's own seed, of 64 bits, for its rows have the numbers of other ranks' rows; rank 0's is ``seed``."""
    return int((seed + dist.get_rank(group) * 0x9E3779B97F4A7C15) % 2**64)


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
