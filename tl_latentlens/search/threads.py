"""Calls in several threads: torch's own where possible, since other threads would share the cores with them.

After each operator, OpenMP's threads spin for some milliseconds while they wait for the next one.
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
    """The result of `call` for each part, in order; parts run in as many threads as torch uses.

    Args:
        call: Takes a part; to run at the same time as others, it must release Python's lock.
        parts: Arguments for `call`.

    Raises:
        Exception: The first that a call raised, after the calls that had begun have ended.
        KeyboardInterrupt: This thread was interrupted.
    """
    parts = list(parts)
    waiting, results, errors, ended_threads = iter(enumerate(parts)), {}, [], set()

    def work(_: Any) -> None:
        try:
            for place, part in waiting:
                results[place] = call(part)
            ended_threads.add(threading.get_ident())
        except BaseException as error:  # OpenMP cannot pass it on
            errors.append(error)

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
    if errors:
        raise errors[0]
    if threading.get_ident() not in ended_threads:  # a signal came before its first line or after its last
        raise KeyboardInterrupt
    return [results[place] for place in range(len(parts))]


@cache
def _openmp() -> Any:
    """`GOMP_parallel` of the OpenMP that torch uses, which calls a function in several of its threads, or None."""
    libraries = Path(torch.__file__).parent / "lib"
    try:
        run = ctypes.CDLL(str(libraries / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    run.argtypes, run.restype = (_CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return run


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    """Threads that are kept, since new ones have no memory of their own yet and are slow at first."""
    return ThreadPoolExecutor(n_threads, thread_name_prefix="search")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not come along
