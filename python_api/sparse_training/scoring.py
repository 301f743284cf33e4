"""Scoring with the model itself: no gradient, evaluation statistics, the fastest adequate precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_training.errors import UserError

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def evaluation_statistics(model: nn.Module, kind: type[nn.Module] = nn.Module) -> Iterator[None]:
    """Submodules of ``kind`` as they are in evaluation, each one's own training flag back afterwards.

    BatchNorm then reads its running statistics and leaves them alone, and dropout draws nothing. Flags
    are set directly, not through ``eval()``: a submodule frozen by hand must be frozen afterwards too.
    """
    live = [module for module in model.modules() if module.training and isinstance(module, kind)]
    for module in live:
        module.training = False
    try:
        yield
    finally:
        for module in live:
            module.training = True


def scoring_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast type for a precision by name, None for the model's own.

    "auto" is bfloat16 where the hardware multiplies it natively: emulated, it is slower than float32.
    """
    if precision in PRECISIONS:
        return PRECISIONS[precision]
    if precision != "auto":
        raise UserError(f"precision {precision!r}: wanted auto, {', '.join(PRECISIONS)}")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported() and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
    else:
        fast = False
    return torch.bfloat16 if fast else None


def forward(model: nn.Module, inputs: Any) -> Tensor:
    """The model's logits for inputs of any structure, from an output that is a tensor or has ``logits``."""
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    elif isinstance(inputs, (tuple, list)):
        output = model(*inputs)
    else:
        output = model(inputs)
    logits: Tensor = getattr(output, "logits", output)
    return logits


class SelfScorer:
    """``scorer(inputs)``: the model's logits, without gradient; every buffer and generator untouched.

    Raises:
        UserError: an unknown precision.
    """

    def __init__(self, model: nn.Module, *, precision: str = "auto", device: torch.device) -> None:
        self.model, self.device = model, device
        self.dtype = scoring_dtype(precision, device)

    def __call__(self, inputs: Any) -> Tensor:
        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)
        with torch.no_grad(), evaluation_statistics(self.model), autocast:
            return forward(self.model, inputs)
