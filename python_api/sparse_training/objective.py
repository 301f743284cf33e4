"""The model's own loss, which says what its outputs predict: the targets at their places, or the next tokens'."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_training.criterion import Criterion, targets_are_classes
from sparse_training.errors import UserError
from sparse_training.evaluation import call, forward, unwrap

TOLERANCE = 1e-4  # relative; besides what the loss's own type resolves


def own_loss(model: nn.Module, inputs: Any, targets: Tensor) -> Tensor | None:
    """Compute the mean loss that a model computes itself of targets given as ``labels``, as Transformers' models do.

    Args:
        model: the model.
        inputs: a tensor, or a tuple, list or mapping of arguments.
        targets: the targets.

    Returns:
        The loss, one element; None where the model computes none of such targets.
    """
    inner = without_wrappers(model)
    try:
        parameters = inspect.signature(inner.forward).parameters
    except (TypeError, ValueError):
        return None
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    if "labels" not in parameters and not takes_all:
        return None
    try:
        with torch.compiler.set_stance("force_eager"):  # no second program for one batch
            output = call(model, inputs, labels=targets)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError, NotImplementedError):
        return None  # without the labels the model runs: they are not what its loss takes
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None and isinstance(output, (tuple, list)) and output:
        loss = output[0] if isinstance(output[0], Tensor) and output[0].ndim == 0 else None
    if not isinstance(loss, Tensor) or not loss.is_floating_point() or not loss.numel():
        return None
    return loss.detach().mean()  # a DataParallel model returns one for each device


def without_wrappers(model: nn.Module) -> nn.Module:
    """Module inside wrappers of torch.compile, DistributedDataParallel and PEFT."""
    inner = unwrap(model)
    base = getattr(inner, "get_base_model", None)
    return base() if callable(base) else inner


def check_inputs(model: nn.Module, inputs: Any) -> None:
    """Refuse inputs that a model would take for something else than they are.

    Those are labels among the inputs of a tuple, whose last element alone is the targets; and inputs from which an
    encoder-decoder model of Transformers would make its decoder's inputs wrongly.

    Args:
        model: the model.
        inputs: a batch's inputs, without the targets.

    Raises:
        UserError: an input is the model's `labels`, or the decoder's inputs are not among them.
    """
    if isinstance(inputs, tuple) and (place := _place_of_labels(model)) < len(inputs):
        raise UserError(
            f"element {place} of a batch is the model's `labels`, and the last one, of {len(inputs) + 1}, is taken for "
            "the targets; give TrainerSettings(inputs=..., targets=...) to say which is which"
        )
    if not isinstance(inputs, Mapping) or not hasattr(without_wrappers(model), "prepare_decoder_input_ids_from_labels"):
        return
    if not {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys():
        raise UserError(
            f"batches of a {type(without_wrappers(model)).__name__} must have decoder_input_ids, got "
            f"{', '.join(map(str, inputs))}; DataCollatorForSeq2Seq(tokenizer, model=model) makes them of the labels"
        )


def _place_of_labels(model: nn.Module) -> float:
    """Return the place of an optional argument for labels among a model's arguments, from 0; infinity without one."""
    try:
        parameters = list(inspect.signature(without_wrappers(model).forward).parameters.values())
    except (TypeError, ValueError):
        return math.inf
    places = (place for place, of in enumerate(parameters) if of.name in ("labels", "label") and of.default is None)
    return next(places, math.inf)


def agrees(value: Tensor, loss: Tensor) -> bool:
    """Tell whether a loss that was computed anew is the model's own, to rounding."""
    precision = TOLERANCE + torch.finfo(loss.dtype).eps
    return bool((value.double() - loss.double()).abs() <= precision * loss.double().abs() + 1e-7)


def settle(criterion: Criterion, model: nn.Module, inputs: Any, targets: Tensor) -> bool:
    """Make the loss the model's own, where no other was given, by one batch: set ``criterion.shift``.

    Args:
        criterion: the loss; its ``shift`` is None as long as nothing decided it.
        model: the model, in evaluation mode.
        inputs: the batch's inputs.
        targets: the batch's targets.

    Returns:
        True where it is decided; False where this batch says nothing, and the next one must be asked.

    Raises:
        UserError: the model's own loss is not the mean over the rows, or nothing tells how outputs and targets pair.
    """
    if criterion.shift is not None or (loss := own_loss(model, inputs, targets)) is None:
        return True
    logits = forward(model, inputs, criterion)
    sequences = isinstance(logits, Tensor) and targets.ndim == 2 and targets_are_classes(logits, targets)
    if not (criterion.is_default or sequences):
        return True
    if not bool(loss.isfinite()):  # no row counts
        return False
    means = _means(criterion, logits, targets)
    fitting = [shift for shift, mean in means.items() if agrees(mean, loss)]
    if len(fitting) > 1:  # as of a head of zeros
        raise UserError(
            f"the model's own loss, {loss:.4f}, is that of each token's own target and that of the next one; give "
            "loss=Criterion(shift=True) for next tokens, or shift=False"
        )
    if not fitting:
        return _without_agreement(criterion, loss, means, sequences=sequences)
    if fitting == [True] and not criterion.is_known:
        raise UserError(
            f"the model's own loss, {loss:.4f}, compares each token's output with the next token; give "
            "loss=Criterion(loss, shift=True) to pair the loss's arguments so, or shift=False where it does itself"
        )
    criterion.shift = fitting[0]
    return True


def _means(criterion: Criterion, logits: Any, targets: Tensor) -> dict[bool, Tensor]:
    """Compute the mean cross-entropy of the targets that count, as they are and shifted, where it can be."""
    found: dict[bool, Tensor] = {}
    if not isinstance(logits, Tensor):
        return found
    of_tokens = targets_are_classes(logits, targets) and targets.ndim > 1 and targets.shape[1] > 1
    for shift in (False, True) if of_tokens else (False,):
        pairing = Criterion(class_dim=criterion.class_dim, shift=shift)
        try:
            outputs, labels = pairing.aligned(logits.float(), targets)
            if targets_are_classes(outputs, labels):
                outputs = outputs.movedim(pairing.classes_in(outputs, labels), 1)
            found[shift] = F.cross_entropy(outputs, labels, ignore_index=criterion.ignore_index)
        except (RuntimeError, IndexError, UserError):  # targets of another kind
            continue
    return found


def _without_agreement(criterion: Criterion, loss: Tensor, means: Mapping[bool, Tensor], *, sequences: bool) -> bool:
    if not criterion.is_default and not sequences:
        return True
    ours = f"is {means[False]:.4f}" if False in means else "cannot be computed"
    shifted = f", {means[True]:.4f} with the next tokens" if True in means else ""
    give = "loss= to say what to train on" if criterion.is_default else "loss=Criterion(loss, shift=True or False)"
    raise UserError(
        f"the model's own loss of the first batch is {loss:.4f}, and the mean cross-entropy over its rows {ours}"
        f"{shifted}; give {give}"
    )
