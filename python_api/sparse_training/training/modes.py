"""Training and evaluation modes of a model's modules while it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
