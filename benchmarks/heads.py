"""Language-model heads that users run today: hidden states, weight and targets to a mean loss, differentiable."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peers import Missing, _load
from torch import Tensor

Head = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """All logits, in the dtype of the operands."""
    return F.cross_entropy(F.linear(hidden, weight), target)


def dense_float32(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """All logits, cast to float32 as Transformers' loss does."""
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def torch_chunked(reduction: str) -> Head:
    """PyTorch's own chunked form, from 2.13 on."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Missing(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, weight, target, options=options, reduction=reduction).mean()

    return loss


def trl(chunk_size: int = 8192) -> Head:
    """TRL's function, as its trainers call it: the log-probabilities of every position, and the entropies."""
    (function,) = _load("trl", "trl.kernels", "ChunkedLogProbFunction")

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        valid = target != -100
        labels = target.clamp(min=0)
        log_p = function.apply(hidden, weight, None, labels, 1.0, chunk_size, None, 1.0, ("entropy",))[0]
        return -(log_p * valid).sum() / valid.sum()

    return loss


def liger() -> Head:
    """Liger's fallback on a CPU, its kernel on a GPU that has one."""
    (function,) = _load(
        "liger-kernel", "liger_kernel.ops.fused_linear_scaled_cross_entropy",
        "LigerFusedLinearScaledCrossEntropyFunction",
    )  # fmt: skip
    return lambda hidden, weight, target: function.apply(hidden, weight, target).sum() / (target != -100).sum()


def cut_cross_entropy() -> Head:
    """Apple's Cut Cross-Entropy: its kernels on a GPU, its compiled form elsewhere."""
    (function,) = _load("cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy")

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        found: Tensor = function(hidden, weight, target, impl="cce" if hidden.is_cuda else "torch_compile")
        return found

    return loss


HEADS: dict[str, Callable[[], Head]] = {
    "dense": lambda: dense,
    "dense float32": lambda: dense_float32,
    "torch mean": lambda: torch_chunked("mean"),
    "torch none": lambda: torch_chunked("none"),
    "TRL": trl,
    "Liger": liger,
    "Cut Cross-Entropy": cut_cross_entropy,
}


def available(
    *names: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Head], dict[str, str]]:
    """Heads that run here on a small call, which compiles those that are compiled, and why the others do not."""
    found: dict[str, Head] = {}
    reasons = {name: _reason(name, found, device, dtype) for name in names or HEADS}
    return found, {name: reason for name, reason in reasons.items() if reason}


def _reason(name: str, found: dict[str, Head], device: torch.device | str, dtype: torch.dtype) -> str:
    """Why a head does not run on a small call; what runs is added."""
    try:
        head = HEADS[name]()
        hidden, weight = (torch.randn(size, 16, device=device, dtype=dtype).requires_grad_() for size in (4, 256))
        head(hidden, weight, torch.zeros(4, dtype=torch.int64, device=device)).backward()
    except Exception as error:  # whatever a package does on a machine that it was not made for
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    found[name] = head
    return ""
