"""A batch sampler by past scores for a plain ``DataLoader``: rows that are not drawn are neither read nor decoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import Sampler

from sparse_training.announcements import announce
from sparse_training.arguments import check_choice, check_count, check_fraction, check_integer, check_number
from sparse_training.errors import UserError
from sparse_training.ranks import gather_numbers, rank_and_world_size
from sparse_training.samplers.adaptive_weights import BALANCE_FROM, SamplingWeights
from sparse_training.samplers.checks import check_effect, check_needs, row_numbers
from sparse_training.samplers.importance import Importance
from sparse_training.samplers.indexed import Indexed, rows_of
from sparse_training.samplers.infobatch import InfoBatch, no_rows, whole_batch
from sparse_training.samplers.resharding import check_ranks, resharded
from sparse_training.samplers.score_table import ScoreTable
from sparse_training.samplers.shuffle import Shuffle
from sparse_training.selection.types import WeightedIndices
from sparse_training.user_code import described, explained

__all__ = ["METHODS", "HistorySampler", "Indexed"]

METHODS = ("importance", "infobatch", "adaptive")
_BLOCK = 1 << 20


class HistorySampler(Sampler[list[int]]):
    """Draws batches by the last scores of their rows, for ``DataLoader(..., batch_sampler=sampler)``.

    Batches are drawn ahead of training, as many as the loader prefetches, from the scores known by then. The weights
    are those of the draw. ``update`` says which batches were trained on. The state holds those that were drawn and
    not yet trained on, and after ``load_state_dict`` an epoch continues with them: with the same number of workers
    every later batch is what it would have been.

    With several processes each has the rows rank, rank + num_replicas, ... and remembers them alone. Nothing is
    exchanged but, for "infobatch", the number of batches at the start of an epoch, which all processes must reach
    together. All of them give the same number of batches. Gradients averaged over the processes, as
    DistributedDataParallel does, are as unbiased as on one.

    Args:
        dataset: data set with a length, or that length.
        batch_size: number of rows in a batch of this process, at least 1.
        method: "importance" (the default): an epoch is ``rate`` of the rows, drawn in proportion to their scores,
            after a first pass over all of them; see ``Importance``. "infobatch": an epoch is every row that is not
            pruned; see ``InfoBatch``. "adaptive": an epoch is ``rate`` of the rows, drawn by the switches that are on,
            all with weight 1; see ``AdaptivePolicy`` for what each assumes.
        rate: rows of an epoch by rows of the data set, for "importance" and "adaptive", in (0, 1]. Default 1.
        uniform: share of draws that ignore the scores, for "importance", in (0, 1]. Default 0.1.
        prune: probability of leaving out a well-learned row, for "infobatch", in [0, 1). Default 0.5.
        epochs: number of epochs of the run. With it the last 1 - ``delta`` of them have every row for "infobatch";
            ``balance`` needs it, and acts in the last 40% of the run. None (the default): training with "infobatch"
            should end with epochs of every row.
        delta: fraction of the epochs that are pruned, for "infobatch", in [0, 1]. Default 0.875.
        denoise: for "adaptive", draw rows with suspected label errors rarely; needs ``targets``. Default False.
        deduplicate: for "adaptive", let duplicates share one row's draws; needs ``duplicate_counts``. Default False.
        balance: for "adaptive", draw classes equally often late in the run; needs ``targets`` and ``epochs``. Default
            False.
        targets: class of every row of the data set, whatever this process's rows are, for ``denoise`` and ``balance``:
            integers [rows], at least 0. Default None.
        duplicate_counts: number of rows of the data set that have the same inputs as each, itself included, for
            ``deduplicate``: int64 [rows]. Default None.
        seed: seed of the draws, the same on every process. Default 0.
        rank: number of this process; None (the default) for the one of torch.distributed, or 0.
        num_replicas: number of processes; None (the default) for the one of torch.distributed, or 1.
        drop_last: leave out an epoch's short last batch, on a single process. Default False.

    Raises:
        UserError: the data set is iterable, or an argument is out of range.

    Example:
        >>> sampler = HistorySampler(dataset, batch_size=128, rate=0.3)
        >>> loader = DataLoader(Indexed(dataset), batch_sampler=sampler, num_workers=2)
        >>> for index, (inputs, targets) in loader:
        ...     losses = cross_entropy(model(inputs), targets, reduction="none")
        ...     (losses * sampler.weights(index)).mean().backward()
        ...     sampler.update(index, losses)
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
        denoise: bool = False,
        deduplicate: bool = False,
        balance: bool = False,
        targets: Tensor | Sequence[Any] | None = None,
        duplicate_counts: Tensor | Sequence[int] | None = None,
        seed: int = 0,
        rank: int | None = None,
        num_replicas: int | None = None,
        drop_last: bool = False,
    ) -> None:
        self.size = dataset if isinstance(dataset, int) else rows_of(dataset)
        connected = dist.is_available() and dist.is_initialized()
        own_rank, ranks = rank_and_world_size()
        self._processes = ranks if num_replicas is None and rank is None else None  # None: the caller's word
        self.replicas = ranks if num_replicas is None else num_replicas
        self.rank = own_rank if rank is None else rank
        if not 0 <= self.rank < self.replicas <= self.size:
            raise UserError(
                f"each process must have a row, got rank {self.rank} of {self.replicas} for {self.size} rows"
            )
        batch_size, seed = check_count("batch_size", batch_size), check_integer("seed", seed)
        check_choice("method", method, METHODS)
        if method == "infobatch" and self.replicas > 1 and not connected:
            raise UserError(
                "infobatch on several processes needs torch.distributed to agree on an epoch's batches; "
                "call torch.distributed.init_process_group first"
            )
        check_fraction("rate", rate)
        check_number("delta", delta, "in [0, 1]", lambda x: 0 <= x <= 1)
        if epochs is not None:
            check_count("epochs", epochs)
        check_effect(
            method, HistorySampler.__init__, {"rate": rate, "uniform": uniform, "prune": prune, "delta": delta}
        )
        switches = {"denoise": denoise, "deduplicate": deduplicate, "balance": balance}
        self.switches = tuple(name for name, on in switches.items() if on)
        check_needs(method, self.switches, targets=targets, duplicate_counts=duplicate_counts, epochs=epochs)
        self.method, self.batch_size, self.rate, self.seed, self.drop_last = method, batch_size, rate, seed, drop_last
        self.epochs, self.dense_from = epochs, None if epochs is None else round(delta * epochs)
        self.rows = -(-(self.size - self.rank) // self.replicas)  # of this process
        # The mean over processes of each one's mean is that over all rows once shards count by their size.
        self._share = 1.0 if method == "adaptive" else self.replicas * self.rows / self.size
        seed = seed * self.replicas + self.rank
        self.sampler: Importance | InfoBatch | SamplingWeights
        if method == "adaptive":
            classes, duplicates = self._own("targets", targets), self._own("duplicate_counts", duplicate_counts)
            self.sampler = SamplingWeights(
                self.rows,
                classes,
                duplicates,
                denoise=denoise,
                balance_from=BALANCE_FROM if balance else None,
                seed=seed,
            )
            self._announce()
        elif method == "importance":
            self.sampler = Importance(ScoreTable(self.rows), seed=seed, uniform=uniform)
        else:
            self.sampler = InfoBatch(ScoreTable(self.rows), seed=seed, prune=prune)
        self._pending: deque[WeightedIndices] = deque()  # drawn, not yet trained on, oldest first
        self._begin(0)

    def _own(self, name: str, values: Tensor | Sequence[Any] | None) -> Tensor | None:
        """This process's part of values given for every row of the data set."""
        if values is None:
            return None
        if len(values) != self.size:
            raise UserError(f"`{name}` must have one entry for each of {self.size} rows, got {len(values)}")
        with explained(lambda: f"`{name}` must be numbers, one for each row"):
            own = torch.as_tensor(values, device="cpu")[self.rank :: self.replicas]
        if name == "duplicate_counts" and not bool((own >= 1).all()):
            raise UserError(f"`{name}` must count each row itself, at least 1, got {own.min().item()}")
        return own

    @property
    def table(self) -> ScoreTable:
        """Scores of this process's rows; row i has number rank + i * num_replicas.

        Raises:
            UserError: the method is "adaptive", which has no scores.
        """
        if isinstance(self.sampler, SamplingWeights):
            raise UserError("the method adaptive has no table of scores; use sampler.probability")
        return self.sampler.table

    # --- drawing --------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch that the next iteration gives, as for DistributedSampler.

        Args:
            epoch: number of the epoch, from 0.
        """
        if check_integer("epoch", epoch) != self.epoch:
            self._begin(epoch)

    def _begin(self, epoch: int) -> None:
        self.epoch = epoch
        self._drawn = 0  # batches of this epoch
        self._total: int | None = None  # batches that it has, once they are counted
        self._order = Shuffle(self.rows, self.sampler.seed, epoch)  # of infobatch
        self._pending.clear()
        self._restored = False

    def __len__(self) -> int:
        """Number of batches of the epoch, the same on every process.

        For "infobatch" this reads the whole table once an epoch, and waits for the other processes.
        """
        if self._total is None:
            self._total = self._count_batches()
        return self._total

    def __iter__(self) -> Iterator[list[int]]:
        now = rank_and_world_size()[1]
        if self._processes is not None and now != self._processes:  # each would have the rows of all
            raise UserError(
                f"the sampler was made for {self._processes} process(es), and torch.distributed now has {now}; make it "
                "once they are connected (under Lightning in train_dataloader), or give rank= and num_replicas="
            )
        if not self._restored:  # here, not at the first batch: the length may be asked for before that
            finished = self._total is not None and self._drawn >= self._total
            self._begin(self.epoch + 1 if finished else self.epoch)
        return self._batches()

    def _batches(self) -> Iterator[list[int]]:
        """The batches of the epoch; of a restored one the rest of them."""
        if self._restored:
            self._restored = False
            for drawn in tuple(self._pending):
                yield drawn.index.tolist()
        while self._drawn < len(self):
            local = self._draw()
            drawn = WeightedIndices(local.index * self.replicas + self.rank, local.weights() * self._share)
            self._drawn += 1
            self._pending.append(drawn)
            yield drawn.index.tolist()

    def _draw(self) -> WeightedIndices:
        """Draw the next batch, of rows of this process."""
        if isinstance(self.sampler, InfoBatch):
            drawn = self._draw_kept()
            self._announce()
            return drawn
        count = min(self.batch_size, self._epoch_rows() - self._drawn * self.batch_size)
        if isinstance(self.sampler, Importance):
            return self.sampler.draw(count)
        # Without epochs the progress is unknown: never late enough to balance.
        progress = 0.0 if self.epochs is None else (self.epoch + self._drawn / len(self)) / self.epochs
        rows = self.sampler.draw(count, progress)
        self._announce()
        return WeightedIndices(rows, torch.ones(count, dtype=torch.float32, device="cpu"))

    def _announce(self) -> None:
        """Print what the sampler has begun to do."""
        if not isinstance(self.sampler, Importance):
            for sentence in self.sampler.take_news():
                announce(sentence)

    def _draw_kept(self) -> WeightedIndices:
        """Draw the next batch of an InfoBatch epoch: no more rows are looked at than it needs."""
        batch, waiting = no_rows(), no_rows()
        while not len(batch.index):
            ahead = self._order.peek()[: self.batch_size - len(waiting.index)]
            if not len(ahead):
                if self.replicas == 1:
                    return waiting
                self._order.position = 0  # rows again, as DistributedSampler: no process may end early
            self._order.position += len(ahead)
            batch, waiting = whole_batch(waiting, self._kept(ahead), self.batch_size)
        return batch

    def _kept(self, rows: Tensor) -> WeightedIndices:
        """Rows that an InfoBatch epoch keeps."""
        assert isinstance(self.sampler, InfoBatch)
        if self.dense_from is not None and self.epoch >= self.dense_from:
            return WeightedIndices(rows, torch.ones(len(rows), dtype=torch.float32, device="cpu"))
        return self.sampler.prune(rows, self.epoch)

    def _epoch_rows(self) -> int:
        """Number of rows in an epoch of importance or adaptive draws, equal on every process."""
        return max(1, round(self.rate * -(-self.size // self.replicas)))

    def _count_batches(self) -> int:
        if not isinstance(self.sampler, InfoBatch):
            rows = self._epoch_rows()
        else:
            begins = range(0, self.rows, _BLOCK)
            blocks = (torch.arange(begin, min(begin + _BLOCK, self.rows), device="cpu") for begin in begins)
            rows = sum(len(self._kept(block).index) for block in blocks)
        whole = self.drop_last and self.replicas == 1 and rows >= self.batch_size
        batches = rows // self.batch_size if whole else -(-rows // self.batch_size)
        if isinstance(self.sampler, InfoBatch) and self.replicas > 1:
            batches = int(gather_numbers(batches).max())
        return batches

    # --- training -------------------------------------------------------------------------------

    def weights(self, index: Tensor) -> Tensor:
        """Importance weights (1/p) of the rows of a drawn batch, on average 1.

        Args:
            index: row numbers of the batch, int64 [n], as the loader gave them; a list or an array serves as well.

        Returns:
            float32 [n], on the device of ``index``.

        Raises:
            UserError: the batch was not drawn in this epoch, or was given to ``update`` already.
        """
        rows = row_numbers(index)
        for drawn in self._pending:
            if torch.equal(drawn.index, rows):
                return drawn.weights().to(index.device if isinstance(index, Tensor) else "cpu")
        raise UserError(
            "weights() of a batch that is not under way; call it with a drawn batch's index, before update()"
        )

    def update(self, index: Tensor, scores: Tensor, logits: Tensor | None = None) -> None:
        """Enter the scores of rows, such as their losses. If they are a drawn batch, it counts as trained on.

        Args:
            index: row numbers in the data set, int64 or int32 [n], all of this process.
            scores: scores of the rows, [n]; see ``ScoreTable.update``. For "adaptive" the losses, which must be
                cross-entropies where there are no logits.
            logits: the model's class logits, [n, classes], which ``denoise`` needs. Default None.

        Raises:
            UserError: rows of another process, tensors that do not fit one another, or of the wrong dtype.
            IndexError: there is no such row.
        """
        rows = row_numbers(index)
        if ((rows - self.rank) % self.replicas).any():
            raise UserError(
                f"rows of another process: `index` must hold numbers that are {self.rank} modulo {self.replicas}"
            )
        own = (rows - self.rank) // self.replicas
        if isinstance(self.sampler, SamplingWeights):
            self.sampler.update(own, scores, logits)
        else:
            self.table.update(own, scores)
        for place, drawn in enumerate(self._pending):
            if torch.equal(drawn.index, rows):
                del self._pending[place]
                break

    # --- state ----------------------------------------------------------------------------------

    def _acts_as_formerly(self) -> bool:
        """Tell whether the switches are those that "adaptive" had by itself for the same arguments."""
        assert isinstance(self.sampler, SamplingWeights)
        former = []
        if self.sampler.targets is not None:
            former.append("denoise")
        if self.sampler.duplicate_weight is not None:
            former.append("deduplicate")
        if self.sampler.targets is not None and self.epochs is not None:
            former.append("balance")
        return self.switches == tuple(former)

    def _settings(self) -> dict[str, Any]:
        """Settings that must agree for one state to be the continuation of another, under their names on disk."""
        return {
            "rows": self.size,
            "processes": self.replicas,
            "rank": self.rank,
            "batch size": self.batch_size,
            "law": "+".join((self.method, *self.switches)),
            "rate": self.rate,
            "seed": self.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, of this process alone; the tensors are those in use, not copies."""
        return {
            "settings": self._settings(),
            "table": None if isinstance(self.sampler, SamplingWeights) else self.table.state_dict(),
            "law": self.sampler.state_dict(),
            "epoch": self.epoch,
            "drawn": self._drawn,
            "total": self._total,
            "position": self._order.position,
            "pending": [tuple(drawn) for drawn in self._pending],
        }

    def load_rank_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue from the states of all processes of a run, of as many processes as now or of another number.

        The scores go to the processes that have their rows now. With another number, batches that were drawn and not
        trained on are drawn anew, and the draws are others than they would have been; they are as unbiased. An epoch
        of "infobatch" must have ended; states of "adaptive" fit their own number of processes alone.

        Args:
            states: states of ``state_dict``, one of each process, in any order.

        Raises:
            UserError: a state is missing, or they are of other data or settings, or of different moments.
        """
        ordered = check_ranks(states)
        if len(ordered) == self.replicas:
            self.load_state_dict(ordered[self.rank])
        else:
            self.load_state_dict(resharded(ordered, self.rank, self.replicas))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state: the next iteration goes on with its epoch, of the number ``epoch``.

        Args:
            state: a state of ``state_dict``.

        Raises:
            UserError: the state is of other data, another rank or other settings.
        """
        settings = self._settings()
        if not isinstance(state, Mapping) or not {"settings", "epoch", "table", "law", "pending"} <= set(state):
            raise UserError(f"the state must be one of a HistorySampler's state_dict(), got {described(state)}")
        if state["settings"].get("law") == "adaptive" and self._acts_as_formerly():
            settings["law"] = "adaptive"
        if differing := [name for name, value in settings.items() if state["settings"].get(name) != value]:
            changes = ", ".join(
                f"{'method' if name == 'law' else name} {state['settings'].get(name)} is now {settings[name]}"
                for name in differing
            )
            raise UserError(f"the sampler's state was made with other settings: {changes}")
        self._begin(int(state["epoch"]))
        if state["table"] is not None:
            self.table.load_state_dict(state["table"])
        self.sampler.load_state_dict(state["law"])
        self._drawn, self._total, self._order.position = state["drawn"], state["total"], state["position"]
        self._pending.extend(WeightedIndices(index, weight) for index, weight in state["pending"])
        self._restored = True
