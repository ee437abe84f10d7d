"""Work shared among threads in each of which torch uses that thread alone.

Torch's own threads share every single product and wait for each other after it, which costs more than it brings for small
operations, and much more where another process takes one of the cores.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")


def in_threads(call: Callable[[Item], object], items: Iterable[Item], workers: int) -> None:
    """Call with each item, in at most `workers` threads and no more than torch has; in this one where it is a worker."""
    threads = torch.get_num_threads()
    workers = min(workers, threads)
    if workers <= 1:
        for item in items:
            call(item)
        return

    def work(item: Item) -> None:
        with torch.no_grad():  # which holds for a thread
            call(item)

    try:
        for done in [_pool(workers, os.getpid()).submit(work, item) for item in items]:
            done.result()
    finally:
        torch.set_num_threads(threads)  # OpenMP keeps the number for each thread, MKL for all


@cache
def _pool(workers: int, process: int) -> ThreadPoolExecutor:  # a forked process has none of its parent's threads
    return ThreadPoolExecutor(workers, "tl-latentlens", initializer=torch.set_num_threads, initargs=(1,))
