"""Precisions of a forward pass, by name."""

from __future__ import annotations

import torch

from sparse_training.errors import UserError

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def scoring_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Autocast type of a precision.

    Args:
        precision: "float32" (the model's own type), "bfloat16", "float16", or "auto": bfloat16 where the hardware
            multiplies it natively, because emulated it is slower than float32; otherwise float32.
        device: device of the forward pass.

    Returns:
        The type; None for no autocast.

    Raises:
        UserError: the precision is unknown.
    """
    if precision in PRECISIONS:
        return PRECISIONS[precision]
    if precision != "auto":
        raise UserError(f"precision must be one of auto, {', '.join(PRECISIONS)}, got {precision!r}")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported() and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
    else:
        fast = False
    return torch.bfloat16 if fast else None
