"""One gate over several processes.

The sums over each rank's rows, 15 float64 numbers a rank, are gathered without waiting, and all ranks advance the same
state. Every rank merges them in the order of the ranks and applies the control law to the same sums, so the states
stay equal bit for bit and nothing is ever broadcast.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_kernels import ControlState
from sparse_kernels.control_law import Sums, advance, means, single, sums
from sparse_training.rank_failures import wait_for


class Exchange:
    """Gathers the sums of a batch from all ranks, and moves the controller's state once they are there.

    Args:
        group: process group of the ranks.
        state: state of the controller; ``finish`` moves it.
        significance: significance of this rank's rows, floating [rows], at least 0.
        valid: the rows that count, bool [rows].
        norms: gradient norm of each row, floating [rows], for a grad-norm fraction; None for a rate.
        set_point: set-point of the controller, float32, one element; copied, for it may change meanwhile.
        kept: number of rows kept by this rank, integer of one element.
        overflow: number of rows beyond this rank's capacity, integer of one element.
        temperature: temperature of the gate.
        p_min: least probability of keeping a row.
    """

    def __init__(
        self, group: Any, state: ControlState, significance: Tensor, valid: Tensor, norms: Tensor | None,
        set_point: Tensor, kept: Tensor, overflow: Tensor, temperature: float, p_min: float,
    ) -> None:  # fmt: skip
        with torch.no_grad():
            self.state, self.set_point = state, set_point.clone()
            self.ranks = dist.get_world_size(group)
            rows = valid.sum() - (valid & significance.isnan()).sum()
            if not significance.shape[0]:  # a minimum over no row is undefined: use one that does not count
                significance, valid = significance.new_zeros(1), valid.new_zeros(1)
                norms = None if norms is None else norms.new_zeros(1)
            own_sums = sums(
                significance.double(), valid, None if norms is None else norms.double(), state.values[0],
                temperature, p_min,
            )  # fmt: skip
            # The sums, then three counts of rows: kept, valid, beyond the capacity.
            own = torch.stack([x.double() for x in (*own_sums, kept, rows, overflow)])
            self.gathered = [torch.empty_like(own) for _ in range(self.ranks)]
            # torch.compile supports only collectives that wait.
            self.work = dist.all_gather(self.gathered, own, group=group, async_op=not torch.compiler.is_compiling())

    def finish(self) -> tuple[Tensor, Tensor]:
        """Wait for the other ranks (on CUDA, the stream waits) and move the state.

        Returns:
            Numbers of kept rows and of valid rows, summed over the ranks and divided by their number: float32, one
            element each.
        """
        if self.work is not None:
            wait_for(self.work, self.gathered[0].device)
        with torch.no_grad():
            of_ranks = torch.stack(self.gathered)
            *added, kept, valid, overflow = of_ranks.sum(0).unbind()
            low, high = (of_ranks[:, Sums._fields.index(name)] for name in ("low", "high"))
            merged = Sums(*added)._replace(low=low.amin(), high=high.amax(), invalid=added[-1].long())
            batch = single(means(merged))
            after = advance(self.state, batch, self.set_point.reshape(()), overflow.long())
            self.state.values.copy_(after.values)
            self.state.counters.copy_(after.counters)
            return (kept / self.ranks).float(), (valid / self.ranks).float()
