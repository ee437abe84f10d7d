"""The package's own arithmetic, apart from what a caller has set in torch: autocast, inference mode, a default device, TF32.

A model runs under its user's settings. What is computed from its activations must not depend on them.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

import torch

_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")
_CPU = torch.device("cpu")


@contextmanager
def own_arithmetic(*, full_products: bool = False) -> Iterator[None]:
    """A context, or a decorator, in which torch computes as it does for a caller who has set nothing.

    Autocast, inference mode, gradients and the default device hold for one thread; they are put back at the end.

    Args:
        full_products: Multiply float32 matrices in float32, also where TF32 or bfloat16 is allowed for them. This holds for
            the whole process. Searches do without: their error bounds know of it.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))  # Its tensors could not be changed afterwards.
        stack.enter_context(torch.no_grad())
        for device in _AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device() != _CPU:
            stack.enter_context(_CPU)
        if full_products:
            stack.enter_context(full_products_only())
        yield


def autocast_state() -> tuple[tuple[str, torch.dtype], ...]:
    """The kinds of devices for which autocast is on in this thread, each with its dtype."""
    return tuple(
        (device, torch.get_autocast_dtype(device)) for device in _AUTOCAST_DEVICES if torch.is_autocast_enabled(device)
    )


@contextmanager
def autocast_as(state: Sequence[tuple[str, torch.dtype]]) -> Iterator[None]:
    """A context in which autocast is as it was when `autocast_state` was asked."""
    with ExitStack() as stack:
        for device, _ in autocast_state():
            stack.enter_context(torch.autocast(device, enabled=False))
        for device, dtype in state:
            stack.enter_context(torch.autocast(device, dtype))
        yield


def has_full_products() -> bool:
    """True where float32 matrices are multiplied in float32 in this process."""
    return _reduced_precisions() is None


class _Precisions:
    """The precision of float32 products as it was before the first of several contexts, whose threads may overlap."""

    lock = Lock()
    n_contexts = 0
    before: tuple[str | None, list[str]] | None = None


@contextmanager
def full_products_only() -> Iterator[None]:
    """A context in which float32 matrices are multiplied in float32, in the whole process."""
    with _Precisions.lock:
        _Precisions.n_contexts += 1
        if _Precisions.n_contexts == 1:
            _Precisions.before = _set_full_precision()
    try:
        yield
    finally:
        with _Precisions.lock:
            _Precisions.n_contexts -= 1
            if _Precisions.n_contexts == 0 and _Precisions.before is not None:
                _set_precision(*_Precisions.before)


def _set_full_precision() -> tuple[str | None, list[str]] | None:
    """Switch reduced precision off, and return what it was; None where it was off."""
    before = _reduced_precisions()
    if before is not None:
        if before[0] is not None:
            torch.set_float32_matmul_precision("highest")
        for backend in _backends():
            backend.fp32_precision = "ieee"
    return before


def _reduced_precisions() -> tuple[str | None, list[str]] | None:
    """The precision of float32 products in all, where torch can say it, and of each backend; None where none is reduced."""
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set for each backend, which this getter does not sum up
        overall = None
    of_backends = [backend.fp32_precision for backend in _backends()]
    is_full = overall in (None, "highest") and all(precision in ("none", "ieee") for precision in of_backends)
    return None if is_full else (overall, of_backends)


def _set_precision(overall: str | None, of_backends: list[str]) -> None:
    if overall is not None:
        torch.set_float32_matmul_precision(overall)
    for backend, precision in zip(_backends(), of_backends, strict=True):
        if backend.fp32_precision != precision:
            backend.fp32_precision = precision


def _backends() -> list[Any]:
    """The settings of matrix products for each kind of device, in versions of torch that have them (2.9)."""
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return backends if hasattr(backends[1], "fp32_precision") else []
