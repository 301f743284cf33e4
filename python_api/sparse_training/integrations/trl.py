"""TRL: the log-probabilities and entropies that its trainers ask of a model, from one read of the logits.

    trainer = GRPOTrainer(...)
    serve(trainer.model, temperature=trainer.temperature)
    trainer.train()

TRL's own head goes through the vocabulary in tiles and never holds all logits; here the model's forward makes them,
and ``row_stats`` reads them once: faster where they fit, for any model whose forward gives logits.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch

from sparse_kernels import row_stats
from sparse_training.errors import UserError

FIELDS = {  # of TRL's output: the statistic it is made from
    "log_probs": "loss",
    "entropy": "entropy",
    "log_sum_sq_probs": "sum_squares",
    "is_top1": "argmax",
}
IGNORED = -100


def serve(model: Any, *, temperature: float = 1.0, outputs: tuple[str, ...] = ("log_probs", "entropy")) -> None:
    """Answer ``model(..., labels=labels, fused_lm_head=True)`` through ``row_stats``; call it on the trainer's model.

    Args:
        temperature: the trainer's.
        outputs: fields of TRL's output to fill, some of FIELDS. Log-probabilities and entropies are differentiable.

    Raises:
        UserError: a field that there is not; with the call, labels that are missing.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    if unknown := [name for name in outputs if name not in FIELDS]:
        raise UserError(f"output {unknown[0]!r}: wanted some of {', '.join(FIELDS)}")
    before = model.forward
    statistics = tuple(dict.fromkeys(["loss", *(FIELDS[name] for name in outputs)]))

    @functools.wraps(type(model).forward)  # generate() checks its arguments against that signature
    def forward(
        self: Any, *arguments: Any, fused_lm_head: bool = False, labels: Any = None, shift_labels: Any = None,
        num_items_in_batch: Any = None, **options: Any,
    ) -> Any:  # fmt: skip
        if not fused_lm_head:
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return before(*arguments, **{name: value for name, value in given.items() if value is not None}, **options)
        made = before(*arguments, **{**options, "use_cache": False})
        logits = made.logits if shift_labels is not None else made.logits[:, :-1]
        if labels is None and shift_labels is None:
            raise UserError("fused_lm_head=True without labels: wanted labels or shift_labels")
        targets = (shift_labels if shift_labels is not None else labels[:, 1:]).to(logits.device)
        stats = row_stats(logits, targets, outputs=statistics, temperature=temperature, ignore_index=IGNORED)
        mask = targets != IGNORED
        assert stats.loss is not None
        loss = stats.loss.sum() / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        found: dict[str, Any] = {"log_probs": -stats.loss}
        if "entropy" in outputs:
            found["entropy"] = stats.entropy
        if "log_sum_sq_probs" in outputs:
            assert stats.sum_squares is not None
            found["log_sum_sq_probs"] = torch.where(mask, stats.sum_squares.detach(), 1.0).log()
        if "is_top1" in outputs:
            found["is_top1"] = (stats.argmax == targets) & mask
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=getattr(made, "aux_loss", None), **found)

    model.forward = types.MethodType(forward, model)
