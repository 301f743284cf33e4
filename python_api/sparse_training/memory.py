"""Freed memory is kept for the next step, not given back to the system."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of <malloc.h>


def keep_freed_memory() -> bool:
    """Have the C library keep what this process frees; whether it has such a switch (glibc on Linux).

    Large tensors are otherwise mapped and unmapped in every step, and each page of them is faulted in and
    zeroed anew: 12,000 page faults in a dense step of 128 Fashion-MNIST images, more than a quarter of its
    time, and a time that hangs on what ran before, which a calibrated clock cannot have. The price is that
    memory once used stays with the process. It holds for the whole process, so it is for programs to
    call at their start, not for libraries.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))
