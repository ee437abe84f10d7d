"""Memory of activations that is kept from batch to batch: glibc gives it back when freed, and each batch faults it in anew."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_MMAP_MOST = 2**25  # the largest that glibc takes
_KEPT = 2**30
_RESTING = 2 * _MMAP_MOST  # where glibc's own adjustment ends


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
    libc.mallopt(_MMAP_THRESHOLD, _MMAP_MOST)
    libc.mallopt(_TRIM_THRESHOLD, _KEPT)
    try:
        yield
    finally:
        libc.mallopt(_TRIM_THRESHOLD, _RESTING)
        libc.malloc_trim(0)
