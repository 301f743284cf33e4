"""Loader of any iterable of batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparse_kernels.trees import rows_at
from sparse_training.data.loader import Loader, options_of
from sparse_training.devices import find
from sparse_training.errors import UserError
from sparse_training.generators import (
    generator_state,
    own_generators,
    rng_state,
    set_generator_state,
    set_rng_state,
)
from sparse_training.selection.types import Batch, CandidateIndices, WeightedIndices
from sparse_training.user_code import described, explained

CPU = torch.device("cpu")
TARGET_KEYS = ("labels", "label", "targets", "target", "y")


class StreamLoader(Loader):
    """Loader of any iterable of batches, such as a DataLoader; every batch is loaded whole.

    Whatever has a ``set_epoch`` receives the epoch's number: the iterable, its sampler and batch sampler, samplers in
    them, and its data set. On resume, the batches of the epoch that were already used are drawn again and skipped. For
    that all generators begin as they did at the epoch's start: the global ones of torch, ``random`` and NumPy, and
    those that the iterable and its parts hold, such as a DataLoader's ``generator``.

    Args:
        batches: iterable of tuples (inputs..., targets), or of mappings with the targets under one of
            ``TARGET_KEYS``: "labels", "label", "targets", "target", "y".
        inputs: function from a batch of any other structure to the model's inputs. Default: all but the targets.
        targets: function from such a batch to its targets. Default: the last of a tuple, or the mapping's targets.
        device: PyTorch device to move batches to. Default "cpu".

    Raises:
        UserError: no iterable, no function, or no such device.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        inputs: Callable[[Any], Any] | None = None,
        targets: Callable[[Any], Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        for name, function in (("inputs", inputs), ("targets", targets)):
            if not (function is None or callable(function)):
                raise UserError(f"`{name}` must be a function of a batch, or None, got {function!r}")
        if not isinstance(batches, Iterable):
            raise UserError(f"`batches` must be an iterable of batches, got {type(batches).__name__}")
        self.source = batches
        self.inputs = inputs or default_inputs
        self.targets = targets or default_targets
        self.device = find(device)
        self._epoch_rng: Any = None  # states of generators when the epoch began; of version 0.1.0: torch's alone
        self._own_rng: Mapping[str, Any] | None = None  # of a checkpoint, until the next iteration

    def batches(self) -> int | None:
        """Return the number of batches in an epoch; None for data without a length."""
        return _length(self.source)

    def options(self) -> dict[str, Any]:
        """Return what decides the rows of the iterable's batches, as plain values."""
        return options_of(self.source)

    def data_rows(self) -> int | None:
        """Return the number of rows of a DataLoader's data set; None where it has no length."""
        return _length(getattr(self.source, "dataset", None))

    def __iter__(self) -> Iterator[Any]:
        for batch in self.rest_of_epoch(self.position):
            self.position += 1
            yield batch
        if not self.position:
            raise UserError("the data yielded no batch; it must be an iterable that can be iterated again")
        self.epoch, self.position = self.epoch + 1, 0

    def rest_of_epoch(self, used: int, *, ahead: bool = False) -> Iterator[Any]:
        """Begin or continue an epoch.

        Args:
            used: number of the epoch's batches that were already used.
            ahead: True if the next batch was read, too. Default False.

        Returns:
            The batches that follow, their generators where they were.
        """
        for part in _epoch_parts(self.source):
            part.set_epoch(self.epoch)
        if self.position and self._epoch_rng is not None:
            source = self._replayed(used, ahead)
        else:
            self._set_own(self._own_rng)
            self._epoch_rng = {**rng_state(CPU), "own": self._own_states()}
            source = itertools.islice(self.source, used, None)  # used: by another number of processes
        self._own_rng = None
        return source

    def _own_states(self) -> dict[str, Any]:
        return {path: generator_state(generator) for path, generator in own_generators(self.source).items()}

    def _set_own(self, states: Mapping[str, Any] | None) -> None:
        """Set the generators that the iterable and its parts hold; None for states that were not saved."""
        if states is None:
            return
        own = own_generators(self.source)
        if own.keys() != states.keys():
            changes = ", ".join(sorted(own.keys() ^ states.keys()))
            raise UserError(f"the training data must have the checkpoint's random generators, got others: {changes}")
        for path, generator in own.items():
            set_generator_state(generator, states[path])

    def _replayed(self, used: int, ahead: bool) -> Iterator[Any]:
        """Iterate from the epoch's start, past the batches already used; the global generators stay as they are."""
        now, began = rng_state(CPU), self._epoch_rng
        if isinstance(began, Tensor):
            torch.set_rng_state(began.cpu())
        else:
            set_rng_state(began, CPU)
            self._set_own(began["own"])
        source = iter(self.source)
        for _ in range(used):
            next(source, None)
        read = [next(source)] if ahead else []
        set_rng_state(now, CPU)
        self._set_own(self._own_rng)  # an evaluation on the same data may have drawn from them too
        return itertools.chain(read, source)

    def check_resumable(self) -> None:
        """Refuse data that a checkpoint cannot be continued with bit for bit.

        Raises:
            UserError: a DataLoader with persistent workers, whose generators no checkpoint can hold.
        """
        if getattr(self.source, "persistent_workers", False) and getattr(self.source, "num_workers", 0):
            raise UserError(
                "`checkpoint` needs a DataLoader with persistent_workers=False: the generators of persistent workers "
                "go on from epoch to epoch, and no checkpoint can hold them"
            )

    def offer(self, item: Any) -> CandidateIndices:
        """Return the positions of an item's rows in the batch."""
        return CandidateIndices(torch.arange(self._targets_of(item).shape[0], device=CPU), self.epoch)

    def _targets_of(self, item: Any) -> Tensor:
        targets: Any = self.targets(item)
        if isinstance(targets, Tensor) and targets.ndim == 0:
            raise UserError(
                "the targets of a batch must have a row each, got one number; give batches, such as a DataLoader's "
                "with a batch_size"
            )
        if not isinstance(targets, Tensor):
            raise UserError(
                f"the targets of a batch must be one tensor, got a {type(targets).__name__}; give "
                "TrainerSettings(targets=...), a function that makes a tensor of them"
            )
        return targets

    def load(self, item: Any, choice: WeightedIndices | None = None) -> Batch:
        """Move an item to the device, or the rows of it that were chosen."""
        parts = (self.inputs(item), self._targets_of(item))
        offered = parts[1].shape[0]
        if choice is not None:
            with explained(lambda: f"rows of a batch of {described(parts[0])} cannot be selected"):
                parts = rows_at(parts, choice.index, offered)
        return self.to_device(*parts, None if choice is None else choice.weight)._replace(offered=offered)

    def to_device(self, inputs: Any, targets: Tensor, weight: Tensor | None) -> Batch:
        """Move the parts of a batch without numbers to the device."""

        def move(part: Any) -> Any:
            if isinstance(part, Tensor):
                return part.to(self.device, non_blocking=True)
            if isinstance(part, Mapping):  # one that pytree does not open, such as a tokenizer's BatchEncoding
                return {name: pytree.tree_map(move, value) for name, value in part.items()}
            return part

        with explained(lambda: f"a batch of {described(inputs)} and {described(targets)} cannot be on {self.device}"):
            inputs, targets, weight = pytree.tree_map(move, (inputs, targets, weight))
        return Batch(inputs, targets, None, targets.shape[0], weight)

    def probe(self) -> Iterator[Any]:
        """Yield batches without end, for timing.

        Raises:
            UserError: the data is a one-shot iterator.
        """
        if isinstance(self.source, Iterator):
            raise UserError("a one-shot iterator cannot be timed beforehand; use a DataLoader, or a budget of steps=")
        while True:
            yield from self.source

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the generators' states at the epoch's start and now, for a checkpoint."""
        return {**super().state_dict(), "epoch_rng": self._epoch_rng, "own_rng": self._own_states()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        super().load_state_dict(state)
        self._epoch_rng, self._own_rng = state.get("epoch_rng"), state.get("own_rng")

    def load_rank_states(self, states: Sequence[Mapping[str, Any]], batches: int | None) -> None:
        """Continue from the states of another number of processes; generators of the data's own stay as they are."""
        super().load_rank_states(states, batches)
        self._epoch_rng = self._own_rng = None


def _length(data: Any) -> int | None:
    if not isinstance(data, Sized):
        return None
    try:
        return len(data)
    except TypeError:  # a DataLoader over an iterable data set has a __len__ that raises
        return None


def _epoch_parts(source: Any) -> list[Any]:
    """Return the distinct parts of an iterable of batches, itself included, that have a ``set_epoch``."""
    found: list[Any] = []
    seen: set[int] = set()
    parts = [source]
    while parts:
        part = parts.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        if callable(getattr(part, "set_epoch", None)):
            found.append(part)
        parts += [getattr(part, name, None) for name in ("dataset", "batch_sampler", "sampler")]
    return found


def default_inputs(batch: Any) -> Any:
    """Return all of a batch but its targets; of a pair, the first element itself.

    Raises:
        UserError: a batch that is neither a sequence of at least two elements nor a mapping with targets.
    """
    if isinstance(batch, Mapping):
        key = _target_key(batch)
        return {name: value for name, value in batch.items() if name != key}
    if isinstance(batch, Sequence) and len(batch) >= 2:
        return batch[0] if len(batch) == 2 else tuple(batch[:-1])
    raise _unknown_structure(batch)


def default_targets(batch: Any) -> Any:
    """Return the last element of a sequence, or a mapping's value under one of ``TARGET_KEYS``.

    Raises:
        UserError: a batch that is neither a sequence of at least two elements nor a mapping with targets.
    """
    if isinstance(batch, Mapping):
        return batch[_target_key(batch)]
    if isinstance(batch, Sequence) and len(batch) >= 2:
        return batch[-1]
    raise _unknown_structure(batch)


def _unknown_structure(batch: Any) -> UserError:
    return UserError(
        f"a batch must be (inputs, targets) or a mapping, got {type(batch).__name__}; "
        "give inputs= and targets= to take them from it"
    )


def _target_key(batch: Mapping[str, Any]) -> str:
    for key in TARGET_KEYS:
        if key in batch:
            return key
    raise UserError(
        f"a batch must have one of the keys {', '.join(TARGET_KEYS)}, got {', '.join(map(str, batch))}; "
        "give targets= to take the targets from it"
    )
