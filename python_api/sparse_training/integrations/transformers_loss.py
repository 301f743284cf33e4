"""Transformers: the loss of a causal language model over the tokens that a quantile or a gate selects."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sparse_kernels import RowStats, TopFraction, linear_row_stats, row_stats, selective_linear_cross_entropy
from sparse_training.errors import UserError
from sparse_training.evaluation import evaluation_statistics
from sparse_training.gate.gate import Gate
from sparse_training.integrations.head_input import HeadInput
from sparse_training.integrations.switch import Switch
from sparse_training.objective import without_wrappers

IGNORED = -100
REDUCTIONS = ("mean_kept", "mean_valid")
NOT_FOR_THE_REFERENCE = ("labels", "shift_labels", "num_items_in_batch", "past_key_values", "logits_to_keep")


class TokenLoss(Switch):
    """Loss of selected tokens, in place of a causal language model's own while it is in training mode.

    Set on the model as ``model.loss_function``, so every trainer and loop that asks the model for its loss is served,
    and what the model adds itself is kept, such as a router's auxiliary loss. In evaluation mode the loss is the
    model's own, of all tokens.

    Under gradient accumulation the Trainer says how many items the accumulated batch has. "mean_kept" is then the mean
    over the kept tokens of this part, times its share of the items; "mean_valid" the sum over the kept tokens, divided
    by the items. With all tokens kept, both are the model's own loss.

    Example:
        >>> loss = TokenLoss(model, TopFraction(0.2, of="entropy"), fused_head=True)
        >>> with loss:
        ...     trainer.train()

    Args:
        model: a causal language model of Transformers, also inside DistributedDataParallel, PEFT or torch.compile.
        select: a ``TopFraction`` of each batch's tokens, or a ``Gate``.
        reference: another causal language model of the same vocabulary. Tokens are then selected by their loss minus
            the reference's, as in Rho-1 (a reference trained on clean text) and RHO-LOSS (on held-out text).
            ``select`` must be a ``TopFraction`` of "loss". Default: none.
        reduction: "mean_kept" or "mean_valid". Default "mean_kept".
        fused_head: True to leave the logits out: the head's products are then done here, chunk by chunk, and no token
            that is left out is in their backward. The model's output has no logits then. Needs a head that is an
            ``nn.Linear`` whose output is not changed before the loss. False for any model. Default False.

    Attributes:
        mask: bool, of the targets' shape: the tokens that the last batch kept; None before.

    Raises:
        UserError: an argument that does not fit; from ``on``, a model whose loss is not that of a causal language
            model; from the model's forward in training, missing labels, or a head that is not served.
    """

    def __init__(
        self, model: nn.Module, select: TopFraction | Gate, *, reference: nn.Module | None = None,
        reduction: str = "mean_kept", fused_head: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(select, (TopFraction, Gate)):
            raise UserError(f"`select` must be a TopFraction or a Gate, got {type(select).__name__}")
        if reduction not in REDUCTIONS:
            raise UserError(f"`reduction` must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        if isinstance(select, Gate) and (select.label_smoothing or select.ignore_index != IGNORED):
            raise UserError(
                f"a gate here must have label_smoothing=0 and ignore_index={IGNORED}, got {select.label_smoothing} and "
                f"{select.ignore_index}"
            )
        self.model: Any = without_wrappers(model)
        self.select, self.reduction = select, reduction
        self.mask: Tensor | None = None
        self._reference = None if reference is None else _Reference(reference, fused_head)
        if self._reference is not None:
            if not isinstance(select, TopFraction) or select.of != "loss":
                raise UserError(f'with a reference, `select` must be TopFraction(..., of="loss"), got {select}')
            if self._reference.model is self.model:
                raise UserError("`reference` must be another model than `model`, got the same")
            both: tuple[Any, Any] = (self.model, self._reference.model)
            classes = [one.config.get_text_config().vocab_size for one in both]
            if classes[0] != classes[1]:
                raise UserError(f"`reference` must have the model's vocabulary of {classes[0]}, got {classes[1]}")
        self._head = HeadInput(self.model) if fused_head else None
        self._hooks: list[Any] = []
        self._inputs: dict[str, Any] = {}  # of the forward pass under way
        self._called = False

    # --- on and off -----------------------------------------------------------------------------

    def _turn_on(self) -> None:
        from transformers.loss.loss_utils import ForCausalLMLoss

        own = getattr(self.model, "loss_function", None)
        if own is not ForCausalLMLoss:
            name = getattr(own, "__name__", type(own).__name__)
            raise UserError(
                f"the model's loss_function must be Transformers' ForCausalLMLoss, got {name} of "
                f"{type(self.model).__name__}"
            )
        self._own: Any = own
        self._was_set = "_loss_function" in vars(self.model)
        if self._head is not None:
            self._head.on()
        self.model.loss_function = self._loss
        self._set = self.model.loss_function
        self._hooks = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward),
        ]

    def _turn_off(self) -> None:
        if self.model.loss_function is not self._set:
            raise UserError(
                f"the model's loss_function must be the one set by on(), got {self.model.loss_function!r}; undo what "
                "was done to it since, then call off() again"
            )
        for hook in self._hooks:
            hook.remove()
        if self._head is not None:
            self._head.off()
        if self._was_set:
            self.model.loss_function = self._own
        else:
            del self.model._loss_function

    # --- a forward pass -------------------------------------------------------------------------

    def _before_forward(self, model: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._called, self._inputs = False, {}
        if self._head is not None:
            self._head.active = False
        if not model.training:
            return
        if getattr(model, "_is_replica", False):
            raise UserError("nn.DataParallel is not served: its replicas share one selection; use one process a device")
        signature = inspect.signature(model.forward)
        given = signature.bind_partial(*arguments, **named).arguments
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given.update(given.pop(name, {}))
        if given.get("labels") is None:
            if torch.is_grad_enabled():
                raise UserError(
                    "the model needs labels to select tokens, got none: a Trainer's label_smoothing_factor and "
                    "compute_loss_func take the loss out of the model; leave them out, or call off()"
                )
            return
        self._inputs = given
        if self._head is not None:
            self._head.active = True

    def _after_forward(self, model: Any, arguments: tuple[Any, ...], output: Any) -> Any:
        selects, self._inputs = bool(self._inputs), {}
        if selects and not self._called:
            raise UserError(f"{type(model).__name__} computes its loss without loss_function: it cannot be served so")
        return output if self._head is None else self._head.left_out_of(output)

    def _loss(
        self, logits: Tensor, labels: Tensor, vocab_size: int | None = None, num_items_in_batch: Any = None,
        ignore_index: int = IGNORED, shift_labels: Tensor | None = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        """Compute the loss as ``ForCausalLMLoss`` does, of the selected tokens."""
        if not self._inputs:
            own: Tensor = self._own(
                logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **options
            )
            return own
        self._called = True
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.to(logits.device)
        valid = targets != ignore_index
        items: Any = valid.sum() if num_items_in_batch is None else num_items_in_batch
        items = items.to(targets.device).clamp(min=1) if isinstance(items, Tensor) else max(items, 1)
        if isinstance(self.select, Gate):
            self.select.to(targets.device)
        if self._head is not None and self._reference is None:  # the head knows rows that it can differentiate at once
            check_targets(targets, logits)
            weight, bias = self._head.parameters_for(logits)
            found = selective_linear_cross_entropy(
                logits, weight, targets, select=self.select, linear_bias=bias, ignore_index=ignore_index,
                reduction=items if self.reduction == "mean_valid" else "mean_kept",
            )  # fmt: skip
            loss, self.mask = found.loss, found.mask
        else:
            loss = self._loss_of_statistics(logits, targets, valid, items, ignore_index)
        if self.reduction == "mean_kept" and num_items_in_batch is not None:
            loss = loss * (valid.sum() / items)
        return loss

    def _loss_of_statistics(
        self, scores: Tensor, targets: Tensor, valid: Tensor, items: Any, ignore_index: int
    ) -> Tensor:
        """Compute the reduced loss of what the statistics of each token select."""
        outputs = {"loss", *(self.select.significance.weights if isinstance(self.select, Gate) else [self.select.of])}
        stats = statistics(scores, targets, outputs, ignore_index, self._head)
        weight = self._weights(stats, targets, valid, ignore_index)
        self.mask = weight > 0
        assert stats.loss is not None
        kept = torch.where(self.mask, stats.loss * weight, 0.0).sum()
        number = weight.sum()
        mean: Tensor = kept / (items if self.reduction == "mean_valid" else torch.where(number > 0, number, 1.0))
        return mean

    def _weights(self, stats: RowStats, targets: Tensor, valid: Tensor, ignore_index: int) -> Tensor:
        """Return the weight of each token in the loss, 0 for those that are left out."""
        if isinstance(self.select, TopFraction):
            values: Tensor = getattr(stats, self.select.of).detach()
            if self._reference is not None:
                values = values - self._reference.losses(self._inputs, targets, ignore_index)
            return self.select.mask(values, valid).to(values.dtype)
        gate = self.select
        weights = gate.significance.weights
        terms = [factor * getattr(stats, name).detach().flatten() for name, factor in weights.items()]
        chosen = gate.by(torch.stack(terms).sum(0), valid=valid.flatten())
        weight = torch.zeros(targets.numel(), dtype=torch.float32, device=targets.device)
        return weight.index_add(0, chosen.index, chosen.weight.float()).view(targets.shape)


class _Reference:
    """A model whose losses are subtracted."""

    def __init__(self, model: nn.Module, fused_head: bool) -> None:
        self.model: Any = without_wrappers(model)
        self._head = HeadInput(self.model) if fused_head else None

    @torch.no_grad()
    def losses(self, inputs: Mapping[str, Any], targets: Tensor, ignore_index: int) -> Tensor:
        """Compute the loss of each target, with the inputs that the model was given."""
        if inputs.get("input_ids") is None:
            raise UserError(f"a reference needs input_ids, got {', '.join(inputs)}")
        given = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_REFERENCE}
        with evaluation_statistics(self.model), self._head or nullcontext() as head:
            if head is not None:
                head.active = True
            loss = statistics(self.model(**given).logits, targets, ["loss"], ignore_index, head).loss
        assert loss is not None
        return loss


def statistics(
    scores: Tensor, targets: Tensor, outputs: Collection[str], ignore_index: int, head: HeadInput | None
) -> RowStats:
    """Compute statistics of each token from its logits, or from the head's input.

    Args:
        scores: [..., classes], or [..., hidden] with a head.
        targets: [...].
        outputs: names of statistics.
        ignore_index: target of the rows that do not count.
        head: the head whose input is given. None for logits.
    """
    check_targets(targets, scores)
    if head is None:
        return row_stats(scores, targets, outputs=outputs, ignore_index=ignore_index)
    weight, bias = head.parameters_for(scores)
    return linear_row_stats(scores, weight, targets, linear_bias=bias, outputs=outputs, ignore_index=ignore_index)


def check_targets(targets: Tensor, scores: Tensor) -> None:
    """Raise unless there is a target for each token.

    Args:
        targets: [...].
        scores: [..., classes], or [..., hidden].

    Raises:
        UserError: shapes that differ.
    """
    if targets.shape != scores.shape[:-1]:
        raise UserError(f"labels must have shape {list(scores.shape[:-1])} as the logits, got {list(targets.shape)}")
