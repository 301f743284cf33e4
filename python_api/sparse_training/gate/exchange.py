"""Several processes: one gate over all of them, and what a trainer says to its like.

Of a gate's batch what each rank's rows add up to is gathered, and all advance the same state: 15 float64 numbers a
rank, gathered without waiting. Every rank merges them in the order of the ranks and applies the law to the same
sums, so the states stay equal bit for bit and nothing is ever broadcast.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_kernels import ControlState
from sparse_kernels.control_law import Sums, advance, means, single, sums


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
