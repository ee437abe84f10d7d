"""The decorator by which numba compiles the loops of a CPU search."""

import inspect
from collections.abc import Callable
from typing import Any

import numba


def compile_loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is compiled at its first call for each combination of types, and kept on the disk if possible."""
    function = inspect.unwrap(function)  # An import hook may have wrapped it in runtime shape checks.
    options: dict[str, Any] = {
        "nogil": True,
        "fastmath": {"reassoc", "contract", "nsz", "nnan"},
    }  # allow vectors of partial sums
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # there is no writable folder
        return numba.njit(**options)(function)
