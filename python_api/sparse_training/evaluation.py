"""Forward passes of any model, and evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def evaluation_statistics(model: nn.Module, kind: type[nn.Module] = nn.Module) -> Iterator[None]:
    """Context in which submodules are in evaluation mode; afterwards each has its own training flag again.

    BatchNorm then uses its running statistics without updating them, and dropout draws nothing. Flags are set directly,
    not through ``eval()``, because a submodule frozen by hand must be frozen afterwards too.

    Args:
        model: the model.
        kind: type of the submodules concerned. Default ``torch.nn.Module``: all of them.
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
    """Run the model on inputs of any structure.

    Args:
        model: the model.
        inputs: a tensor, or a tuple, list or mapping of arguments.

    Returns:
        The output, or its attribute ``logits`` where it has one.
    """
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    elif isinstance(inputs, (tuple, list)):
        output = model(*inputs)
    else:
        output = model(inputs)
    logits: Tensor = getattr(output, "logits", output)
    return logits


def unwrap(model: nn.Module) -> nn.Module:
    """Module inside wrappers of torch.compile and DistributedDataParallel."""
    while (inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None)) is not None:
        model = inner
    return model
