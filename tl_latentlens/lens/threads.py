"""Which threads have run a model with hooks on it: TransformerLens keeps hooks on the model, and a thread may take off all."""

import sys
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary

_threads_of_model: WeakKeyDictionary[Any, set[int]] = WeakKeyDictionary()


def note_thread(model: Any) -> None:
    """Note that the calling thread runs a model with hooks on it."""
    threads = _threads_of_model.setdefault(model, set())
    if (thread := get_ident()) not in threads:
        threads.add(thread)


def is_shared(model: Any) -> bool:
    """True where two threads or more that are still there have run a model with hooks on it."""
    threads = _threads_of_model.get(model, set())
    return len(threads) > 1 and len(threads & sys._current_frames().keys()) > 1
