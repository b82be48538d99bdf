"""Settings of glibc's memory allocator for tensors on a CPU.

By default glibc returns freed memory at the end of its heap to the kernel, and it maps large blocks one by one until
its threshold has adapted. Every forward pass then causes page faults for its activations again. The commands of qflow
therefore keep freed memory in the process. Measured on one thread (docs/decisions.md), forward passes of large batches
take 0.55 to 0.75 of the time, at up to 15 % more peak memory. Blocks above 32 MB, which is glibc's own limit, are still
mapped, because on the heap small blocks that live longer would hold gigabytes in place. Numbers do not change.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
_LARGEST = 32 * 2**20


def keep_freed_memory() -> bool:
    """Keep freed memory in the process from now on, and return True. Change nothing and return False if the user has
    set a MALLOC_... variable of glibc or its tunables for malloc, or if the C library is not glibc.
    """
    tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if tuned or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, -1))
