"""Sizes and choices that change how a search runs, never what it finds. Tests set them to send small searches every way."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class SearchSettings:
    """The settings that say how a search runs.

    Attributes:
        use_cpu_kernels: Use the loops that numba compiles, where it is installed.
        min_kernel_rows: Fewer rows than this are not worth the time that compiling takes once.
        first_chunk_rows: Rows of the first chunk of the fused pass; later chunks grow.
        synchronous_devices: Types of devices whose operators are done when they return. Others get shortlists.
        code_dtypes: Quantized codes that dtype="auto" may choose, the most precise first. None: those that the processor
            multiplies faster than float32.
    """

    use_cpu_kernels: bool = True
    min_kernel_rows: int = 1024
    first_chunk_rows: int = 2**14
    synchronous_devices: frozenset[str] = frozenset({"cpu"})
    code_dtypes: tuple[torch.dtype, ...] | None = None


_active = [SearchSettings()]


def active_settings() -> SearchSettings:
    """The settings that hold now."""
    return _active[-1]


@contextmanager
def search_settings(**changes: Any) -> Iterator[SearchSettings]:
    """Other settings for all searches of this process, until the block ends."""
    _active.append(replace(active_settings(), **changes))
    try:
        yield active_settings()
    finally:
        _active.pop()
