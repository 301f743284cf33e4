"""Checked calls of a head: a linear layer and the statistics of its logits."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_kernels import reference
from sparse_kernels._arguments import Settings, checked_settings
from sparse_kernels._operands import check_device, described, integer, number, statistic_names, vetted
from sparse_kernels._settings import LEAST, MOST, bad_target
from sparse_kernels._tracing import tensors_unsupported_reason, values_readable
from sparse_kernels.types import HEAD_STATISTICS

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)  # as F.linear, autocast leaves float64 alone


@dataclass(slots=True)
class HeadCall:
    """A checked call of a head, in the dtype of its products."""

    input: Tensor  # [..., hidden]
    weight: Tensor  # [classes, hidden]
    target: Tensor  # [...], int64 or int32
    bias: Tensor | None  # [classes]
    outputs: Collection[str]
    settings: Settings  # the logits' scale folded into temperature and softcap
    row_mask: Tensor | None  # bool [...]
    chunk: int | None  # rows, at least 1

    def __post_init__(self) -> None:
        self.input = vetted("input", self.input)
        self.weight = vetted("linear_weight", self.weight)
        given: Any = self.target
        if isinstance(given, (int, list, tuple, np.ndarray)) and not isinstance(given, bool):
            given = torch.as_tensor(given, device=self.input.device)
        self.target = vetted("target", given)
        self.outputs = statistic_names(self.outputs, HEAD_STATISTICS)
        if self.chunk is not None:
            self.chunk = integer("chunk", self.chunk)
            if self.chunk < 1:
                raise ValueError(f"`chunk` must be None or at least 1 row, got {self.chunk}")
        self._check_shapes()
        self._check_dtypes()
        self._check_devices()

    def _check_shapes(self) -> None:
        input, weight, target = self.input, self.weight, self.target
        if input.dim() < 1:
            raise ValueError("`input` must have shape [..., hidden], got a tensor without dimensions")
        if weight.dim() != 2:
            raise ValueError(f"`linear_weight` must have shape [classes, hidden], got {tuple(weight.shape)}")
        if input.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"`input` of shape {tuple(input.shape)} and `linear_weight` of shape {tuple(weight.shape)} must end in "
                f"the same hidden size, got {input.shape[-1]} and {weight.shape[1]}"
            )
        if weight.shape[0] == 0:
            raise ValueError(f"`linear_weight` of shape {tuple(weight.shape)} has no classes")
        rows = input.shape[:-1]
        if target.shape == (*rows, weight.shape[0]) and target.dtype in _FLOATING:
            raise TypeError(
                "`target` must be class indices, got probabilities: use F.linear_cross_entropy without options"
            )
        if target.shape != rows:
            raise ValueError(
                f"`target` must have shape {tuple(rows)} for an `input` of shape {tuple(input.shape)}, "
                f"got {tuple(target.shape)}"
            )
        if self.bias is not None:
            bias = self.bias = vetted("linear_bias", self.bias)
            if bias.shape != weight.shape[:1]:
                raise ValueError(f"`linear_bias` must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
        if self.row_mask is not None:
            mask = self.row_mask = vetted("row_mask", self.row_mask)
            if mask.dtype is not torch.bool or mask.shape != rows:
                raise ValueError(f"`row_mask` must be bool of shape {tuple(rows)}, got {described(mask)}")

    def _check_dtypes(self) -> None:
        input, target = self.input, self.target
        if target.dtype is not torch.int64 and target.dtype is not torch.int32:
            raise TypeError(f"`target` must be int64 or int32 class indices, got {target.dtype}")
        if input.dtype not in _FLOATING:
            raise TypeError(f"`input` must be float32, bfloat16, float16 or float64, got {input.dtype}")
        dtype, autocast = input.dtype, torch.is_autocast_enabled(input.device.type)
        if autocast and dtype in _AUTOCAST:
            dtype = torch.get_autocast_dtype(input.device.type)
        for name, tensor in (("linear_weight", self.weight), ("linear_bias", self.bias)):
            if tensor is None or tensor.dtype is input.dtype:
                continue
            if not (autocast and input.dtype in _AUTOCAST and tensor.dtype in _AUTOCAST):
                raise TypeError(
                    f"`{name}` must be {input.dtype} as `input`, got {tensor.dtype}; cast one of them or use autocast"
                )
        # As F.linear under autocast; the casts are in the graph.
        self.input, self.weight = input.to(dtype), self.weight.to(dtype)
        self.bias = None if self.bias is None else self.bias.to(dtype)

    def _check_devices(self) -> None:
        for name, tensor in (
            ("linear_weight", self.weight),
            ("target", self.target),
            ("linear_bias", self.bias),
            ("row_mask", self.row_mask),
        ):
            if tensor is not None:
                check_device(name, tensor, "`input`", self.input.device)

    def refuse_subclasses(self) -> None:
        """Raise for a tensor that is more than its bytes: sharded, quantised, or another subclass."""
        operands = (self.input, self.weight, self.target, self.bias, self.row_mask)
        reason = tensors_unsupported_reason(tensor for tensor in operands if tensor is not None)
        if reason is not None:
            raise TypeError(f"a head must be given plain tensors: {reason}")


def head_settings(
    temperature: float, softcap: float | None, logit_scale: float, label_smoothing: float, ignore_index: int | None
) -> Settings:
    """Return checked settings, the logits' scale folded in: s x in place of x is softcap / s and temperature / s.

    Args:
        temperature: as in ``linear_row_stats``.
        softcap: as in ``linear_row_stats``.
        logit_scale: as in ``linear_row_stats``.
        label_smoothing: as in ``linear_row_stats``.
        ignore_index: as in ``linear_row_stats``.
    """
    settings = checked_settings(temperature, softcap, label_smoothing, ignore_index)
    scale = number("logit_scale", logit_scale)
    if scale == 1.0:
        return settings
    if not LEAST <= scale <= MOST:
        raise ValueError(f"`logit_scale` must be above 0, from {LEAST:.0e} to {MOST:.0e}, got {scale}")
    return checked_settings(
        settings.temperature / scale, settings.softcap / scale, settings.label_smoothing, settings.ignore_index
    )


def accumulator_of(input: Tensor) -> torch.dtype:
    """Return the dtype of every per-row result but ``argmax``.

    Args:
        input: the head's input.
    """
    return torch.float64 if input.dtype is torch.float64 else torch.float32


@dataclass(slots=True)
class FlatHead:
    """The rows of a call in one dimension, and which of them count."""

    input: Tensor  # [rows, hidden]
    weight: Tensor  # [classes, hidden]
    target: Tensor  # [rows]
    bias: Tensor | None
    settings: Settings
    valid: Tensor  # bool [rows]: neither ignored nor masked
    chunk: int | None

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of every per-row result."""
        return accumulator_of(self.input)

    def check_targets(self) -> None:
        """Raise for a target out of range in a row that counts, on CPU; elsewhere its row gives NaN."""
        if not values_readable(self.target):
            return
        classes = self.weight.shape[0]
        bad = reference.bad_targets(self.target, classes, self.settings.ignore_index) & self.valid
        if bad.any():
            row = int(bad.to(torch.int8).argmax())
            raise bad_target(int(self.target[row]), row, classes, self.settings.ignore_index)


def flat_head(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, row_mask: Tensor | None, settings: Settings,
    chunk: int | None,
) -> FlatHead:  # fmt: skip
    """Return the rows of an operator's arguments in one dimension.

    Args:
        input: [..., hidden].
        weight: [classes, hidden].
        target: [...].
        bias: [classes], or None.
        row_mask: bool [...], or None.
        settings: of the statistics.
        chunk: rows, or None.
    """
    rows = target.reshape(-1)
    valid = rows != settings.ignore_index
    if row_mask is not None:
        valid &= row_mask.reshape(-1)
    return FlatHead(input.reshape(rows.shape[0], input.shape[-1]), weight, rows, bias, settings, valid, chunk)
