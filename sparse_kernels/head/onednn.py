"""Float32 matrix products by oneDNN, for processors on which MKL does not use AVX-512.

PyTorch's float32 products are MKL's, which takes AVX-512 on Intel's processors alone; oneDNN, which PyTorch brings as
well, takes it wherever it is. ``mkldnn::_linear_pointwise`` reads row-major matrices and their transposes as they
are, whereas the convolution of one pixel first reorders the weight. docs/design/head.md has the measurements.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor


def serves(input: Tensor, weight: Tensor) -> bool:
    """Return True if products of these two, and of their gradients, are faster by oneDNN than by PyTorch.

    Args:
        input: [rows, hidden].
        weight: [classes, hidden].
    """
    return (
        weight.dtype is torch.float32
        and weight.device.type == "cpu"
        and weight.is_contiguous()  # oneDNN's kernels for other strides take a hundred times as long
        and input.numel() > 0
        and weight.numel() > 0
        and bool(torch.backends.mkldnn.enabled)
        and _ahead_of_mkl()
    )


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``input @ weight.T + bias``.

    Args:
        input: [rows, hidden], copied unless contiguous.
        weight: [columns, hidden]; it or its transpose is contiguous.
        bias: [columns]; none by default.
    """
    bias = None if bias is None else bias.contiguous()
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return product


@functools.cache
def _ahead_of_mkl() -> bool:
    """Return True if MKL serves ``torch.mm``, on a processor with AVX-512 that is not Intel's."""
    return (
        torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and "Intel" not in _vendor()
    )


def _vendor() -> str:
    """Return text that names the processor's maker; Intel's if it is not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # Windows, where this ends in the maker's name
        return platform.processor() or "GenuineIntel"
    return next((line for line in lines if line.startswith("vendor_id")), "GenuineIntel")
