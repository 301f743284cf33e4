"""verl: the log-probabilities, entropies and sums of squared probabilities of its policies, and its fused head."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sparse_kernels import linear_row_stats, row_stats
from sparse_training.errors import UserError
from sparse_training.integrations.rebinding import Rebinding
from sparse_training.integrations.token_scores import IGNORED, entropy, log_probs, result_dtype

_SUM = "sum_pi_squared"
_OUTPUTS = "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead.prepare_model_outputs"


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Return the log-probability of each label, [...]; float32 where verl would use flash-attention's loss.

    Args:
        logits: [..., classes].
        labels: class indices [...]; -100 gives 0.
        inplace_backward: not used: the gradient takes new memory, and the logits keep their values.
    """
    from verl.utils import torch_functional as host

    flash = host.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE and os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1"
    return log_probs(logits, labels, dtype=torch.float32 if flash else None)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """Return the entropy of each distribution, float32 [...].

    Args:
        logits: [..., classes].
        chunk_size: not used: nothing of the logits' size is made.
    """
    return entropy(logits, dtype=torch.float32)


def calculate_sum_pi_squared_from_logits(logits: Tensor) -> Tensor:
    """Return the sum of squared probabilities of each distribution, [...]; differentiable, then by the dense softmax.

    Args:
        logits: [..., classes].
    """
    if torch.is_grad_enabled() and logits.requires_grad:
        wide = torch.promote_types(logits.dtype, torch.float32)
        return logits.softmax(-1, dtype=wide).square().sum(-1).to(result_dtype(logits))
    any_label = logits.new_zeros(logits.shape[:-1], dtype=torch.int64)
    stats = row_stats(logits, any_label, outputs=("sum_squares",), ignore_index=None)
    assert stats.sum_squares is not None
    return stats.sum_squares.to(result_dtype(logits))


class FusedLinearForPPOFunction:
    """Stands for verl's fused head; its log-probabilities carry the sum of squared probabilities as an attribute."""

    @staticmethod
    def apply(
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
        chunk_size: int = 512,
    ) -> tuple[Tensor, Tensor]:
        """Return the log-probability, float32, and the entropy, of the input's dtype, of each token.

        Args:
            hidden_states: [tokens, hidden] or [batch, tokens, hidden].
            vocab_weights: [classes, hidden].
            input_ids: class indices, the shape of ``hidden_states`` without its last dimension.
            temperature: divides the logits; above 0. Default: 1.
            chunk_size: not used: the number of rows follows from the bytes at hand.
        """
        if hidden_states.dim() not in (2, 3):
            raise UserError(f"`hidden_states` must have 2 or 3 dimensions, got shape {tuple(hidden_states.shape)}")
        stats = linear_row_stats(
            hidden_states, vocab_weights, input_ids, outputs=("loss", "entropy", "sum_squares"),
            temperature=temperature, ignore_index=IGNORED,
        )  # fmt: skip
        assert stats.loss is not None
        assert stats.entropy is not None
        found = -stats.loss.float()
        setattr(found, _SUM, stats.sum_squares)
        return found, stats.entropy.to(hidden_states.dtype)


def _fused_forward(
    self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Serve ``FusedLinearForPPO.forward``, with either of its backends."""
    return FusedLinearForPPOFunction.apply(
        hidden_states, vocab_weights, input_ids.to(torch.int64), temperature, self.chunk_size
    )


def _prepare_model_outputs(
    self: Any, output: Any, output_args: Any, micro_batch: Any, logits_processor_func: Any
) -> dict[str, Any]:
    """Serve an engine that is asked for the sum of squared probabilities beside its fused head, which verl refuses.

    The engine lays the sums out as it lays out log-probabilities. What ours cannot serve goes to verl: another fused
    backend, whose log-probabilities carry no sums, and training, as the sums have no gradient here.
    """
    from verl.utils import tensordict_utils as tu

    original = head.original(_OUTPUTS)

    def asked(key: str) -> Any:
        return tu.get_non_tensor_data(data=micro_batch, key=key, default=False)

    def without(*keys: str) -> Any:
        changed = micro_batch.clone(recurse=False)
        tu.assign_non_tensor(changed, **dict.fromkeys(keys, False))
        return changed

    scores = getattr(output, "log_probs", None) if asked("calculate_sum_pi_squared") else None
    sums = getattr(scores, _SUM, None)
    if sums is None or scores.requires_grad or not asked("use_fused_kernels"):  # type: ignore[union-attr]
        found: dict[str, Any] = original(self, output, output_args, micro_batch, logits_processor_func)
        return found
    found = original(self, output, output_args, without("calculate_sum_pi_squared"), logits_processor_func)
    others = ("calculate_sum_pi_squared", "calculate_entropy", "distillation_use_topk", "distillation_only")
    laid_out = original(self, SimpleNamespace(log_probs=sums), output_args, without(*others), None)
    return {**found, _SUM: laid_out["log_probs"]}


head = Rebinding(
    "verl",
    ("0.9", "0.10"),
    {
        "verl.utils.torch_functional:logprobs_from_logits": logprobs_from_logits,
        "verl.utils.torch_functional:entropy_from_logits": entropy,
        "verl.utils.torch_functional:entropy_from_logits_with_chunking": entropy_from_logits_with_chunking,
        "verl.utils.torch_functional:calculate_sum_pi_squared_from_logits": calculate_sum_pi_squared_from_logits,
        "verl.utils.experimental.torch_functional:FusedLinearForPPOFunction": FusedLinearForPPOFunction,
        "verl.utils.experimental.torch_functional:FusedLinearForPPO.forward": _fused_forward,
        _OUTPUTS: _prepare_model_outputs,
    },
)
"""Turns ours on and off in a worker's process; to be turned on before its engine is made, which takes functions then.

Example:
    >>> head.on()
"""
