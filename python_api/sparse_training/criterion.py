"""What a model's output is held against: one loss a row, be a row a sample, or a token or pixel of one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_kernels import gate_rows
from sparse_training.errors import UserError

GRANULARITIES = ("sample", "token")
IGNORED = -100  # PyTorch's own ignore_index

Loss = Callable[[Tensor, Tensor], Tensor]


class Criterion:
    """One loss a row, and what else is read from logits and targets.

    Args:
        loss: maps (logits, targets) to losses without reduction; by default cross-entropy. Its ``ignore_index``,
            where it has one, marks the elements that do not count.
        rows: "samples": a batch of B samples has B rows; where the loss gives more than one number a sample
            (one a token or pixel), the sample's loss is the mean of those that count. "elements": each token or
            pixel is a row, and the loss is called with logits [N, classes] and targets [N].
        class_dim: of the logits: 1 or -1; None for where it fits the targets' shape.

    Raises:
        UserError: a setting out of range, or a loss that reduces.
    """

    def __init__(self, loss: Loss | None = None, *, granularity: str = "sample", class_dim: int | None = None) -> None:
        self.loss = nn.CrossEntropyLoss(reduction="none") if loss is None else loss
        check_reduction(self.loss)
        if granularity not in GRANULARITIES:
            raise UserError(f"`granularity` must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
        if class_dim not in (None, 1, -1):
            raise UserError(f"class_dim {class_dim}: wanted 1, -1, or None for where it fits")
        self.granularity, self.class_dim = granularity, class_dim
        self.ignore_index = int(getattr(self.loss, "ignore_index", IGNORED))

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Losses, [B], of B samples.

        Raises:
            UserError: what the loss gives has not a first dimension of B.
        """
        if isinstance(self.loss, (nn.CrossEntropyLoss, nn.NLLLoss)) and targets_are_classes(logits, targets):
            logits = logits.movedim(self.classes_in(logits, targets), 1)  # where PyTorch wants them
        losses = self.loss(logits, targets)
        rows = targets.shape[0]
        if not isinstance(losses, Tensor) or losses.shape[:1] != (rows,):
            shape = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise UserError(f"the loss gives {shape} for {rows} rows: wanted one value a row, [B]")
        if losses.ndim == 1:
            return losses
        counts = self.counting(targets) if losses.shape == targets.shape else None
        return mean_over_tokens(losses, counts)

    def counting(self, targets: Tensor) -> Tensor | None:
        """bool, the targets' shape: the elements that are not marked to be ignored; None for all of them."""
        return None if targets.is_floating_point() else targets != self.ignore_index

    def classes_in(self, logits: Tensor, targets: Tensor) -> int:
        """The dimension of the logits, 1 or the last, that counts classes, for targets of class indices.

        Raises:
            UserError: neither fits, or both do and ``class_dim`` does not say which.
        """
        last = logits.ndim - 1
        fits = [dim for dim in sorted({1, last}) if (*logits.shape[:dim], *logits.shape[dim + 1 :]) == targets.shape]
        if self.class_dim is not None:
            fits = [dim for dim in fits if dim == self.class_dim % logits.ndim]
        if len(fits) != 1:
            wanted = "class_dim=1 or class_dim=-1" if fits else "the logits' shape without its classes, in dim 1 or -1"
            raise UserError(f"targets of shape {list(targets.shape)} for logits {list(logits.shape)}: wanted {wanted}")
        return fits[0]

    def tokens(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, classes] and targets [N] of the batch's N elements, in the order of the targets.

        Raises:
            UserError: targets that are not class indices, or whose shape does not fit.
        """
        if not targets_are_classes(logits, targets):
            raise UserError(
                f'granularity="token" needs one class index per token, got {targets.dtype} targets of shape '
                f'{list(targets.shape)} for logits {list(logits.shape)}; use granularity="sample" for other targets'
            )
        dim = self.classes_in(logits, targets)
        return logits.movedim(dim, -1).reshape(-1, logits.shape[dim]), targets.reshape(-1)

    def significance(self, logits: Tensor, targets: Tensor, weights: dict[str, float]) -> Tensor:
        """float32 [B]: the mean, over a sample's elements that count, of the weighted sum of their statistics."""
        threshold = torch.zeros((), device=logits.device)
        found = gate_rows(
            logits, targets, threshold,
            weights=weights, dim=self.classes_in(logits, targets), ignore_index=self.ignore_index,
            label_smoothing=float(getattr(self.loss, "label_smoothing", 0.0)),
        ).significance  # fmt: skip
        return mean_over_tokens(found, self.counting(targets))

    def count_correct(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """How many elements have the right class as their largest logit, of how many; None without classes.

        With class probabilities for targets the right class is the most probable one.
        """
        if targets_are_classes(logits, targets):
            dim = self.classes_in(logits, targets)
        elif isinstance(self.loss, nn.CrossEntropyLoss) and logits.shape == targets.shape and logits.ndim > 1:
            dim = 1
            targets = targets.argmax(1)
        else:
            return None
        counts = targets != self.ignore_index
        return ((logits.argmax(dim) == targets) & counts).sum(), counts.sum()


def mean_over_tokens(values: Tensor, counts: Tensor | None = None) -> Tensor:
    """[B]: the mean of a sample's values, [B, ...], over those that count; 0 where none does."""
    values = values.flatten(1)
    if counts is None:
        return values.mean(1)
    counts = counts.flatten(1)
    # where, not a product: what does not count may be NaN.
    return torch.where(counts, values, 0.0).sum(1) / counts.sum(1).clamp(min=1)


def check_reduction(loss: Callable[..., Any]) -> None:
    """Refuse a loss that is known to reduce over the rows.

    Raises:
        UserError: its ``reduction``, as an attribute or a parameter's default, is not "none".
    """
    reduction = getattr(loss, "reduction", None)
    if reduction is None and not isinstance(loss, nn.Module):
        try:
            parameter = inspect.signature(loss).parameters.get("reduction")
        except (TypeError, ValueError):  # a builtin without a signature
            parameter = None
        reduction = None if parameter is None else parameter.default
    if isinstance(reduction, str) and reduction != "none":
        name = getattr(loss, "__name__", type(loss).__name__)
        raise UserError(f'the loss {name} has reduction="{reduction}": wanted one loss a row, reduction="none"')


def targets_are_classes(logits: Tensor, targets: Tensor) -> bool:
    """Whether targets are class indices, one for each of the logits' rows."""
    return not targets.is_floating_point() and logits.ndim == targets.ndim + 1
