"""Draws by past scores for a plain ``DataLoader``: what is not drawn is neither read nor decoded.

sampler = HistorySampler(len(dataset), batch_size=128, rate=0.3)
loader = DataLoader(Indexed(dataset), batch_sampler=sampler, num_workers=2)
for index, (inputs, targets) in loader:
    losses = criterion(model(inputs), targets)  # one a row
    (losses * sampler.weights(index)).mean().backward()
    sampler.update(index, losses)

With ``method="adaptive"`` rows are drawn as the trainer's default policy draws them, there are no weights, and
``sampler.update(index, losses, logits)`` tells it what it wants to know.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import Dataset, IterableDataset, Sampler

from sparse_training.errors import UserError
from sparse_training.samplers.adaptive_weights import SamplingWeights
from sparse_training.samplers.importance import Importance
from sparse_training.samplers.infobatch import InfoBatch
from sparse_training.samplers.score_table import ScoreTable
from sparse_training.samplers.shuffle import Shuffle
from sparse_training.selection.types import WeightedIndices

METHODS = ("importance", "infobatch", "adaptive")
_BLOCK = 1 << 20


class Indexed(Dataset[tuple[int, Any]]):
    """A data set whose items come with their row numbers: (index, item).

    Raises:
        UserError: an iterable data set, which has no rows to ask for by number.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset
        self.rows = rows_of(dataset)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[int, Any]]:
        """A batch at once, where the data set can (DataLoader asks for it)."""
        fetch = getattr(self.dataset, "__getitems__", None)
        items = fetch(indices) if callable(fetch) else [self.dataset[index] for index in indices]
        return list(zip(indices, items, strict=True))


class HistorySampler(Sampler[list[int]]):
    """A batch sampler by what training last made of rows, for ``DataLoader(..., batch_sampler=sampler)``.

    Draws are made ahead of training by as many batches as the loader prefetches, from the scores known by
    then. The weights are those of the draw. ``update`` says which batches were trained on; the state
    holds those that were drawn and not yet trained on, and after ``load_state_dict`` an epoch goes on with
    them, so that with the same number of workers every later batch is what it would have been.

    With several processes each has the rows rank, rank + num_replicas, ... and remembers them alone:
    nothing is exchanged but, for ``infobatch``, the number of batches at the start of an epoch, which all
    processes must reach together. All of them give the same number of batches. Gradients averaged
    over the processes, as DistributedDataParallel does, are as unbiased as on one.

    Args:
        dataset: with a length, or that length.
        batch_size: rows in a batch of this process.
        method: "importance": an epoch is ``rate`` of the rows, drawn by their scores, after a first
            pass over all of them; see ``history.Importance``. "infobatch": an epoch is every row that is
            not dropped; see ``history.InfoBatch``. "adaptive": an epoch is ``rate`` of the rows, each as often as
            it is worth; see ``worth.SamplingWeights``. All weights are 1.
        rate: for importance and adaptive, rows of an epoch by rows of the data set, in (0, 1].
        uniform, prune: of the first two laws.
        epochs: how many there will be. For infobatch the last 1 - ``delta`` of them are dense, for adaptive every class
            is drawn equally often in the last 40% of the run. None: none is, and with infobatch training should end
            with some that are; classes are never balanced.
        targets: for adaptive: int64 [rows], the class of every row of the data set, whatever this process's are; None,
            or anything else that is one a row, where there are none: then labels that seem wrong and classes count
            for nothing.
        duplicate_counts: for adaptive: int64 [rows], how many rows of the data set have the same inputs as each, itself
            included, so that they share one row's draws; None where that is unknown.
        seed: with the epoch or the step it determines what is drawn. The same on every process.
        rank, num_replicas: by default those of torch.distributed, where it is initialised.
        drop_last: leave out an epoch's short last batch, on a single process.

    Raises:
        UserError: an iterable data set, or an argument out of range.
    """

    def __init__(
        self,
        dataset: Sized | int,
        batch_size: int,
        *,
        method: str = "importance",
        rate: float = 1.0,
        uniform: float = 0.1,
        prune: float = 0.5,
        epochs: int | None = None,
        delta: float = 0.875,
        targets: Tensor | Sequence[Any] | None = None,
        duplicate_counts: Tensor | Sequence[int] | None = None,
        seed: int = 0,
        rank: int | None = None,
        num_replicas: int | None = None,
        drop_last: bool = False,
    ) -> None:
        self.size = dataset if isinstance(dataset, int) else rows_of(dataset)
        connected = dist.is_available() and dist.is_initialized()
        self.replicas = num_replicas if num_replicas is not None else dist.get_world_size() if connected else 1
        self.rank = rank if rank is not None else dist.get_rank() if connected else 0
        if not 0 <= self.rank < self.replicas <= self.size:
            raise UserError(f"rank {self.rank} of {self.replicas} over {self.size} rows: wanted a row a process")
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: wanted at least 1")
        if method not in METHODS:
            raise UserError(f"method {method!r}: wanted one of {', '.join(METHODS)}")
        if method == "infobatch" and self.replicas > 1 and not connected:
            raise UserError("infobatch on several processes: wanted torch.distributed, to agree on an epoch's batches")
        if not 0.0 < rate <= 1.0:
            raise UserError(f"rate {rate}: wanted more than 0 and at most 1")
        if epochs is not None and epochs < 1:
            raise UserError(f"epochs {epochs}: wanted at least 1, or None")
        self.batch_size, self.rate, self.seed, self.drop_last = batch_size, rate, seed, drop_last
        self.epochs, self.dense_from = epochs, None if epochs is None else round(delta * epochs)
        self.rows = -(-(self.size - self.rank) // self.replicas)  # of this process
        # The mean over processes of each one's mean is that over all rows once shards count by their size.
        self._share = 1.0 if method == "adaptive" else self.replicas * self.rows / self.size
        seed = seed * self.replicas + self.rank
        self.law: Importance | InfoBatch | SamplingWeights
        if method == "adaptive":
            own, alike = self._own("targets", targets), self._own("duplicate_counts", duplicate_counts)
            self.law = SamplingWeights(self.rows, own, alike, seed=seed)
        elif targets is not None or duplicate_counts is not None:
            raise UserError(f"targets or duplicate_counts with the method {method}: wanted them for adaptive alone")
        else:
            table = ScoreTable(self.rows)
            self.law = (
                Importance(table, seed=seed, uniform=uniform)
                if method == "importance"
                else InfoBatch(table, seed=seed, prune=prune)
            )
        self._pending: deque[WeightedIndices] = deque()  # drawn, not yet trained on, oldest first
        self._begin(0)

    def _own(self, name: str, given: Tensor | Sequence[Any] | None) -> Tensor | None:
        """Of what is given for every row of the data set, this process's part."""
        if given is None:
            return None
        if len(given) != self.size:
            raise UserError(f"{name} of {len(given)} rows: wanted one for each of the data set's {self.size}")
        return torch.as_tensor(given)[self.rank :: self.replicas]

    @property
    def table(self) -> ScoreTable:
        """The scores of this process's rows: row i is number rank + i * num_replicas. Not of ``adaptive``."""
        if isinstance(self.law, SamplingWeights):
            raise UserError("the method adaptive has no table of scores; see law.probability")
        return self.law.table

    # --- drawing --------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """The number of the epoch that the next iteration gives, as for DistributedSampler."""
        if epoch != self.epoch:
            self._begin(epoch)

    def _begin(self, epoch: int) -> None:
        self.epoch = epoch
        self._drawn = 0  # batches of this epoch
        self._total: int | None = None  # batches that it has, once they are counted
        self._order = Shuffle(self.rows, self.law.seed, epoch)  # of infobatch
        self._pending.clear()
        self._restored = False

    def __len__(self) -> int:
        """Batches of the epoch, the same on every process.

        For infobatch this reads the whole table once an epoch, and waits for the other processes.
        """
        if self._total is None:
            self._total = self._count_batches()
        return self._total

    def __iter__(self) -> Iterator[list[int]]:
        if self._restored:
            self._restored = False
            for drawn in tuple(self._pending):
                yield drawn.index.tolist()
        else:
            finished = self._total is not None and self._drawn >= self._total
            self._begin(self.epoch + 1 if finished else self.epoch)
        while self._drawn < len(self):
            local = self._draw()
            drawn = WeightedIndices(local.index * self.replicas + self.rank, local.weights() * self._share)
            self._drawn += 1
            self._pending.append(drawn)
            yield drawn.index.tolist()

    def _draw(self) -> WeightedIndices:
        """The next batch, of rows of the table."""
        if not isinstance(self.law, InfoBatch):
            count = min(self.batch_size, self._epoch_rows() - self._drawn * self.batch_size)
            if isinstance(self.law, Importance):
                return self.law.draw(count)
            # Without epochs nothing is known of the progress: never late enough to balance.
            progress = 0.0 if self.epochs is None else (self.epoch + self._drawn / len(self)) / self.epochs
            return WeightedIndices(self.law.draw(count, progress), torch.ones(count))
        parts: list[WeightedIndices] = []
        missing = self.batch_size
        while missing:
            ahead = self._order.peek()[:missing]
            if not len(ahead):
                if self.replicas == 1:
                    break
                self._order.position = 0  # rows again, as DistributedSampler: no process may end early
            self._order.position += len(ahead)
            parts.append(self._kept(ahead))
            missing -= len(parts[-1].index)
        index, weight = (torch.cat(found) for found in zip(*parts, strict=True))
        return WeightedIndices(index, weight)

    def _kept(self, rows: Tensor) -> WeightedIndices:
        """Of an InfoBatch epoch."""
        assert isinstance(self.law, InfoBatch)
        if self.dense_from is not None and self.epoch >= self.dense_from:
            return WeightedIndices(rows, torch.ones(len(rows)))
        return self.law.prune(rows, self.epoch)

    def _epoch_rows(self) -> int:
        """Rows in an epoch of importance or adaptive draws, equal on every process."""
        return max(1, round(self.rate * -(-self.size // self.replicas)))

    def _count_batches(self) -> int:
        if not isinstance(self.law, InfoBatch):
            rows = self._epoch_rows()
        else:
            begins = range(0, self.rows, _BLOCK)
            blocks = (torch.arange(begin, min(begin + _BLOCK, self.rows)) for begin in begins)
            rows = sum(len(self._kept(block).index) for block in blocks)
        whole = self.drop_last and self.replicas == 1 and rows >= self.batch_size
        batches = rows // self.batch_size if whole else -(-rows // self.batch_size)
        if isinstance(self.law, InfoBatch) and self.replicas > 1:
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            most = torch.tensor(batches, device=device)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            batches = int(most)
        return batches

    # --- training -------------------------------------------------------------------------------

    def weights(self, index: Tensor) -> Tensor:
        """float32 [n], where ``index`` is: what each row of a drawn batch counts, on average 1.

        Raises:
            UserError: it is not a batch that was drawn in this epoch and not yet given to ``update``.
        """
        rows = index.cpu()
        for drawn in self._pending:
            if torch.equal(drawn.index, rows):
                return drawn.weights().to(index.device)
        raise UserError("weights of a batch that is not under way: wanted the index of one, before its update")

    def update(self, index: Tensor, scores: Tensor, logits: Tensor | None = None) -> None:
        """Enter the scores of rows, such as their losses; of a drawn batch, which then counts as trained on.

        Args:
            index: int64 [n], rows of the data set that are this process's.
            scores: [n]; see ``ScoreTable.update``. For adaptive the losses, cross-entropies where there are no logits.
            logits: [n, classes], the model's, for adaptive: without them no label seems wrong.

        Raises:
            UserError: rows of another process, or tensors that do not fit one another; IndexError: a row that there
                is not.
        """
        rows = index.cpu()
        if ((rows - self.rank) % self.replicas).any():
            raise UserError(f"rows of another process: wanted those that are {self.rank} modulo {self.replicas}")
        own = (rows - self.rank) // self.replicas
        if isinstance(self.law, SamplingWeights):
            self.law.update(own, scores, logits)
        else:
            self.table.update(own, scores)
        for place, drawn in enumerate(self._pending):
            if torch.equal(drawn.index, rows):
                del self._pending[place]
                break

    # --- state ----------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """What must agree for one state to be the continuation of another."""
        return {
            "rows": self.size,
            "processes": self.replicas,
            "rank": self.rank,
            "batch size": self.batch_size,
            "law": "adaptive" if isinstance(self.law, SamplingWeights) else type(self.law).__name__.lower(),
            "rate": self.rate,
            "seed": self.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors; what is known of rows is what is in use, not a copy. One for each process."""
        return {
            "settings": self._settings(),
            "table": None if isinstance(self.law, SamplingWeights) else self.table.state_dict(),
            "law": self.law.state_dict(),
            "epoch": self.epoch,
            "drawn": self._drawn,
            "total": self._total,
            "position": self._order.position,
            "pending": [tuple(drawn) for drawn in self._pending],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration goes on with the epoch in ``state``, of the number ``epoch``.

        Raises:
            UserError: a state of other data, another rank or other settings.
        """
        settings = self._settings()
        if differing := [name for name, value in settings.items() if state["settings"].get(name) != value]:
            said = ", ".join(f"{name} {state['settings'].get(name)} is now {settings[name]}" for name in differing)
            raise UserError(f"the sampler's state was made with other settings: {said}")
        self._begin(int(state["epoch"]))
        if state["table"] is not None:
            self.table.load_state_dict(state["table"])
        self.law.load_state_dict(state["law"])
        self._drawn, self._total, self._order.position = state["drawn"], state["total"], state["position"]
        self._pending.extend(WeightedIndices(index, weight) for index, weight in state["pending"])
        self._restored = True


def rows_of(dataset: Any) -> int:
    """The length of a data set whose rows can be asked for by number.

    Raises:
        UserError: it is iterable, or has no length.
    """
    if isinstance(dataset, IterableDataset):
        raise UserError(
            f"{type(dataset).__name__} is an IterableDataset: its rows come in its own order and cannot be asked for "
            "by number, so none can be left unread; wanted a map-style data set"
        )
    if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        raise UserError(f"{type(dataset).__name__} has no length or no rows by number: wanted a map-style data set")
    return len(dataset)
