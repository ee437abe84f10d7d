"""Banks of several shards, and what must be the same in a search of one index and in that of workers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tl_latentlens as tll
from support.banks import blocks_of

NAMES = ["blocks.1.hook_resid_post", "blocks.4.hook_resid_post"]
TRANSFORMS = ["raw", "center", "standardize", "remove_top", "csls", "center_writing"]


def build(model: Any, texts: list[str], path: Path, **kwargs: Any) -> tll.Bank:
    """A bank of many small blocks."""
    with blocks_of(2):
        return tll.build_bank(model, texts, path, **{"hook_names": NAMES, "batch_tokens": 64, "progress": False} | kwargs)


def build_all(model: Any, texts: list[str], folder: Path, n: int, **kwargs: Any) -> Path:
    """All shards of a bank."""
    for index in range(n):
        build(model, texts, folder, shard=(index, n), **kwargs)
    return folder


def queries(bank: tll.Bank) -> torch.Tensor:
    """Eight rows, each moved a little."""
    rows = torch.from_numpy(np.asarray(bank.vectors_at(NAMES[0], np.linspace(0, bank.n_rows - 1, 8).astype(int)), np.float32))
    return rows + 0.02 * torch.randn(rows.shape, generator=torch.manual_seed(0))


def differences(ours: tll.ContextualIndex, theirs: tll.ContextualIndex, vectors: torch.Tensor) -> Iterator[str]:
    """What two indices of the same rows answer differently."""
    for hook_name in (None, NAMES[0]):
        for settings in ({"distinct": True}, {"calibrate": True}):
            a, b = (index.search(vectors, 10, query_hook_name=hook_name, **settings) for index in (ours, theirs))
            yield from _different(a, b, ("rows", "similarities", "hook_ids", "chances", "known", "is_at"))
            if a.neighbors() != b.neighbors():
                yield "neighbors"
        unlike = {"unlike": ["water"] * 4 + [None] * 4, "query_hook_name": hook_name, "calibrate": True}
        a, b = (index.search_words(vectors, 6, **unlike) for index in (ours, theirs))
        yield from _different(a, b, ("rows", "similarities", "hook_ids", "chances"))
    a, b = (index.search_words(vectors[:2], 4, language=None) for index in (ours, theirs))
    yield from _different(a, b, ("rows", "similarities"))


def _different(a: Any, b: Any, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        x, y = getattr(a, name), getattr(b, name)
        if (x is None) != (y is None) or (x is not None and not torch.equal(x, y)):
            yield name
