"""A model's forward pass, and its modules in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def evaluation_statistics(model: nn.Module, kind: type[nn.Module] = nn.Module) -> Iterator[None]:
    """Submodules of ``kind`` as they are in evaluation, each one's own training flag back afterwards.

    BatchNorm then reads its running statistics and leaves them alone, and dropout draws nothing. Flags
    are set directly, not through ``eval()``: a submodule frozen by hand must be frozen afterwards too.
    """
    live = [module for module in model.modules() if module.training and isinstance(module, kind)]
    for module in live:
        module.training = False
    try:
        yield
    finally:
        for module in live:
            module.training = True


def forward(model: nn.Module, inputs: Any) -> Tensor:
    """The model's logits for inputs of any structure, from an output that is a tensor or has ``logits``."""
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    elif isinstance(inputs, (tuple, list)):
        output = model(*inputs)
    else:
        output = model(inputs)
    logits: Tensor = getattr(output, "logits", output)
    return logits


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside what wraps it for compilation or for several ranks."""
    while (inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None)) is not None:
        model = inner
    return model
