"""Sequences whose loss is exactly zero, left out of a batch before the model runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_kernels import compact, gather_rows
from sparse_training.errors import UserError


@dataclass(frozen=True)
class KeptSequences:
    """Result of ``drop_zero_sequences``; printed, it says what was saved.

    A mean over the whole batch is the sum over what is kept, divided by ``tokens`` or ``sequences``; or the mean over
    what is kept, times ``token_share`` or ``sequence_share``.

    Attributes:
        batch: the batch, of the kept sequences.
        advantages: of the kept sequences, [kept, ...].
        mask: of the kept sequences, [kept, tokens].
        index: int64 [kept], ascending: which sequences are kept.
        sequences: number of sequences of the whole batch.
        tokens: number of tokens of the whole batch that count in the loss.
        kept_tokens: how many of them are in kept sequences.
    """

    batch: Any
    advantages: Tensor
    mask: Tensor
    index: Tensor
    sequences: int
    tokens: int
    kept_tokens: int

    @property
    def token_share(self) -> float:
        """Kept tokens by all tokens, 0 without any: turns a mean over kept tokens into one over all."""
        return self.kept_tokens / self.tokens if self.tokens else 0.0

    @property
    def sequence_share(self) -> float:
        """Kept sequences by all sequences: turns a mean over kept sequences into one over all."""
        return self.index.shape[0] / self.sequences

    def __str__(self) -> str:
        kept = self.index.shape[0]
        return (
            f"{kept} of {self.sequences} sequences run, {self.kept_tokens:,} of {self.tokens:,} tokens of the loss: "
            f"{1 - self.sequence_share:.1%} of forward and backward saved"
        )


def drop_zero_sequences(
    batch: Any, advantages: Tensor, mask: Tensor, *, other_terms: Mapping[str, float]
) -> KeptSequences:
    """Leave out the sequences of a policy-gradient batch whose loss is exactly zero, before the model runs on them.

    A sequence is left out if each of its tokens that counts has an advantage of 0. This is exact for losses that are a
    multiple of the advantage, clipped ratios included, under a model that treats each sequence alone: no BatchNorm.
    Dropout draws other numbers for a smaller batch. If no sequence has a loss, one is kept, so that the model runs and
    each parameter has a gradient of zeros, on every rank. Waits once for an accelerator.

    Args:
        batch: nested structure of tensors and arrays with a sequence in each row of dim 0, as in
            ``sparse_kernels.gather_rows``.
        advantages: floating [sequences] or [sequences, tokens]. NaN is not zero.
        mask: bool or 0 and 1 [sequences, tokens]; tokens that count in the loss.
        other_terms: coefficient of each term of the loss that an advantage of 0 does not make zero, by name, such as
            ``{"kl": beta, "entropy": 0.0}``; {} if there is none. All must be 0.

    Returns:
        KeptSequences.

    Raises:
        UserError: shapes that do not fit, no sequences, or a term whose coefficient is not 0.
        TypeError: a part of the batch might hold rows and is not known.
        ValueError: a tensor of the batch has another number of rows, or is on another device.

    Example:
        >>> kept = drop_zero_sequences(batch, advantages, completion_mask, other_terms={"kl": beta})
        >>> losses = token_losses(model(kept.batch["input_ids"]), kept.advantages)
        >>> loss = (losses * kept.mask).sum() / kept.tokens
        >>> print(kept)
    """
    _check(advantages, mask, other_terms)
    counts = mask != 0
    above = advantages if advantages.dim() == 2 else advantages.unsqueeze(1)
    used = ((above != 0) & counts).any(1)
    used[0] |= ~used.any()
    selection = compact(used)
    kept, kept_advantages, kept_mask = gather_rows((batch, advantages, mask), selection)
    tokens = counts.sum(1)
    totals = torch.stack([tokens.sum(), tokens[selection.index].sum()]).tolist()
    return KeptSequences(kept, kept_advantages, kept_mask, selection.index, mask.shape[0], *totals)


def _check(advantages: Any, mask: Any, other_terms: Any) -> None:
    for name, tensor in (("advantages", advantages), ("mask", mask)):
        if not isinstance(tensor, Tensor):
            raise UserError(f"`{name}` must be a torch.Tensor, got {type(tensor).__name__}")
    if mask.dim() != 2 or not mask.shape[0]:
        raise UserError(f"`mask` must have shape [sequences, tokens] with a sequence at least, got {tuple(mask.shape)}")
    if not advantages.is_floating_point() or advantages.shape not in (mask.shape, mask.shape[:1]):
        raise UserError(
            f"`advantages` must be floating of shape {tuple(mask.shape[:1])} or {tuple(mask.shape)}, as `mask`, got "
            f"{advantages.dtype} of shape {tuple(advantages.shape)}"
        )
    if advantages.device != mask.device:
        raise UserError(f"`advantages` must be on the device of `mask`, {mask.device}, got {advantages.device}")
    if not isinstance(other_terms, Mapping):
        raise UserError(f"`other_terms` must map names to coefficients, got {type(other_terms).__name__}")
    for name, coefficient in other_terms.items():
        if not isinstance(coefficient, (int, float)) or math.isnan(coefficient) or coefficient != 0:
            raise UserError(
                f"sequences may be dropped only where their loss is exactly zero: the coefficient of {name!r} must be "
                f"0, got {coefficient!r}"
            )
