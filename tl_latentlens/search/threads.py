"""Work for several threads at once: torch's own where they can be had, since others would share the cores with them.

After each of its operators, OpenMP's threads wait for the next one at full speed for some milliseconds.
"""

import ctypes
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def in_threads(call: Callable[[Any], Any], parts: Iterable[Any]) -> list[Any]:
    """What `call` gives for each part, each in a thread of its own if there are as many; it should let go of Python's lock.

    Raises:
        Exception: The first that a call raised, after those have ended that had begun.
        KeyboardInterrupt: This thread was interrupted.
    """
    parts = list(parts)
    left, found, raised, ended = iter(enumerate(parts)), {}, [], set()

    def work(_: Any) -> None:
        try:
            for place, part in left:
                found[place] = call(part)
            ended.add(threading.get_ident())
        except BaseException as error:  # OpenMP cannot pass it on
            raised.append(error)

    n_threads = min(len(parts), torch.get_num_threads())
    if n_threads <= 1:
        return [call(part) for part in parts]
    if (run := _openmp()) is not None:
        run(_CALLBACK(work), None, n_threads, 0)
    else:
        others = [_pool(n_threads - 1).submit(work, None) for _ in range(n_threads - 1)]
        work(None)
        for other in others:
            other.result()
    if raised:
        raise raised[0]
    if threading.get_ident() not in ended:  # a signal came before its first line or after its last
        raise KeyboardInterrupt
    return [found[place] for place in range(len(parts))]


@cache
def _openmp() -> Any:
    """`GOMP_parallel` of the OpenMP that torch uses: calls a function in several of its threads. None: it uses another."""
    libraries = Path(torch.__file__).parent / "lib"
    try:
        run = ctypes.CDLL(str(libraries / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    run.argtypes, run.restype = (_CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return run


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    """Kept, since new threads have no memory of their own yet and are slow at first."""
    return ThreadPoolExecutor(n_threads, thread_name_prefix="search")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not come along
