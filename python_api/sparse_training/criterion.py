"""Per-row losses; a row is a sample, a token or a pixel."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_kernels import gate_rows
from sparse_training.arguments import check_choice
from sparse_training.errors import UserError
from sparse_training.evaluation import evaluation_statistics
from sparse_training.user_code import described, explained, name_of

GRANULARITIES = ("sample", "token")
TARGETS = ("classes", "values")
IGNORED = -100  # PyTorch's own ignore_index
CLASS_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss)
CLASS_FUNCTIONS = (F.cross_entropy, F.nll_loss)

Loss = Callable[[Tensor, Tensor], Tensor]


class Criterion:
    """Per-row losses of a batch, with its class dimension, its tokens and its correct predictions.

    Args:
        loss: maps (logits, targets) to losses without reduction; None (the default) for cross-entropy.
        granularity: "sample" (the default): a batch of B samples has B rows. Where the loss has several values per
            sample, one for each token or pixel, the sample's loss is the mean of those that count. "token": each token
            or pixel is a row, and the loss is called with logits [N, classes] and targets [N].
        class_dim: class dimension of the logits, 1 or -1; None (the default) for the one that fits the targets' shape.
        targets: "classes" where integer targets are the classes of the logits, so that accuracy, balance and the
            statistics of the logits have a meaning; "values" for counts, ranks, sequences and all else. None (the
            default) for "classes" where the loss is PyTorch's cross-entropy or negative log-likelihood, as a module, a
            function or a ``functools.partial`` of it, and "values" otherwise.
        ignore_index: integer target of the tokens or pixels that do not count. None (the default) for the loss's own,
            as an attribute, in a ``functools.partial`` or as a parameter's default, or else -100.
        shift: True where each token's output predicts the next token's target, as in causal language models whose
            labels are their inputs; False where it predicts the target at its own place. None (the default) for what
            the model's own loss does; False where the model computes none.
        outputs: function from the model's output to the logits, or to whatever else the loss takes, such as
            ``lambda output: output["out"]``. None (the default) for a tensor itself, and for what an output has as
            ``logits``.

    Attributes:
        classes: True where integer targets are classes.
        is_default: True where no loss was given, and none but the model's own loss can be meant.
        ignore_index: target of the tokens or pixels that do not count.
        label_smoothing: label smoothing of the loss; 0 where it has none.
        learns: False while a loss module is called in evaluation mode, as in ``learning``.

    Raises:
        UserError: a setting is out of range or contradicts the loss, or the loss reduces over the rows.

    Example:
        >>> criterion = Criterion(nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1))
        >>> losses = criterion(model(inputs), targets)  # [B]
    """

    def __init__(
        self,
        loss: Loss | None = None,
        *,
        granularity: str = "sample",
        class_dim: int | None = None,
        targets: str | None = None,
        ignore_index: int | None = None,
        shift: bool | None = None,
        outputs: Callable[[Any], Any] | None = None,
    ) -> None:
        self.is_default, self.learns = loss is None, True
        if loss is not None and not callable(loss):
            raise UserError(
                f'`loss` must be a function of logits and targets, such as CrossEntropyLoss(reduction="none"), or a '
                f"Criterion, got {loss!r}"
            )
        self.loss = nn.CrossEntropyLoss(reduction="none") if loss is None else loss
        check_reduction(self.loss)
        check_choice("granularity", granularity, GRANULARITIES)
        if class_dim not in (None, 1, -1):
            raise UserError(f"`class_dim` must be 1, -1 or None (the one that fits), got {class_dim}")
        if targets is not None and targets not in TARGETS:
            raise UserError(f"`targets` must be one of {', '.join(TARGETS)}, or None, got {targets!r}")
        if shift not in (None, True, False):
            raise UserError(f"`shift` must be True, False or None (as the model's own loss), got {shift!r}")
        if outputs is not None and not callable(outputs):
            raise UserError(f"`outputs` must be a function of the model's output, or None, got {outputs!r}")
        own = loss_setting(self.loss, "ignore_index")
        if ignore_index is not None and own not in (None, ignore_index):
            raise UserError(f"`ignore_index` must be the loss's own, {own}, got {ignore_index}; give it to one of them")
        self.granularity, self.class_dim, self.shift, self.outputs = granularity, class_dim, shift, outputs
        self.is_known = isinstance(self.loss, CLASS_LOSSES) or _function_of(self.loss) in CLASS_FUNCTIONS
        self.classes = self.is_known if targets is None else targets == "classes"
        self.ignore_index = int(IGNORED if own is None else own) if ignore_index is None else ignore_index
        self.label_smoothing = float(loss_setting(self.loss, "label_smoothing") or 0.0)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute one loss per row of a batch.

        Args:
            logits: output of the model, [B, ...].
            targets: targets, [B, ...].

        Returns:
            Losses, [B].

        Raises:
            UserError: the loss cannot take the outputs and targets, compares each output with every target, or
                returns no floating tensor whose first dimension is B; the class dimension is ambiguous, or the output
                holds no logits that a loss of PyTorch's for classes can take.
        """
        logits, targets = self.aligned(logits, targets)
        if self.is_known and targets_are_classes(logits, targets):
            logits = logits.movedim(self.classes_in(logits, targets), 1)  # where PyTorch expects them
        with (
            explained(
                lambda: (
                    f"the loss {name_of(self.loss)} cannot take outputs {described(logits)} and targets "
                    f"{described(targets)}"
                )
            ),
            self._mode(),
        ):
            losses = self.loss(logits, targets)
        rows = targets.shape[0]
        if not isinstance(losses, Tensor) or losses.shape[:1] != (rows,):
            shape = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise UserError(f'the loss must return one value per row, [{rows}], got {shape}; use reduction="none"')
        if not losses.is_floating_point():
            raise UserError(f"the loss must return floating numbers, got {losses.dtype}")
        if losses.ndim == 1:
            return losses
        if isinstance(logits, Tensor) and losses.numel() > max(logits.numel(), targets.numel()):  # broadcast
            raise UserError(
                f"the loss compares each of {rows} outputs with each of {rows} targets, as outputs are "
                f"{list(logits.shape)} and targets {list(targets.shape)}; give them one shape, such as by squeeze(1) "
                "of the larger"
            )
        counts = self.counting(targets) if losses.shape == targets.shape else None
        return mean_over_tokens(losses, counts)

    @contextmanager
    def learning(self, *, learns: bool) -> Iterator[None]:
        """Context in which a loss module is called in its own mode, or else in evaluation mode.

        Args:
            learns: False for evaluation mode, in which statistics of the module's own stay as they are.
        """
        before, self.learns = self.learns, learns
        try:
            yield
        finally:
            self.learns = before

    def learn(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute losses that are trained on, as a call does: in a run they alone move statistics of the loss's own."""
        with self.learning(learns=True):
            return self(logits, targets)

    def _mode(self) -> AbstractContextManager[None]:
        still = not self.learns and isinstance(self.loss, nn.Module)
        return evaluation_statistics(cast("nn.Module", self.loss)) if still else nullcontext()

    def aligned(self, logits: Any, targets: Tensor) -> tuple[Any, Tensor]:
        """Pair the logits with the targets that they predict.

        Args:
            logits: output of the model, [B, ...].
            targets: targets, [B, ...].

        Returns:
            Both as they are or, with ``shift``, without the last token's logits and the first token's target. Targets
            of one dimension are those of tokens that are paired already. Class indices of any integer type, or bool,
            are int64, which PyTorch's losses take.

        Raises:
            UserError: the output is not a tensor, and the loss is one of PyTorch's for classes.
        """
        if self.classes:
            targets = class_indices(targets)
        if not isinstance(logits, Tensor):
            if self.is_known or self.shift:
                raise UserError(
                    f"the model's output must be a tensor of logits or have `logits`, got {named_parts(logits)}; give "
                    "loss=Criterion(outputs=...), a function from the output to the logits"
                )
            return logits, targets
        if not self.shift or targets.ndim < 2:
            return logits, targets
        in_front = targets_are_classes(logits, targets) and self.classes_in(logits, targets) == 1
        dim = 2 if in_front else 1  # of the tokens, in the logits
        return logits.narrow(dim, 0, max(logits.shape[dim] - 1, 0)), targets[:, 1:]

    def counting(self, targets: Tensor) -> Tensor | None:
        """Mask of the tokens or pixels that count, bool, of the targets' shape; None for all of them."""
        return None if targets.is_floating_point() else targets != self.ignore_index

    def classes_in(self, logits: Tensor, targets: Tensor) -> int:
        """Find the class dimension of the logits, 1 or the last, for targets of class indices.

        Args:
            logits: class logits.
            targets: class indices, of the logits' shape without the class dimension.

        Returns:
            The dimension.

        Raises:
            UserError: neither fits, or both do and ``class_dim`` is None.
        """
        last = logits.ndim - 1
        fits = [dim for dim in sorted({1, last}) if (*logits.shape[:dim], *logits.shape[dim + 1 :]) == targets.shape]
        if self.class_dim is not None:
            fits = [dim for dim in fits if dim == self.class_dim % logits.ndim]
        if len(fits) != 1:
            shapes = f"targets of shape {list(targets.shape)} for logits {list(logits.shape)}"
            if fits:
                raise UserError(f"{shapes} fit in two ways; give class_dim=1 or class_dim=-1")
            raise UserError(f"{shapes}: targets must have the logits' shape without the classes, in dim 1 or -1")
        return fits[0]

    def tokens(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Flatten a batch to its tokens or pixels, in the order of the targets.

        Args:
            logits: class logits.
            targets: class indices, of the logits' shape without the class dimension.

        Returns:
            Logits [N, classes] and targets [N].

        Raises:
            UserError: the targets are not class indices, or do not fit.
        """
        logits, targets = self.aligned(logits, targets)
        if not targets_are_classes(logits, targets):
            raise UserError(
                f'granularity="token" needs one class index per token, got {targets.dtype} targets of shape '
                f'{list(targets.shape)} for logits {list(logits.shape)}; use granularity="sample" for other targets'
            )
        dim = self.classes_in(logits, targets)
        return logits.movedim(dim, -1).reshape(-1, logits.shape[dim]), targets.reshape(-1)

    def significance(self, logits: Tensor, targets: Tensor, weights: dict[str, float]) -> Tensor:
        """Compute the mean significance of each sample, over its tokens or pixels that count.

        Args:
            logits: class logits.
            targets: class indices, of the logits' shape without the class dimension.
            weights: weights of the statistics, by name, as in ``sparse_kernels.gate_rows``.

        Returns:
            float32 [B].
        """
        logits, targets = self.aligned(logits, targets)
        threshold = torch.zeros((), device=logits.device)
        values = gate_rows(
            logits, targets, threshold,
            weights=weights, dim=self.classes_in(logits, targets), ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        ).significance  # fmt: skip
        return mean_over_tokens(values, self.counting(targets))

    def count_correct(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """Count the tokens, pixels or samples whose largest logit is the target's class.

        With class probabilities for targets the target's class is the most probable one.

        Args:
            logits: output of the model, [B, ...].
            targets: targets, [B, ...].

        Returns:
            The number of correct predictions and the number of those that count, integers of one element; None where
            the targets are not classes.
        """
        if not self.classes:
            return None
        logits, targets = self.aligned(logits, targets)
        if targets_are_classes(logits, targets):
            dim = self.classes_in(logits, targets)
        elif self.is_known and targets.is_floating_point() and logits.shape == targets.shape and logits.ndim > 1:
            dim = 1
            targets = targets.argmax(1)
        else:
            return None
        counts = targets != self.ignore_index
        return ((logits.argmax(dim) == targets) & counts).sum(), counts.sum()


def named_parts(output: Any) -> str:
    """Name the type of a model's output, and its parts."""
    name = type(output).__name__
    if isinstance(output, Mapping):
        return f"a {name} of {', '.join(map(str, output))}"
    fields = getattr(output, "_fields", None) or getattr(output, "__dataclass_fields__", None)
    if fields:
        return f"a {name} of {', '.join(fields)}"
    return f"a {name} of {len(output)}" if isinstance(output, (tuple, list)) else f"a {name}"


def mean_over_tokens(values: Tensor, counts: Tensor | None = None) -> Tensor:
    """Average the values of each sample over those that count.

    Args:
        values: floating [B, ...].
        counts: bool [B, ...], the values that count; None (the default) for all.

    Returns:
        Means, [B]; 0 where no value counts.
    """
    values = values.flatten(1)
    if counts is None:
        return values.mean(1)
    counts = counts.flatten(1)
    # where, not a product: values that do not count may be NaN.
    return torch.where(counts, values, 0.0).sum(1) / counts.sum(1).clamp(min=1)


def check_reduction(loss: Callable[..., Any]) -> None:
    """Refuse a loss that is known to reduce over the rows.

    Args:
        loss: the loss.

    Raises:
        UserError: its ``reduction``, as an attribute or a parameter's default, is not "none".
    """
    reduction = loss_setting(loss, "reduction")
    if isinstance(reduction, str) and reduction != "none":
        name = name_of(loss)
        raise UserError(f'the loss {name} must not reduce over rows, got reduction="{reduction}"; use reduction="none"')


def loss_setting(loss: Callable[..., Any], name: str) -> Any:
    """Find the value of a loss's setting.

    Args:
        loss: the loss.
        name: name of the setting, such as "ignore_index".

    Returns:
        The loss's attribute of this name, or its parameter's default, which is that of a ``functools.partial`` where it
        has one; None where there is neither.
    """
    value = getattr(loss, name, None)
    if value is None and not isinstance(loss, nn.Module):
        try:
            parameter = inspect.signature(loss).parameters.get(name)
        except (TypeError, ValueError):  # a builtin without a signature
            parameter = None
        value = None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default
    return value


def _function_of(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function under partials."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    return loss


def class_indices(targets: Tensor) -> Tensor:
    """Return integer or bool targets as int64, others as they are."""
    return targets if targets.is_floating_point() or targets.is_complex() else targets.long()


def targets_are_classes(logits: Tensor, targets: Tensor) -> bool:
    """True if targets are class indices, with one dimension less than the logits."""
    return not targets.is_floating_point() and logits.ndim == targets.ndim + 1
