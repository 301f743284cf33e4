"""Training and evaluation modes of a model's modules, and of an optimizer, while the model is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def recorded_gradients() -> Iterator[None]:
    """Context in which autograd records, even where the caller is in ``no_grad`` or inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def training_mode(model: nn.Module, parallel: nn.Module) -> Iterator[None]:
    """Train a model that is in evaluation mode, and give each module its own mode back afterwards.

    A model whose root is in evaluation mode, as ``from_pretrained`` leaves it, is put in training mode whole. In one
    whose root is in training mode, submodules in evaluation mode were frozen by hand and stay frozen.

    Args:
        model: the model.
        parallel: the model as it is wrapped for several processes, or the model itself.
    """
    modes = [(module, module.training) for module in {*model.modules(), *parallel.modules()}]
    if not model.training:
        model.train()
    if parallel is not model:
        parallel.training = True
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class OptimizerModes:
    """Modes of an optimizer that has ``train()`` and ``eval()``, as schedule-free ones do; others have none.

    Such an optimizer trains other weights than those to evaluate and keep, and puts either into the model.

    Args:
        optimizer: the optimizer.

    Attributes:
        training: True while the weights to train are in the model.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.training = optimizer, False
        self._has_modes = all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))

    def set(self, *, training: bool) -> None:
        """Put the optimizer into training or evaluation mode."""
        self.training = training
        if self._has_modes:
            optimizer: Any = self.optimizer
            optimizer.train() if training else optimizer.eval()

    @contextmanager
    def during(self, *, training: bool) -> Iterator[None]:
        """Context in which the optimizer is in a mode; afterwards it is in the one before."""
        before = self.training
        self.set(training=training)
        try:
            yield
        finally:
            self.set(training=before)
