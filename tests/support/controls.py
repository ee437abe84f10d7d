"""Fewer random controls and texts than users get, for tests that are not about their number."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pytest

import tl_latentlens as tll
from tl_latentlens.directions import significance
from tl_latentlens.directions.features import steering_scores


@contextmanager
def few_controls() -> Iterator[None]:
    """A context in which directions and steered features are compared with a few random ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(significance, "N_NULL_DIRECTIONS", 100)
        patch.setattr(steering_scores, "_N_NULLS", 4)
        patch.setattr(steering_scores, "_MAX_VECTORS", 8)
        yield


@contextmanager
def few_texts(step: int) -> Iterator[None]:
    """A context in which the embedded corpus has each so-many-th of its texts."""
    load_corpus = tll.load_corpus

    def load(texts: Any, *, limit: int | None = None, **settings: Any) -> Any:
        if texts != "demo":
            return load_corpus(texts, limit=limit, **settings)
        return list(islice(load_corpus(texts, limit=limit, **settings), 0, None, step))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tll, "load_corpus", load)
        yield
