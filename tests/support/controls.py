"""Fewer random controls than users get, for tests that are not about their number."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

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
