"""How this process gets memory for tensors on a CPU.

glibc gives freed memory at the end of its heap back to the kernel, and maps large blocks until it has learnt better:
forward passes then fault their activations in again, page by page. A door keeps them instead. Measured on one thread
(docs/decisions.md): forwards of large batches take 0.55 to 0.75 of the time, at up to 15 % more peak memory. Blocks
above 32 MB, the limit that glibc sets itself, stay mapped: on the heap, small ones that outlive them would pin
gigabytes. Numbers do not change.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
_LARGEST = 32 * 2**20


def keep_freed_memory() -> bool:
    """Have freed memory stay with the process from here on; False where the user or the platform decides.

    The user: any MALLOC_... variable of glibc that is set, or its tunables for malloc. The platform: a C library that
    is not glibc.
    """
    tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if tuned or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, -1))
