"""TRL: the log-probabilities and entropies that its trainers need, from one read of the logits.

TRL's own head processes the vocabulary in tiles and never holds all logits. Here the model's forward computes them and
``row_stats`` reads them once: faster where the logits fit into memory, for any model whose forward returns logits.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch

from sparse_kernels import row_stats
from sparse_training.errors import UserError

FIELDS = {  # field of TRL's output -> statistic of row_stats
    "log_probs": "loss",
    "entropy": "entropy",
    "log_sum_sq_probs": "sum_squares",
    "is_top1": "argmax",
}
IGNORED = -100


def serve(model: Any, *, temperature: float = 1.0, outputs: tuple[str, ...] = ("log_probs", "entropy")) -> None:
    """Make ``model(..., labels=labels, fused_lm_head=True)`` use ``row_stats``; to be called on the trainer's model.

    Example:
        >>> trainer = GRPOTrainer(...)
        >>> serve(trainer.model, temperature=trainer.temperature)
        >>> trainer.train()

    Args:
        model: the trainer's model; its ``forward`` is replaced.
        temperature: temperature of the softmax, above 0; must be the trainer's. Default 1.
        outputs: fields of TRL's output to fill: "log_probs", "entropy", "log_sum_sq_probs", "is_top1". The first two
            are differentiable. Default ("log_probs", "entropy").

    Raises:
        UserError: an unknown field; in the model's call, missing labels.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    if unknown := [name for name in outputs if name not in FIELDS]:
        raise UserError(f"`outputs` must be some of {', '.join(FIELDS)}, got {unknown[0]!r}")
    original = model.forward
    statistics = tuple(dict.fromkeys(["loss", *(FIELDS[name] for name in outputs)]))

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
        output = original(*arguments, **{**options, "use_cache": False})
        logits = output.logits if shift_labels is not None else output.logits[:, :-1]
        if labels is None and shift_labels is None:
            raise UserError("fused_lm_head=True needs labels or shift_labels, got neither")
        targets = (shift_labels if shift_labels is not None else labels[:, 1:]).to(logits.device)
        stats = row_stats(logits, targets, outputs=statistics, temperature=temperature, ignore_index=IGNORED)
        mask = targets != IGNORED
        assert stats.loss is not None
        loss = stats.loss.sum() / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        fields: dict[str, Any] = {"log_probs": -stats.loss}
        if "entropy" in outputs:
            fields["entropy"] = stats.entropy
        if "log_sum_sq_probs" in outputs:
            assert stats.sum_squares is not None
            fields["log_sum_sq_probs"] = torch.where(mask, stats.sum_squares.detach(), 1.0).log()
        if "is_top1" in outputs:
            fields["is_top1"] = (stats.argmax == targets) & mask
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=getattr(output, "aux_loss", None), **fields)

    model.forward = types.MethodType(forward, model)
