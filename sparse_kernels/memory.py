"""Memory of large tensors: kept for the next step, or not taken before it is used."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of <malloc.h>


def keep_freed_memory() -> bool:
    """Make the C library keep the memory that this process frees.

    Otherwise large tensors, such as the gradient in the logits, are mapped and unmapped in every step. Each of their
    pages is then faulted in and zeroed again, which takes longer than a kernel takes to fill it. That time also depends
    on what ran before, which a calibrated clock cannot represent. The price is that memory once used stays with the
    process. The setting holds for the whole process, so programs should call this at their start, and libraries
    should not.

    Returns:
        True if the C library has such a setting (glibc on Linux).

    Example:
        >>> sparse_kernels.keep_freed_memory()  # once, before the first step
        True
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))


def untouched_zeros(like: Tensor) -> Tensor | None:
    """Return zeros whose pages are taken when they are first written; pages that are only read share one of zeros.

    Args:
        like: contiguous, on CPU: shape and dtype.

    Returns:
        The zeros; or None where PyTorch's allocator has memory at hand that is in use already, so that there is nothing
        to save, and on other systems than Linux.
    """
    if not sys.platform.startswith("linux") or _resident(torch.empty_like(like)):
        return None
    size = like.numel() * like.element_size()
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=like.dtype).view(like.shape)


def _resident(tensor: Tensor) -> bool:
    """Return True if one of a few pages of a tensor is in memory, or if the system does not say."""
    begin, size, page = tensor.data_ptr(), tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    state = ctypes.c_ubyte(1)
    mincore = ctypes.CDLL(None).mincore
    for part in (1, 2, 3):  # of four; an allocator writes to the first page
        address = (begin + part * size // 4) // page * page
        if mincore(ctypes.c_void_p(address), ctypes.c_size_t(page), ctypes.byref(state)) or state.value & 1:
            return True
    return False
