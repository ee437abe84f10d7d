"""Which kind of rule names a feature: its tokens, what stands beside them, or their place."""

from types import SimpleNamespace

import numpy as np
import pytest

from tl_latentlens.directions.features.label_choice import LabelChooser
from tl_latentlens.directions.features.row_texts import AFTER, BEFORE, POSITION, TOKEN, WORD

KINDS = (WORD, TOKEN, BEFORE, AFTER, POSITION)


def chosen(scores: dict[str, float], n_parts: dict[str, int] | None = None) -> str:
    """The kind that is chosen for one feature, from how well the rule of each tells contexts apart."""
    chooser = object.__new__(LabelChooser)
    chooser._evidence = SimpleNamespace(fitted=SimpleNamespace(rows=np.zeros((1, 9), int)))
    parts = {kind: (n_parts or {}).get(kind, 1) if kind in scores else 0 for kind in KINDS}
    chooser._rules = {kind: SimpleNamespace(n_parts=np.array([parts[kind]])) for kind in KINDS}
    chooser._precision = lambda kind: np.ones(1)
    chooser._detect = lambda kind, features, *_, **__: SimpleNamespace(score=np.array([scores.get(kind, 0.0)])[features])
    [kind] = chooser._choose()
    return kind


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({WORD: 0.7}, WORD),
        ({WORD: 0.6}, ""),
        ({WORD: 0.7, TOKEN: 0.71}, WORD),
        ({WORD: 0.7, TOKEN: 0.8}, TOKEN),
        ({WORD: 0.7, BEFORE: 0.79}, WORD),
        ({WORD: 0.7, POSITION: 0.9}, POSITION),  # a few long activations on rare first tokens carry half, and tell few contexts
        ({TOKEN: 0.68, BEFORE: 0.85, POSITION: 0.9}, POSITION),
        ({BEFORE: 0.7, AFTER: 0.71}, BEFORE),
        ({BEFORE: 0.7, POSITION: 0.66}, BEFORE),
    ],
)
def test_the_kind_that_tells_contexts_apart_is_named(scores: dict[str, float], expected: str) -> None:
    assert chosen(scores) == expected


def test_more_parts_are_no_better() -> None:
    assert chosen({WORD: 0.7, TOKEN: 0.8}, {TOKEN: 3}) == WORD
    assert chosen({BEFORE: 0.7, AFTER: 0.8}, {AFTER: 2}) == BEFORE
