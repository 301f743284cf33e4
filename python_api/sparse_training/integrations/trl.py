"""TRL: the log-probabilities and entropies that its trainers need, without a row that needs none.

``head`` is switched on for the process; ``serve`` for one model, whose forward then holds all logits.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor

from sparse_kernels import linear_row_stats, row_stats
from sparse_training.errors import UserError
from sparse_training.integrations import token_scores
from sparse_training.integrations.rebinding import Rebinding

FIELDS = {  # field of TRL's output -> statistic
    "log_probs": "loss",
    "entropy": "entropy",
    "log_sum_sq_probs": "sum_squares",
    "mean_logits": "mean_logits",
    "is_top1": "argmax",
}
IGNORED = -100
SKIPPED = -(2**31)  # target of masked rows: no class, and in the range of int32


class HeadFunction:
    """Function that TRL's fused head calls, in place of ``trl.trainer.utils._ChunkedLogProbFunction``."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_size: int,
        final_logit_softcapping: float | None = None, logit_scale: float = 1.0,
        outputs: tuple[str, ...] = tuple(FIELDS),
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """Compute the statistics of a head's rows; a row whose gradient is zero is not in the backward.

        Args:
            hidden: [rows, hidden].
            weight: [classes, hidden]; cast to the dtype of ``hidden``.
            bias: [classes] or None.
            targets: classes [rows].
            temperature: divides the logits, above 0.
            chunk_size: TRL's tile of classes; here tiles are of rows, and chosen.
            final_logit_softcapping: bound of the scaled logits, by tanh. Default: none.
            logit_scale: multiplies the logits, above 0. Default: 1.
            outputs: fields besides the log-probabilities. Default: all.

        Returns:
            log_probs, entropy, log_sum_sq_probs, mean_logits and is_top1, float32 [rows] and bool [rows]; None for one
            that is not asked for. The first two are differentiable.

        Raises:
            UserError: a weight that DeepSpeed's third stage has partitioned.
        """
        if hasattr(weight, "ds_id"):
            raise UserError(
                "TRL's head is served where the weight is whole, got one that DeepSpeed ZeRO-3 partitions: call "
                "head.off(), or use ZeRO-2 or FSDP"
            )
        if not torch.is_autocast_enabled(hidden.device.type):
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        stats = linear_row_stats(
            hidden, weight, targets, linear_bias=bias, temperature=temperature, softcap=final_logit_softcapping,
            logit_scale=logit_scale, ignore_index=None,
            outputs=[statistic for field, statistic in FIELDS.items() if field in ("log_probs", *outputs)],
        )  # fmt: skip
        assert stats.loss is not None
        squares = stats.sum_squares
        found = (-stats.loss, stats.entropy, None if squares is None else squares.log(), stats.mean_logits)
        return (
            *(None if values is None else values.float() for values in found),
            None if stats.argmax is None else stats.argmax == targets,
        )


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Compute ``log_softmax(logits / temperature)`` at an index, as the function of this name in TRL.

    Args:
        logits: [..., classes].
        index: classes [...] or [..., k]; with k above 1 TRL's own function is called.
        temperature: above 0. Default: 1.
        row_mask: of the index's shape; rows with a zero give 0 and have no gradient. Default: all rows count.

    Returns:
        Log-probabilities of the index's shape, in the logits' dtype.
    """
    if index.ndim == logits.ndim:
        if index.shape[-1] != 1:
            theirs = head.original("trl.trainer.utils:selective_log_softmax")
            found: Tensor = theirs(logits, index, temperature, row_mask)
            return found
        mask = None if row_mask is None else row_mask.squeeze(-1)
        return selective_log_softmax(logits, index.squeeze(-1), temperature, mask).unsqueeze(-1)
    stats = row_stats(
        logits, _targets(index, row_mask), outputs=("loss",), temperature=temperature, ignore_index=SKIPPED
    )
    assert stats.loss is not None
    return -stats.loss.to(logits.dtype)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Compute the entropy of each row in nats, as the function of this name in TRL.

    Args:
        logits: [..., classes].
        chunk_size: TRL's number of rows at a time; here one pass reads all. Default: 128.

    Returns:
        Entropies [...], in the logits' dtype.
    """
    return token_scores.entropy(logits, dtype=logits.dtype)


def selective_log_softmax_and_entropy(
    logits: Tensor, index: Tensor, entropy_requires_grad: bool = True, temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute both from one read of the logits, as the function of this name in TRL.

    Args:
        logits: [..., classes].
        index: classes [...].
        entropy_requires_grad: False for an entropy without gradient. Default: True.
        temperature: above 0. Default: 1.
        row_mask: [...]; rows with a zero give 0 and have no gradient. Default: all rows count.

    Returns:
        Log-probabilities and entropies [...], in the logits' dtype.
    """
    stats = row_stats(logits, _targets(index, row_mask), temperature=temperature, ignore_index=SKIPPED)
    assert stats.loss is not None
    assert stats.entropy is not None
    entropy = stats.entropy if entropy_requires_grad else stats.entropy.detach()
    return -stats.loss.to(logits.dtype), entropy.to(logits.dtype)


def _targets(index: Tensor, row_mask: Tensor | None) -> Tensor:
    return index if row_mask is None else torch.where(row_mask != 0, index.long(), SKIPPED)


def _rows_may_be_left_out(device: torch.device) -> bool:
    """Return True, so that TRL hands the rows with a label to its head and no others, on a CPU too."""
    return True


head = Rebinding(
    "trl",
    ("1.16", "1.17"),
    {
        "trl.trainer.utils:_ChunkedLogProbFunction": HeadFunction,
        "trl.trainer.utils:_use_triton": _rows_may_be_left_out,
        "trl.trainer.utils:selective_log_softmax": selective_log_softmax,
        "trl.trainer.utils:entropy_from_logits": entropy_from_logits,
        "trl.trainer.utils:selective_log_softmax_and_entropy": selective_log_softmax_and_entropy,
    },
    only_there=["trl.trainer.utils:_use_triton"],  # elsewhere it chooses kernels
)
"""Switch of TRL's head: ``head.on()``, ``head.off()`` or ``with head:``, for SFT, DPO, GRPO, RLOO and KTO alike."""


def serve(model: Any, *, temperature: float = 1.0, outputs: tuple[str, ...] = ("log_probs", "entropy")) -> None:
    """Make ``model(..., labels=labels, fused_lm_head=True)`` read the logits of the model's own forward once.

    For a model whose logits come from more than a linear layer; others are better served by ``head``. To be called on
    the trainer's model.

    Example:
        >>> trainer = GRPOTrainer(...)
        >>> serve(trainer.model, temperature=trainer.temperature)
        >>> trainer.train()

    Args:
        model: the trainer's model; its ``forward`` is replaced.
        temperature: temperature of the softmax, above 0; must be the trainer's. Default 1.
        outputs: fields of TRL's output to fill: "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1".
            The first two are differentiable. Default ("log_probs", "entropy").

    Raises:
        UserError: an unknown field; in the model's call, missing labels.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    if unknown := [name for name in outputs if name not in FIELDS]:
        raise UserError(f"`outputs` must be some of {', '.join(FIELDS)}, got {unknown[0]!r}")
    original = model.forward
    config = model.config.get_text_config()
    asked = dict.fromkeys(FIELDS[name] for name in ("log_probs", *outputs) if name != "mean_logits")

    @functools.wraps(type(model).forward)  # generate() checks its arguments against this signature
    def forward(
        self: Any, *arguments: Any, fused_lm_head: bool = False, labels: Any = None, shift_labels: Any = None,
        num_items_in_batch: Any = None, **options: Any,
    ) -> Any:  # fmt: skip
        if not fused_lm_head:
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return original(
                *arguments, **{name: value for name, value in given.items() if value is not None}, **options
            )
        if labels is None and shift_labels is None:
            raise UserError("fused_lm_head=True needs labels or shift_labels, got neither")
        output = original(*arguments, **{**options, "use_cache": False})
        logits = output.logits if shift_labels is not None else output.logits[:, :-1]
        targets = (shift_labels if shift_labels is not None else labels[:, 1:]).to(logits.device)
        stats = row_stats(logits, targets, outputs=tuple(asked), temperature=temperature, ignore_index=IGNORED)
        mask = targets != IGNORED
        assert stats.loss is not None
        loss = stats.loss.sum() / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        auxiliary = getattr(output, "aux_loss", None)  # of a mixture of experts' router
        if auxiliary is not None:
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * auxiliary
        fields: dict[str, Any] = {"log_probs": -stats.loss}
        if "entropy" in outputs:
            fields["entropy"] = stats.entropy
        if "log_sum_sq_probs" in outputs:
            assert stats.sum_squares is not None
            fields["log_sum_sq_probs"] = torch.where(mask, stats.sum_squares.detach(), 1.0).log()
        if "mean_logits" in outputs:
            mean = logits.detach().mean(-1, dtype=stats.loss.dtype) / temperature
            fields["mean_logits"] = torch.where(mask, mean, 0.0)
        if "is_top1" in outputs:
            fields["is_top1"] = (stats.argmax == targets) & mask
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=auxiliary, **fields)

    model.forward = types.MethodType(forward, model)
