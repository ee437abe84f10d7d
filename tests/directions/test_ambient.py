"""Directions do not depend on what a caller has set in torch, as long as the model does not."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.models import TEXTS

import tl_latentlens as tll

pytestmark = pytest.mark.usefixtures("few_random_directions")

HOOK = "blocks.3.hook_resid_post"


@contextmanager
def ambient(name: str) -> Iterator[None]:
    try:
        if name in ("float64", "bfloat16"):
            torch.set_default_dtype(getattr(torch, name))
        torch.use_deterministic_algorithms(name == "deterministic")
        with torch.inference_mode(name == "inference"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)


def read_all(model: Any, index: tll.ContextualIndex) -> list[list[float]]:
    directions = [
        tll.difference_of_means(model, TEXTS[:2], TEXTS[3:5], HOOK, positions=positions).tolist() for positions in (-1, None)
    ]
    sae, text = tll.load_sae("demo"), "She put the money in the bank"
    features = tll.find_features(text, "bank", sae, index, model=model, label=False)
    heads = tll.find_heads(text, "bank", index, model=model, hook_name=HOOK)
    tables = [found.table.select_dtypes("number").to_numpy().ravel().tolist() for found in (features, heads)]
    return [*directions, *tables, [features.meaning.strength, heads.meaning.strength]]


@pytest.mark.parametrize("name", ["float64", "bfloat16", "deterministic", "inference"])
def test_directions(name: str, any_model: Any, index: tll.ContextualIndex) -> None:
    expected = read_all(any_model, index)
    with ambient(name):
        found = read_all(any_model, index)
    for one, other in zip(expected, found, strict=True):
        assert one == pytest.approx(other, nan_ok=True, rel=1e-6, abs=1e-7)
