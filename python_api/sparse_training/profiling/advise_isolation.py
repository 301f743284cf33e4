"""Copies to measure with: training on them changes nothing of the user's model, optimizer, data or generators."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import IterableDataset

from sparse_training.criterion import Loss
from sparse_training.data.loader import Loader
from sparse_training.data.stream import StreamLoader
from sparse_training.errors import UserError
from sparse_training.generators import (
    generator_state,
    own_generators,
    rng_state,
    set_generator_state,
    set_rng_state,
)
from sparse_training.training.step import OptimizerFactory


class Copies(NamedTuple):
    """A user's parts, copied so that they can be trained.

    Attributes:
        model: copy of the model.
        optimizer: copy of the optimizer over the copy's parameters; a factory, or None, as given.
        loss: copy of the loss.
        loader: the data, in a copy with its own position; the data set is the user's.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | OptimizerFactory | None
    loss: Loss
    loader: Iterable[Any]


@contextmanager
def copied(
    model: nn.Module,
    loader: Iterable[Any],
    loss: Loss,
    optimizer: torch.optim.Optimizer | OptimizerFactory | None,
    device: torch.device,
) -> Iterator[Copies]:
    """Context with copies of a user's parts; afterwards every generator and gradient is as it was before.

    Generators, global ones and those that the parts hold, are used in place and set back. Gradients of the user's own
    parameters are put aside meanwhile, for a loss may reach the model by a closure.

    Args:
        model: the model.
        loader: a ``Loader``, a DataLoader, or any iterable of batches.
        loss: the loss.
        optimizer: an optimizer, a factory of one, or None.
        device: device that the model trains on.

    Raises:
        UserError: the model, the loss or the optimizer cannot be copied.
    """
    found = (own_generators(part) for part in (model, loader, loss, optimizer))
    shared = {id(generator): generator for generators in found for generator in generators.values()}
    states = [(generator, generator_state(generator)) for generator in shared.values()]
    everywhere = rng_state(device)
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        twins = _deep_copy((model, optimizer if isinstance(optimizer, torch.optim.Optimizer) else None, loss), shared)
        twin, own, criterion = twins
        with torch.inference_mode(False), torch.enable_grad():
            yield Copies(twin, optimizer if own is None else own, criterion, _fresh(loader, shared))
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for generator, state in states:
            set_generator_state(generator, state)
        set_rng_state(everywhere, device)


def _deep_copy(parts: tuple[Any, ...], shared: dict[int, Any]) -> tuple[Any, ...]:
    try:
        return copy.deepcopy(parts, dict(shared))
    except Exception as error:  # each part of a model that has no copy raises its own kind
        reason = " ".join(str(error).split())
        raise UserError(
            f"the model, its loss and its optimizer must be copyable by copy.deepcopy, for copies are trained here: "
            f"{type(error).__name__}: {reason}"
        ) from error


def _fresh(data: Any, shared: dict[int, Any]) -> Any:
    """Copy an iterable of batches, so that its position is another one; its data set is shared.

    A DataLoader's samplers are copied whole, since they may keep their place in attributes. Its persistent workers
    stay the user's, and the copy starts its own.
    """
    if not hasattr(data, "__dict__") or isinstance(data, type):
        return data
    twin = copy.copy(data)
    if isinstance(twin, StreamLoader):
        twin.source = _fresh(twin.source, shared)
    if isinstance(twin, Loader):
        return twin
    held = vars(twin)
    dataset = held.get("dataset")
    if isinstance(dataset, IterableDataset):
        held["dataset"] = copy.copy(dataset)
    if "_iterator" in held:
        held["_iterator"] = None
    memo = {**shared, **_datasets(dataset)}
    for name in ("sampler", "batch_sampler"):
        if held.get(name) is not None:
            try:
                held[name] = copy.deepcopy(held[name], memo)
            except Exception:  # what it holds has no copy; its own attributes have
                held[name] = copy.copy(held[name])
    return twin


def _datasets(dataset: Any) -> dict[int, Any]:
    """Return a data set and those inside it, by identity: a sampler that refers to them copies none."""
    found: dict[int, Any] = {}
    while dataset is not None and id(dataset) not in found:
        found[id(dataset)] = dataset
        dataset = getattr(dataset, "dataset", None)
    return found


def endless(loader: Loader) -> Iterator[tuple[Any, bool]]:
    """Yield items of a loader, pass after pass, with True for the first one of a pass.

    A stream's own passes are not counted: ``set_epoch`` would change the data set, which is the user's.

    Args:
        loader: the loader, a copy.

    Raises:
        UserError: a pass without an item.
    """
    source: Iterable[Any] = loader.source if isinstance(loader, StreamLoader) else loader
    while True:
        first = True
        for item in source:
            yield item, first
            first = False
        if first:
            raise UserError("`loader` must yield at least one batch, and again when iterated again; it yielded none")
