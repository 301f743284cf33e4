"""Tasks of Transformers' models: how a model's outputs and labels make one loss per sample.

A model's class and its configuration do not tell what its loss compares. The loss that it computes does: a task is the
model's own if it gives the same number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_training.criterion import IGNORED, Criterion, named_parts
from sparse_training.errors import UserError
from sparse_training.objective import agrees


class Rows(NamedTuple):
    """Outputs and targets of a batch, and the loss of them.

    Attributes:
        logits: outputs, [B, ...].
        targets: targets, [B, ...]; -100 for those that do not count.
        criterion: maps both to one loss per sample.
        mean: computes the loss of the whole batch, one element.
    """

    logits: Tensor
    targets: Tensor
    criterion: Criterion
    mean: Callable[[], Tensor]

    def counted(self) -> Tensor:
        """Number of targets that count, an integer of one element."""
        return (self.targets != IGNORED).sum()


class Host(NamedTuple):
    """A model and the settings of its trainer that tasks depend on.

    Attributes:
        model: the model, without wrappers.
        label_smoothing: the trainer's label smoothing; 0 without.
    """

    model: nn.Module
    label_smoothing: float


Task = Callable[[Any, Mapping[str, Any], Host], "Rows | None"]


def own_targets(outputs: Any, inputs: Mapping[str, Any], host: Host) -> Rows | None:
    """Classes of samples, tokens or pixels, each predicted at its own place."""
    logits, labels = _field(outputs, "logits"), _classes_in(inputs)
    if logits is None or labels is None:
        return None
    if logits.ndim == 2 and labels.numel() == len(logits):
        labels = labels.reshape(-1)
    if logits.ndim == labels.ndim + 1 and logits.ndim <= 3 and logits.shape[:-1] == labels.shape:
        return _classes(logits, labels, host)
    return None


def next_tokens(outputs: Any, inputs: Mapping[str, Any], host: Host) -> Rows | None:
    """Tokens, each predicted at the place before it."""
    logits, labels = _field(outputs, "logits"), _classes_in(inputs)
    if logits is None or labels is None or logits.ndim != 3 or logits.shape[:-1] != labels.shape:
        return None
    if labels.shape[1] < 2:
        return None
    return _classes(logits[:, :-1], labels[:, 1:], host)


def shifted_tokens(outputs: Any, inputs: Mapping[str, Any], host: Host) -> Rows | None:
    """Tokens that the collator shifted already."""
    return own_targets(outputs, {"labels": inputs.get("shift_labels")}, host)


def pixels(outputs: Any, inputs: Mapping[str, Any], host: Host) -> Rows | None:
    """Classes of pixels; the logits are enlarged to the labels' size."""
    logits, labels = _field(outputs, "logits"), _classes_in(inputs)
    if logits is None or labels is None or logits.ndim != 4 or labels.ndim != 3:
        return None
    logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    ignored = getattr(getattr(host.model, "config", None), "semantic_loss_ignore_index", IGNORED)
    return _classes(logits, labels.masked_fill(labels == ignored, IGNORED), host, class_dim=1)


def values(outputs: Any, inputs: Mapping[str, Any], host: Host) -> Rows | None:
    """Numbers, by the squared error."""
    logits, labels = _field(outputs, "logits"), inputs.get("labels")
    if logits is None or not isinstance(labels, Tensor) or logits.numel() != labels.numel():
        return None
    return _values(logits.reshape(labels.shape), labels.to(logits.dtype), nn.MSELoss(reduction="none"))


def several_labels(outputs: Any, inputs: Mapping[str, Any], host: Host) -> Rows | None:
    """Labels that a sample may have several of."""
    logits, labels = _field(outputs, "logits"), inputs.get("labels")
    if logits is None or not isinstance(labels, Tensor) or logits.shape != labels.shape:
        return None
    return _values(logits, labels.to(logits.dtype), nn.BCEWithLogitsLoss(reduction="none"))


def answers(outputs: Any, inputs: Mapping[str, Any], host: Host) -> Rows | None:
    """Places in a text where answers start and end."""
    logits = [_field(outputs, name) for name in ("start_logits", "end_logits")]
    places = [inputs.get(name) for name in ("start_positions", "end_positions")]
    if any(part is None for part in (*logits, *places)):
        return None
    z = torch.stack([part.float() for part in logits if part is not None], 1)
    y = torch.stack([place.reshape(len(z)).to(z.device) for place in places if place is not None], 1)
    y = y.clamp(min=0).masked_fill(y >= z.shape[-1], IGNORED)  # an answer that was cut off
    return Rows(
        z,
        y,
        Criterion(class_dim=-1),
        lambda: (F.cross_entropy(z[:, 0], y[:, 0]) + F.cross_entropy(z[:, 1], y[:, 1])) / 2,
    )


def transcripts(outputs: Any, inputs: Mapping[str, Any], host: Host) -> Rows | None:
    """Sequences without places, by connectionist temporal classification."""
    logits, labels = _field(outputs, "logits"), _classes_in(inputs)
    config = getattr(host.model, "config", None)
    blank = getattr(config, "pad_token_id", None)
    if logits is None or labels is None or logits.ndim != 3 or labels.ndim != 2 or blank is None:
        return None
    counts = (labels != IGNORED) & (labels != blank)
    lengths = torch.full((len(logits),), logits.shape[1], device=logits.device)
    mask, shorten = inputs.get("attention_mask"), getattr(host.model, "_get_feat_extract_output_lengths", None)
    if mask is not None and shorten is not None:
        lengths = shorten(mask.sum(-1)).long()
    is_mean = getattr(config, "ctc_loss_reduction", "mean") == "mean"
    flat = labels.masked_select(counts)
    losses = F.ctc_loss(
        logits.float().log_softmax(-1).transpose(0, 1), flat, lengths, counts.sum(1), blank=blank,
        reduction="none", zero_infinity=bool(getattr(config, "ctc_zero_infinity", False)),
    )  # fmt: skip
    if is_mean:
        losses = losses / counts.sum(1).clamp(min=1)
    targets = labels.masked_fill(~counts, IGNORED)
    return Rows(losses, targets, Criterion(_as_they_are), losses.mean if is_mean else losses.sum)


TASKS: tuple[Task, ...] = (
    own_targets, next_tokens, shifted_tokens, pixels, values, several_labels, answers, transcripts,
)  # fmt: skip
BY_TOKEN = (own_targets, next_tokens, shifted_tokens, pixels)


class Objective(NamedTuple):
    """How a trainer's loss is made.

    Attributes:
        task: makes rows of outputs and labels.
        by_items: True where the loss of a batch is the sum over its targets divided by ``num_items_in_batch``; False
            where it is the batch's own mean, whatever that number is.
    """

    task: Task
    by_items: bool


def objectives(tasks: tuple[Task, ...]) -> tuple[Objective, ...]:
    """Return the objectives that tasks can have."""
    return tuple(Objective(task, by_items) for task in tasks for by_items in (False, True))


def find_objectives(
    candidates: tuple[Objective, ...],
    loss: Tensor,
    outputs: Any,
    inputs: Mapping[str, Any],
    host: Host,
    items: float | None,
) -> tuple[Objective, ...]:
    """Find the objectives whose loss is the trainer's own, the nearest one first.

    Args:
        candidates: the objectives to try.
        loss: the loss that the trainer computes of a batch, one element.
        outputs: the model's outputs for it.
        inputs: the batch.
        host: the model and the trainer's settings.
        items: the ``num_items_in_batch`` that the trainer was given for it; None for none.

    Returns:
        The objectives; all of them where the loss is not finite, as of a batch without targets that count.

    Raises:
        UserError: none gives that loss.
    """
    loss = loss.detach().mean()
    if not bool(loss.isfinite()):
        return candidates
    found: dict[Objective, Tensor] = {}
    extra = auxiliary_loss(outputs, host)
    for task in dict.fromkeys(objective.task for objective in candidates):
        if (rows := task(outputs, inputs, host)) is not None:
            mean = rows.mean()
            found[Objective(task, False)] = mean + extra
            if items is not None:
                found[Objective(task, True)] = mean * rows.counted() / items + extra
    near = [objective for objective in found if objective in candidates and agrees(found[objective], loss)]
    if near:
        return tuple(sorted(near, key=lambda objective: float(abs(found[objective] - loss))))
    means = {task.__name__: mean for (task, by_items), mean in found.items() if not by_items}
    tried = ", ".join(f"{name} {mean:.4f}" for name, mean in means.items()) or named_parts(outputs)
    raise UserError(
        f"the trainer's own loss of the batch is {loss:.4f}, and no known task gives it ({tried}); give losses=, a "
        'function of (outputs, inputs) that returns one loss per sample, and granularity="sample"'
    )


def auxiliary_loss(outputs: Any, host: Host) -> Tensor | float:
    """Return the term that a mixture of experts adds for its router, weighted; 0 without."""
    loss = _field(outputs, "aux_loss")
    if loss is None:
        return 0.0
    config = getattr(host.model, "config", None)
    places = (host.model, config, getattr(config, "text_config", None))
    factors = [factor for place in places if (factor := getattr(place, "router_aux_loss_coef", None)) is not None]
    return float(factors[0]) * loss if factors else 0.0


def _field(outputs: Any, name: str) -> Tensor | None:
    value = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
    return value if isinstance(value, Tensor) else None


def _classes_in(inputs: Mapping[str, Any]) -> Tensor | None:
    labels = inputs.get("labels")
    is_integer = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.ndim > 0
    return labels if is_integer else None


def _classes(logits: Tensor, labels: Tensor, host: Host, class_dim: int = -1) -> Rows:
    labels = labels.to(logits.device).long()
    smoothing, classes = host.label_smoothing, logits.shape[class_dim]

    def mean() -> Tensor:
        if bool(((labels != IGNORED) & ((labels < 0) | (labels >= classes))).any()):  # an error that ends CUDA
            return torch.tensor(torch.nan)
        return F.cross_entropy(logits.float().movedim(class_dim, 1), labels, label_smoothing=smoothing)

    loss = nn.CrossEntropyLoss(reduction="none", label_smoothing=smoothing)
    return Rows(logits, labels, Criterion(loss, class_dim=class_dim), mean)


def _values(logits: Tensor, labels: Tensor, loss: nn.Module) -> Rows:
    criterion = Criterion(loss, targets="values")
    return Rows(logits, labels, criterion, lambda: criterion(logits.float(), labels.float()).mean())


def _as_they_are(losses: Tensor, targets: Tensor) -> Tensor:
    return losses
