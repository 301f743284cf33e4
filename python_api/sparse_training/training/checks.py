"""Checks of what a trainer is given: models, optimizers and the arguments of a run."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.data import Dataset

from sparse_training.arguments import check_count
from sparse_training.criterion import Criterion
from sparse_training.errors import UserError
from sparse_training.user_code import name_of


def check_model(model: Any) -> None:
    """Refuse what is no module, or has parameters without values.

    Raises:
        UserError: no module, parameters on the meta device, or such as inference mode makes.
    """
    if not isinstance(model, nn.Module):
        given = f"the class {name_of(model)}; make it" if isinstance(model, type) else type(model).__name__
        raise UserError(f"`model` must be a torch.nn.Module, got {given}")
    for name, parameter in model.named_parameters():
        if not is_lazy(parameter) and parameter.is_meta:
            raise UserError(
                f"the model's {name} is on the meta device and has no values; give a model whose weights are loaded, "
                "or initialised after to_empty()"
            )
        if not is_lazy(parameter) and parameter.is_inference():
            raise UserError(f"the model's {name} was made in inference mode and has no gradient; make it outside")


def check_trains(model: nn.Module, optimizer: torch.optim.Optimizer | None, loss: Any) -> None:
    """Refuse to train where no optimizer step would change the model, or the loss's own parameters stay behind.

    Args:
        model: the model.
        optimizer: its optimizer; None where it is not made yet.
        loss: the loss or its ``Criterion``.

    Raises:
        UserError: the model is frozen or has parameters without a size, the optimizer is of other parameters, or the
            loss has parameters of its own.
    """
    own = {id(parameter) for parameter in model.parameters()}
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("`model` must have a parameter that requires a gradient, got none")
    if lazy := [name for name, parameter in model.named_parameters() if is_lazy(parameter)]:
        raise UserError(f"the model's {lazy[0]} has no size yet; call the model with some rows before")
    if optimizer is not None:
        check_optimizer(optimizer, model)
    loss = loss.loss if isinstance(loss, Criterion) else loss
    learned = loss.parameters() if isinstance(loss, nn.Module) else ()
    if any(parameter.requires_grad and id(parameter) not in own for parameter in learned):
        raise UserError(
            f"the loss {name_of(loss)} has parameters of its own, which no checkpoint and no other process would have; "
            "make it a submodule of the model, or freeze them by loss.requires_grad_(False)"
        )


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Refuse an optimizer that cannot train the model.

    Raises:
        UserError: it is none, its step needs a closure, or it holds no parameter of the model's.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"`optimizer` must be an optimizer or a factory of one, got {type(optimizer).__name__}")
    # Of the class: a scheduler puts a function of its own in the object's place.
    of_step = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    needed = [
        of.name for of in of_step if of.default is of.empty and of.kind not in (of.VAR_POSITIONAL, of.VAR_KEYWORD)
    ]
    if needed:
        raise UserError(
            f"`optimizer` must be one whose step needs no argument, got {type(optimizer).__name__}, whose step needs "
            f"a {needed[0]}; use SGD or AdamW, for example"
        )
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise UserError("`optimizer` must be of the model's parameters, got one of none of them")


def check_accumulation(optimizer: Any, accumulate: int) -> None:
    """Refuse an optimizer of Accelerate's that was prepared for another number of batches than makes a step here.

    Raises:
        UserError: it was.
    """
    batches = getattr(getattr(optimizer, "gradient_state", None), "num_steps", 1)
    if batches not in (1, accumulate):
        raise UserError(
            f"the Accelerator of `optimizer` has gradient_accumulation_steps={batches}, which is of its own loop; give "
            f"TrainerSettings(accumulate={batches}), got {accumulate}"
        )


def left_out(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """Say which parameters that require a gradient an optimizer does not hold; None where it holds all.

    Raises:
        UserError: it holds others in their place, as of a layer that was replaced.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = [name for name, parameter in trainable.items() if id(parameter) not in held]
    if not missing:
        return None
    said = f"{missing[0]} and {len(missing) - 1} more" if len(missing) > 1 else missing[0]
    if others := len(held - {id(parameter) for parameter in model.parameters()}):
        raise UserError(
            f"`optimizer` must hold the model's parameters, got one without {said}, and with {others} that are not the "
            "model's; make it after the model's last change"
        )
    return (
        f"the optimizer holds {len(trainable) - len(missing)} of the model's {len(trainable)} parameters that require "
        f"a gradient, and leaves out {said}"
    )


def check_batches(data: Any, given: str = "the data") -> None:
    """Refuse data that cannot be iterated by batches.

    Args:
        data: the data.
        given: its name, for the message. Default "the data".

    Raises:
        UserError: a data set, whose items are rows, or what is not iterable.
    """
    if isinstance(data, Iterable):
        return
    name = type(data).__name__
    if isinstance(data, Dataset):
        raise UserError(f"{given} must be an iterable of batches, got a {name}; give a DataLoader of it")
    hint = "; call it, and give what it returns in a list or a class with __iter__" if callable(data) else ""
    raise UserError(f"{given} must be an iterable of batches, got {name}{hint}")


def check_run(
    *,
    evaluations: Any,
    checkpoint: Any,
    checkpoint_interval: Any,
    resume: Any,
    stop: Any,
    callbacks: Any,
    cost_budget: Any,
    meter: Any,
) -> None:
    """Refuse arguments of ``fit`` that are out of range or would have no effect; they have its names.

    Raises:
        UserError: one is.
    """
    check_count("evaluations", evaluations)
    if not isinstance(resume, bool):
        raise UserError(f"`resume` must be True or False, got {resume!r}; the folder is `checkpoint`")
    if checkpoint is None and resume:
        raise UserError("`resume` needs `checkpoint`, the folder of the checkpoint to go on with, got none")
    if checkpoint is None and checkpoint_interval is not None:
        raise UserError("`checkpoint_interval` needs `checkpoint`, the folder of the checkpoints, got none")
    if checkpoint_interval is not None:
        check_count("checkpoint_interval", checkpoint_interval)
    if stop is not None and not callable(stop):
        raise UserError(f"`stop` must be a function that tells whether to stop, or None, got {stop!r}")
    if cost_budget is not None and not (isinstance(cost_budget, tuple | list) and len(cost_budget) == 2):
        raise UserError(f'`cost_budget` must be a cost and its unit, such as (60.0, "seconds"), got {cost_budget!r}')
    if meter is not None and not all(hasattr(meter, name) for name in ("source", "start", "stop")):
        raise UserError(f"`meter` must have a source, start() and stop(), as Meter has, got {type(meter).__name__}")
    if not isinstance(callbacks, Iterable):
        raise UserError(f"`callbacks` must be a sequence of callbacks, got {type(callbacks).__name__}")
