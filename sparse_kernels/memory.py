"""Keeping freed memory for the next step."""

from __future__ import annotations

import ctypes
import sys

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
