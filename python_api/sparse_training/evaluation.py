"""Forward passes of any model, and evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sparse_training.errors import UserError
from sparse_training.user_code import described, explained, name_of


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


def forward(model: nn.Module, inputs: Any, criterion: Any = None, **named: Any) -> Any:
    """Run the model on inputs of any structure.

    Args:
        model: the model.
        inputs: a tensor, or a tuple, list or mapping of arguments.
        criterion: the loss, whose function ``outputs`` finds the logits, where it has one. Default None.
        **named: further arguments of the model.

    Returns:
        The logits. Without a function that finds them: the output, or what it has as ``logits``.

    Raises:
        UserError: the model cannot take the inputs, the function cannot take the output, or the output has logits of
            auxiliary classifiers beside its own.
    """
    with explained(lambda: f"the model {name_of(unwrap(model))} cannot take inputs {described(inputs)}"):
        output = call(model, inputs, **named)
    find = getattr(criterion, "outputs", None)
    if find is None:
        return logits_of(output)
    with explained(lambda: f"the criterion's `outputs` cannot take the model's output, {described(output)}"):
        return find(output)


def call(model: nn.Module, inputs: Any, **named: Any) -> Any:
    """Return the model's output, as it is, for inputs of any structure and further arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs, **named)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs, **named)
    return model(inputs, **named)


def logits_of(output: Any) -> Any:
    """Return what a model's output has as ``logits``; an output without is returned as it is.

    Raises:
        UserError: the output has logits of auxiliary classifiers beside its own.
    """
    if isinstance(output, Tensor):
        return output
    fields = output if isinstance(output, Mapping) else _fields(output)
    if "logits" not in fields:
        return getattr(output, "logits", output)
    auxiliary = [name for name, value in fields.items() if str(name).startswith("aux_logits") and value is not None]
    if auxiliary:  # torchvision's Inception and GoogLeNet, in training alone
        raise UserError(
            f"the model's output, a {type(output).__name__}, has {', '.join(auxiliary)} beside the logits, which no "
            "loss would see; give loss=Criterion(loss, outputs=...) for all of them, or make the model with "
            "aux_logits=False"
        )
    return fields["logits"]


def _fields(output: Any) -> dict[str, Any]:
    """Return a named tuple's or dataclass's parts by name; nothing of other objects."""
    names = getattr(output, "_fields", None) or getattr(output, "__dataclass_fields__", None) or ()
    return {name: getattr(output, name) for name in names}


def unwrap(model: nn.Module) -> nn.Module:
    """Module inside wrappers of torch.compile and DistributedDataParallel."""
    while (inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None)) is not None:
        model = inner
    return model
