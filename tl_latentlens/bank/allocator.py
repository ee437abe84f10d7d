"""Keeping freed memory from batch to batch: glibc gives it back to the system, and each batch would fault it in again."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # The numbers are from malloc.h.
_MAX_MMAP_THRESHOLD = 2**25  # glibc takes no larger one
_KEPT_BYTES = 2**30
_DEFAULT_TRIM_THRESHOLD = 2 * _MAX_MMAP_THRESHOLD  # glibc's own adjustment ends here.


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep up to 1 GiB of freed memory for the next allocations inside; on leaving, give it back.

    Only with glibc; elsewhere nothing happens. Allocations up to 32 MiB come from the heap from then on, as they do in any
    process that has freed one of that size.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _MAX_MMAP_THRESHOLD)
    libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    try:
        yield
    finally:
        libc.mallopt(_M_TRIM_THRESHOLD, _DEFAULT_TRIM_THRESHOLD)
        libc.malloc_trim(0)
