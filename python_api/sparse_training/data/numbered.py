"""Loader of a DataLoader whose rows a policy chooses before they are read."""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from sparse_kernels.trees import map_rows
from sparse_training.data.loader import Choose, options_of
from sparse_training.data.stream import CPU, StreamLoader
from sparse_training.errors import UserError
from sparse_training.generators import rng_state, set_rng_state
from sparse_training.selection.types import Batch, CandidateIndices, WeightedIndices

_END = object()


class NumberedLoader(StreamLoader):
    """Loader of a map-style DataLoader that knows the number of every row, and reads those alone that are chosen.

    The DataLoader's own sampler gives the order and its own workers and collate function the batches; the DataLoader
    itself is not changed. An item is a batch that it would have given. The rows of an item are chosen when the workers
    are sent for them, as far ahead of training as they prefetch, and an item of which nothing is kept is empty.

    On resume, the batches of the epoch that were already used are read again and skipped, as in ``StreamLoader``, and
    those that were drawn and not yet used are the same.

    Args:
        source: the DataLoader; see ``unnumbered_reason``.
        inputs: function from a batch to the model's inputs. Default: see ``StreamLoader``.
        targets: function from a batch to its targets. Default: see ``StreamLoader``.
        device: PyTorch device to move batches to. Default "cpu".

    Attributes:
        batch_size: number of rows in a batch; None where the batch sampler is the user's own.
    """

    def __init__(
        self,
        source: DataLoader[Any],
        *,
        inputs: Callable[[Any], Any] | None = None,
        targets: Callable[[Any], Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.draws = Draws(source.batch_sampler, len(source.dataset))  # type: ignore[arg-type]
        super().__init__(_rebuilt(source, self.draws), inputs=inputs, targets=targets, device=device)
        self.size = self.draws.rows
        self.batch_size = None if self.draws.together else self.draws.batch_sampler.batch_size
        # Of the global generators, before the batch was read that is held while empty items come before it.
        self._ahead: dict[str, Any] | None = None
        self._row: Any = None  # inputs and targets of a loaded row, for the structure of an empty batch

    def options(self) -> dict[str, Any]:
        """Return what decides the rows of the DataLoader's own batches, as plain values."""
        return options_of(self.draws.batch_sampler)

    def draw_by(self, choose: Choose) -> None:
        """Choose the rows of items that are drawn from now on by a policy's ``choose``."""
        self.draws.choose = choose

    def choose(self, item: Any, choose: Choose) -> WeightedIndices | None:
        """Return None: rows were chosen when they were drawn."""
        return None

    def __iter__(self) -> Iterator[Item]:
        draws = self.draws
        used = sum(len(drawn.index) > 0 for drawn in draws.drawn[: self.position])
        draws.before_next = (used, self._ahead)
        source = self.rest_of_epoch(used, ahead=self._ahead is not None)
        for batch in itertools.chain(source, (_END,)):
            if batch is not _END:
                self._ahead = draws.generators
                self._check(batch)
            while self.position < len(draws.drawn):
                drawn = draws.drawn[self.position]
                if len(drawn.index) and batch is _END:
                    break  # not here yet
                self.position += 1
                if len(drawn.index):
                    item, batch, self._ahead = Item(drawn, batch), _END, None
                else:
                    item = Item(drawn, None)
                yield item
        if not self.position:
            raise UserError("the data yielded no batch; it must be an iterable that can be iterated again")
        self.epoch, self.position = self.epoch + 1, 0
        draws.begin(self.epoch)

    def _check(self, batch: Any) -> None:
        """Give up numbers, for the rest of the run, where a batch has not the rows that were asked for."""
        draws = self.draws
        drawn = next(drawn for drawn in draws.drawn[self.position :] if len(drawn.index))
        targets = self._targets_of(batch)
        if self._row is None:
            self._row = map_rows((self.inputs(batch), targets), _first_row, targets.shape[0])
        if not draws.numbered or targets.shape[0] == len(drawn.index):
            return
        reason = f"the collate function made {targets.shape[0]} rows of {len(drawn.index)}"
        if not bool((drawn.weights() == 1.0).all()):
            raise UserError(f'{reason}, so rows cannot be told apart; use policy="dense"')
        draws.numbered = False
        warnings.warn(f"every row is trained on from now on, because {reason}", stacklevel=2)

    def offer(self, item: Any) -> CandidateIndices:
        """Return the row numbers of an item."""
        if not isinstance(item, Item):  # of ``probe``
            return super().offer(item)
        return CandidateIndices(item.drawn.offered, self.epoch)

    def load(self, item: Any, choice: WeightedIndices | None = None) -> Batch:
        """Move an item's rows to the device, with the weights that they were drawn with."""
        if not isinstance(item, Item):  # of ``probe``
            return super().load(item, choice)
        drawn, loaded = item
        offered = len(drawn.offered)
        if loaded is None:
            inputs, targets = map_rows(self._row, _no_row, 1) if self._row is not None else (torch.empty(0),) * 2
        else:
            inputs, targets = self.inputs(loaded), self._targets_of(loaded)
        if targets.shape[0] != len(drawn.index):  # ``_check`` saw that none of them has a weight
            return self.to_device(inputs, targets, None)
        batch = self.to_device(inputs, targets, drawn.weight)
        if not self.draws.numbered:
            return batch._replace(offered=offered)
        return batch._replace(ids=drawn.index.to(self.device, non_blocking=True), offered=offered)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of a stream, and the draws of the epoch."""
        return {**super().state_dict(), "ahead": self._ahead, "draws": self.draws.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``.

        Raises:
            UserError: the state is of another kind of data.
        """
        if "draws" not in state:
            raise UserError("the checkpoint was made on data whose rows had no numbers")
        super().load_state_dict(state)
        self._ahead = state["ahead"]
        self.draws.load_state_dict(state["draws"], self.epoch)

    def load_rank_states(self, states: Sequence[Mapping[str, Any]], batches: int | None) -> None:
        """Continue from the states of another number of processes, at the end of an epoch.

        Raises:
            UserError: the epoch has not ended, whose draws are each process's own.
        """
        if any("draws" not in state for state in states):
            raise UserError("the checkpoint was made on data whose rows had no numbers")
        if states[0]["position"] not in (0, batches):
            raise UserError(
                "an epoch whose rows were chosen before loading cannot go on with another number of processes; use a "
                "checkpoint from the end of an epoch (`checkpoint_interval`)"
            )
        super().load_rank_states(states, batches)
        self._ahead = None
        self.draws.begin(self.epoch)
        self.draws.numbered = all(state["draws"]["numbered"] for state in states)


class Drawn(NamedTuple):
    """Rows drawn for an item.

    Attributes:
        offered: int64 [B], the rows that the DataLoader would have given.
        index: int64 [n], the rows to train on.
        weight: float32 [n], their importance weights; None for 1.
    """

    offered: Tensor
    index: Tensor  # type: ignore[assignment]  # shadows a tuple's method that nobody calls here
    weight: Tensor | None

    def weights(self) -> Tensor:
        """Importance weights as a tensor: ones where ``weight`` is None."""
        return WeightedIndices(self.index, self.weight).weights()


class Item(NamedTuple):
    """An item of a NumberedLoader.

    Attributes:
        drawn: the rows drawn for it.
        loaded: their batch, as the collate function made it; None for no rows.
    """

    drawn: Drawn
    loaded: Any


class Draws:
    """Batch sampler that asks a policy which rows of another one's batches to load.

    Args:
        given: the batch sampler of the user's DataLoader.
        rows: number of rows of its data set.

    Attributes:
        together: True where rows make batches with the rows of their own batch alone.
        choose: the policy's choice of rows; None for all rows.
        drawn: rows of the items of this epoch that were drawn so far.
        generators: states of the global generators before the last batch is read; None where no empty item precedes it.
        before_next: of an epoch that is continued, how many batches were used, and the states of the global generators
            before the next one was read; None where it was not.
        numbered: False once rows turned out to have no numbers.
    """

    # ``drawn`` apart: a search for the generators of samplers goes through the other attributes.
    __slots__ = ("__dict__", "drawn")

    def __init__(self, given: Any, rows: int) -> None:
        self.batch_sampler, self.rows = given, rows
        self.together = type(given) is not BatchSampler
        self.choose: Choose | None = None
        self.numbered = True
        self.generators: dict[str, Any] | None = None
        self.before_next: tuple[int, dict[str, Any] | None] = (0, None)
        self.begin(0)

    def begin(self, epoch: int) -> None:
        """Begin an epoch."""
        self.epoch = epoch
        self.drawn: list[Drawn] = []

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[list[int]]:
        place = 0
        known = tuple(self.drawn)  # of an epoch that is continued
        read, (used, before) = 0, self.before_next
        for number, ids in enumerate(self._offered()):
            if number >= len(known):
                self.drawn.append(self._draw(ids, place))
            elif not torch.equal(known[number].offered, ids):
                raise UserError("the DataLoader's sampler gives another order than before the checkpoint")
            place += len(ids)
            if len(index := self.drawn[number].index):
                after_empty = number > 0 and not len(self.drawn[number - 1].index)
                if read == used and before is not None:
                    set_rng_state(before, CPU)  # here: the sampler's order is drawn before, from the epoch's start
                self.generators = rng_state(CPU) if after_empty else None
                read += 1
                yield index.tolist()

    def _offered(self) -> list[Tensor]:
        """Rows of the epoch's batches, all at once, so that a sampler draws what it draws at the epoch's start."""
        count = len(self.batch_sampler)
        # One more than there are: some samplers draw from their generator once more at their end.
        batches = [list(batch) for batch in itertools.islice(self.batch_sampler, count + 1)][:count]
        rows = [row for batch in batches for row in batch]
        wrong = next((row for row in rows if not _is_row(row, self.rows)), None)
        if wrong is not None:
            raise UserError(
                f"the DataLoader's sampler must give row numbers from 0 to {self.rows - 1}, got {wrong!r}; use "
                'policy="dense"'
            )
        numbers = torch.tensor([int(row) for row in rows], dtype=torch.int64, device="cpu")
        return list(torch.split(numbers, [len(batch) for batch in batches]))

    def _draw(self, ids: Tensor, place: int) -> Drawn:
        choice = None
        if self.choose is not None and self.numbered:
            places = torch.arange(place, place + len(ids), device="cpu")
            choice = self.choose(CandidateIndices(ids, self.epoch, places, self.together))
        return Drawn(ids, ids, None) if choice is None else Drawn(ids, *choice)

    def state_dict(self) -> dict[str, Any]:
        """The draws of the epoch, end to end."""
        empty = torch.empty(0, dtype=torch.int64, device="cpu")
        return {
            "offered": torch.cat([empty, *(drawn.offered for drawn in self.drawn)]),
            "index": torch.cat([empty, *(drawn.index for drawn in self.drawn)]),
            "weight": torch.cat(
                [torch.empty(0, dtype=torch.float32, device="cpu"), *(drawn.weights() for drawn in self.drawn)]
            ),
            "rows": [(len(drawn.offered), len(drawn.index), drawn.weight is not None) for drawn in self.drawn],
            "numbered": self.numbered,
        }

    def load_state_dict(self, state: Mapping[str, Any], epoch: int) -> None:
        """Continue an epoch from a state of ``state_dict``."""
        self.begin(epoch)
        self.numbered = bool(state["numbered"])
        offered, index, weight = (state[name].cpu() for name in ("offered", "index", "weight"))
        for many, kept, weighted in state["rows"]:
            self.drawn.append(Drawn(offered[:many], index[:kept], weight[:kept] if weighted else None))
            offered, index, weight = offered[many:], index[kept:], weight[kept:]


def _is_row(row: Any, rows: int) -> bool:
    try:
        return 0 <= operator.index(row) < rows
    except TypeError:
        return False


def _first_row(rows: Any) -> Any:
    return rows[:1]


def _no_row(rows: Any) -> Any:
    return rows[:0]


def _rebuilt(source: DataLoader[Any], draws: Draws) -> DataLoader[Any]:
    """Make a DataLoader like another one, with another batch sampler."""
    workers = source.num_workers > 0
    pin_to = getattr(source, "pin_memory_device", "")  # deprecated, and gone from later versions
    others: dict[str, Any] = {"pin_memory_device": pin_to} if pin_to else {}
    return DataLoader(
        source.dataset,
        batch_sampler=draws,
        num_workers=source.num_workers,
        collate_fn=source.collate_fn,
        pin_memory=source.pin_memory,
        timeout=source.timeout,
        worker_init_fn=source.worker_init_fn,
        multiprocessing_context=source.multiprocessing_context if workers else None,
        generator=source.generator,
        prefetch_factor=source.prefetch_factor if workers else None,
        persistent_workers=source.persistent_workers,
        **others,
    )
