"""What users run today: the same work in unfused PyTorch, eager and compiled, and by other packages.

Every form takes the classes in ``dim``, and returns what ``sparse_kernels`` returns for the same call.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOSS, ENTROPY = 0.7, 0.3
WEIGHTS = {"loss": LOSS, "entropy": ENTROPY}


def loss_entropy(logits: Tensor, targets: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """cross_entropy, softmax and log(p + 1e-8): as most published code has it."""
    loss = F.cross_entropy(logits, targets, reduction="none")
    p = torch.softmax(logits, dim=dim)
    return loss, -(p * torch.log(p + 1e-8)).sum(dim=dim)


def loss_entropy_log_softmax(logits: Tensor, targets: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """The better unfused form: one log_softmax serves the loss and the entropy."""
    log_p = torch.log_softmax(logits, dim=dim)
    loss = -log_p.gather(dim, targets.unsqueeze(dim)).squeeze(dim)
    return loss, -(log_p.exp() * log_p).sum(dim=dim)


def unfused(logits: Tensor, targets: Tensor, threshold: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """``loss_entropy``, weighted sum, comparison: mask and significance."""
    loss, entropy = loss_entropy(logits, targets, dim)
    significance = LOSS * loss + ENTROPY * entropy
    return significance > threshold, significance


def unfused_log_softmax(logits: Tensor, targets: Tensor, threshold: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """``loss_entropy_log_softmax``, weighted sum, comparison."""
    loss, entropy = loss_entropy_log_softmax(logits, targets, dim)
    significance = LOSS * loss + ENTROPY * entropy
    return significance > threshold, significance


def all_statistics(logits: Tensor, targets: Tensor, dim: int = -1) -> tuple[Tensor, ...]:
    """All eight, in the order of ``sparse_kernels.STATISTICS``, from a softmax."""
    loss, entropy = loss_entropy(logits, targets, dim)
    p = torch.softmax(logits, dim=dim)
    return loss, entropy, *_of_probabilities(p, targets, dim), torch.logsumexp(logits, dim=dim)


def all_statistics_log_softmax(logits: Tensor, targets: Tensor, dim: int = -1) -> tuple[Tensor, ...]:
    """The same from one log_softmax; its logsumexp is a difference of the target's two numbers."""
    log_p = torch.log_softmax(logits, dim=dim)
    y = targets.unsqueeze(dim)
    loss = -log_p.gather(dim, y).squeeze(dim)
    p = log_p.exp()
    entropy = -(p * log_p).sum(dim=dim)
    return loss, entropy, *_of_probabilities(p, targets, dim), logits.gather(dim, y).squeeze(dim) + loss


def _of_probabilities(p: Tensor, targets: Tensor, dim: int) -> tuple[Tensor, ...]:
    squares = (p * p).sum(dim=dim)
    p_y = p.gather(dim, targets.unsqueeze(dim)).squeeze(dim)
    top, at = p.topk(2, dim=dim)
    largest, second = top.unbind(dim)
    return (1 - 2 * p_y + squares).clamp(min=0).sqrt(), squares, largest, largest - second, at.select(dim, 0)


GATES = {"eager": unfused, "eager_log_softmax": unfused_log_softmax}
PAIRS = {"eager": loss_entropy, "eager_log_softmax": loss_entropy_log_softmax}
STATISTICS = {"eager": all_statistics, "eager_log_softmax": all_statistics_log_softmax}


def with_compiled(forms: dict[str, Callable[..., Any]], **options: Any) -> dict[str, Callable[..., Any]]:
    """The forms, and each under torch.compile for the very shape that it is timed at."""
    torch._dynamo.reset()  # or the ninth shape that one process compiles falls back to eager
    return forms | {
        f"compiled{name.removeprefix('eager')}": torch.compile(form, dynamic=False, **options)
        for name, form in forms.items()
    }


class Missing(Exception):
    """A package is not there or does not run on this device; the message says which and why."""


def _load(package: str, module: str, *names: str) -> tuple[Any, ...]:
    try:
        found = importlib.import_module(module)
        return tuple(getattr(found, name) for name in names)
    except Exception as error:  # whatever a package does on a machine that it was not made for
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Missing(f"{package}: {reason}") from error


def _runs(package: str, function: Callable[[Tensor, Tensor], Any], device: torch.device) -> None:
    """Raises Missing unless the function serves a small call on the device."""
    try:
        function(torch.zeros(4, 256, device=device), torch.zeros(4, dtype=torch.int64, device=device))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Missing(f"{package} does not run on {device.type}: {reason}") from error


def liger(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """liger-kernel's cross-entropy: the loss alone."""
    (function,) = _load("liger-kernel", "liger_kernel.transformers.functional", "liger_cross_entropy")

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = function(logits, targets, reduction="none")
        return found

    _runs("liger-kernel", loss, device)
    return loss


def quack(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """quack-kernels' cross-entropy: the loss alone, differentiable."""
    (function,) = _load("quack-kernels", "quack.cross_entropy", "cross_entropy")

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = function(logits, targets, reduction="none")
        return found

    _runs("quack-kernels", loss, device)
    return loss


def trl(device: torch.device) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """TRL's Triton kernel: loss and entropy in one pass."""
    (function,) = _load("trl", "trl.kernels", "selective_log_softmax_and_entropy")

    def pair(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_p, entropy = function(logits, targets)
        return -log_p, entropy

    _runs("trl", pair, device)
    return pair


def trl_eager(device: torch.device) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """TRL's two public functions, which its trainers call without that kernel. logits [batch, tokens, classes]."""
    log_softmax, entropy_of = _load("trl", "trl.trainer.utils", "selective_log_softmax", "entropy_from_logits")

    def pair(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return -log_softmax(logits, targets), entropy_of(logits)

    _runs("trl", pair, device)
    return pair


def add(sides: dict[str, Any], left_out: dict[str, str], device: torch.device, **wanted: Callable[..., Any]) -> None:
    """Put each peer that runs here among the sides, and the reason of each that does not among ``left_out``."""
    for name, load in wanted.items():
        found = _loaded(load, device)
        (left_out if isinstance(found, str) else sides)[name] = found


def _loaded(load: Callable[..., Any], device: torch.device) -> Any:
    """The function, or why it is missing."""
    try:
        return load(device)
    except Missing as missing:
        return str(missing)


def versions() -> dict[str, str]:
    """Of the packages compared with, where they are installed."""
    packages = ("triton", "liger-kernel", "quack-kernels", "trl", "transformers", "cut-cross-entropy")
    return {name: _version(name) for name in packages}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
