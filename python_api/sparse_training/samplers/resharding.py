"""The tables and draws of one number of processes, dealt out to another number of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_training.errors import UserError
from sparse_training.selection.types import WeightedIndices


def check_ranks(states: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the states of all processes of a run, in order of their ranks.

    Raises:
        UserError: a state is missing or there twice, or they are of different runs or moments.
    """
    if not states:
        raise UserError("`states` must hold one state for each process of the run, got none")
    settings = [{**state["settings"]} for state in states]
    ranks = [int(each.pop("rank")) for each in settings]
    if sorted(ranks) != list(range(settings[0]["processes"])):
        raise UserError(
            f"`states` must hold one state for each of {settings[0]['processes']} processes, got those of ranks "
            f"{', '.join(map(str, sorted(ranks)))}"
        )
    for rank, (own, state) in enumerate(zip(settings, states, strict=True)):
        if own != settings[0] or (state["epoch"], state["drawn"]) != (states[0]["epoch"], states[0]["drawn"]):
            raise UserError(f"the states are of different runs or moments: those of ranks {ranks[0]} and {ranks[rank]}")
    return [states[ranks.index(rank)] for rank in range(len(ranks))]


def reshard_rows(parts: Sequence[Tensor], size: int, rank: int, ranks: int) -> Tensor:
    """Collect the values of one process's rows from the tables of another number of processes.

    Process r of n has the rows r, r + n, r + 2n, ...; no table of all rows is made.

    Args:
        parts: values of the former processes' rows, in order of their ranks.
        size: number of rows of the data set.
        rank: number of the process, from 0.
        ranks: number of processes now.

    Returns:
        A value for each row of the process, of the dtype that they had.
    """
    former = len(parts)
    step = math.lcm(former, ranks)
    own = parts[0].new_empty(len(range(rank, size, ranks)))
    for first in range(rank, min(size, step), ranks):  # row ``first`` and every ``step``-th after it
        own[first // ranks :: step // ranks] = parts[first % former][first // former :: step // former]
    return own


def resharded(states: Sequence[Mapping[str, Any]], rank: int, ranks: int) -> dict[str, Any]:
    """Return the state of one of ``ranks`` processes that continue a run of another number of them.

    Args:
        states: states of all former processes; see ``check_ranks``.
        rank: number of the process, from 0.
        ranks: number of processes now.

    Returns:
        A state for ``HistorySampler.load_state_dict``. Batches that were drawn and not trained on are drawn anew.

    Raises:
        UserError: the method is adaptive, or an epoch of infobatch has begun and not ended.
    """
    ordered = check_ranks(states)
    former, settings = ordered[0], ordered[0]["settings"]
    method = str(settings["law"]).partition("+")[0]
    if method == "adaptive":
        raise UserError(
            f"a state of adaptive is of {len(ordered)} processes and cannot be dealt out to {ranks}; resume as many"
        )
    trained = min(state["drawn"] - len(state["pending"]) for state in ordered)
    ended = former["total"] is not None and trained >= former["total"]
    if method == "infobatch" and trained and not ended:
        raise UserError(
            f"an epoch of infobatch cannot go on with another number of processes, {ranks} in place of {len(ordered)}; "
            "use a state from the end of an epoch"
        )
    tables = [state["table"] for state in ordered]
    state: dict[str, Any] = {
        "settings": {**settings, "processes": ranks, "rank": rank},
        "table": {
            "scores": reshard_rows([table["scores"] for table in tables], settings["rows"], rank, ranks),
            "invalid": sum(table["invalid"] for table in tables) if rank == 0 else 0,
        },
        "law": dict(former["law"]),
        "epoch": former["epoch"] + ended,
        # As many rows as were trained on; what was drawn ahead is drawn again, from the scores known now.
        "drawn": 0 if ended else math.ceil(trained * len(ordered) / ranks),
        "total": None,
        "position": 0,
        "pending": [],
    }
    if method == "importance":
        # Rows without a score still come first: the pass over them begins again and skips those that have one.
        state["law"] = {"step": max(part["law"]["step"] for part in ordered), "first": 0}
    return state


class NewRank(NamedTuple):
    """A process that continues a run of another number of processes.

    Attributes:
        rank: number of the process, from 0.
        ranks: number of processes now.
        divided: True where process r of n holds the rows r, r + n, ... of the data set and numbers them from 0; False
            where every process numbers all rows of the data set alike.
    """

    rank: int
    ranks: int
    divided: bool

    def scores(self, parts: Sequence[Tensor]) -> Tensor:
        """Collect the scores of this process's rows.

        Args:
            parts: floating scores of the former processes' rows, in order of the ranks; NaN for none.

        Returns:
            A score for each row, which is the former one. Where several processes had scored a row, their mean.
        """
        if self.divided:
            return reshard_rows(parts, sum(map(len, parts)), self.rank, self.ranks)
        return torch.stack(list(parts)).nanmean(0)

    def waiting(self, parts: Sequence[WeightedIndices]) -> WeightedIndices:
        """Collect this process's part of the rows that wait to be trained on.

        Args:
            parts: rows that wait in each of the former processes, in order of the ranks.

        Returns:
            Rows under their present numbers. All processes together have all of them, each once.
        """
        weight = torch.cat([part.weights() for part in parts])
        if not self.divided:
            index = torch.cat([part.index for part in parts])
            return WeightedIndices(index[self.rank :: self.ranks], weight[self.rank :: self.ranks])
        index = torch.cat([part.index * len(parts) + former for former, part in enumerate(parts)])
        own = index % self.ranks == self.rank
        return WeightedIndices(index[own] // self.ranks, weight[own])
