"""Neighbors that list each row once, against the whole order of a search that does not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tl_latentlens as tll

NAMES = [f"blocks.{layer}.hook_resid_post" for layer in (1, 2, 4)]
TEXTS = ["The boats lay on the river bank.", "She works at a bank, and he banks with another.", "the the the the the the the"]


@pytest.fixture(scope="module", params=["raw", "center", "csls"])
def index(request: pytest.FixtureRequest, any_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tll.ContextualIndex:
    """Two banks, of which one lacks a hook name of the other."""
    folder = tmp_path_factory.mktemp("distinct")
    parts = {"a": (TEXTS, NAMES), "b": (list(tll.load_corpus("demo", limit=12)), NAMES[:2])}
    banks = [
        tll.build_bank(any_model, texts, folder / f"{part}.h5", hook_names=names, max_rows_per_token=None, progress=False)
        for part, (texts, names) in parts.items()
    ]
    return tll.ContextualIndex(banks, NAMES, device="cpu", transform=request.param)


@pytest.mark.parametrize("names", [NAMES, NAMES[1:], NAMES[:1]])
@pytest.mark.parametrize("top_k", [1, 2, 7, 10_000])
def test_each_row_stands_once_at_its_best_hook_name(index: tll.ContextualIndex, names: list[str], top_k: int) -> None:
    queries = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(4))
    queries[1, 2] = torch.from_numpy(index.banks[0].activations(NAMES[1], np.array([3])))[0]
    found = index.search(queries, top_k, names, NAMES[1], distinct=True)
    whole = index.search(queries, 10_000, names, NAMES[1])
    n_rows = len(set(whole.rows[0, 0].tolist()))
    assert found.rows.shape == (2, 3, min(top_k, n_rows))
    for query in range(6):
        at: dict[int, list[str]] = {}
        lines = whole.neighbors_of(query)
        for line in lines:
            if len(at) == top_k and line.row not in at:
                break
            if line.row in at or len(at) < top_k:
                at.setdefault(line.row, [])
        last = next(i for i, line in enumerate(lines) if line.row == list(at)[-1])
        for line in lines[: last + 1]:
            at[line.row].append(line.hook_name)
        neighbors = found.neighbors_of(query)
        assert [near.row for near in neighbors] == list(at)
        assert [near.hook_name for near in neighbors] == [names_of[0] for names_of in at.values()]
        assert [set(near.hook_names) for near in neighbors] == [set(names_of) for names_of in at.values()]
        first = {line.row: line.similarity for line in reversed(lines)}
        assert [near.similarity for near in neighbors] == pytest.approx([first[row] for row in at], abs=1e-6)


def test_heads_are_searched_alone(any_model: Any, tmp_path: Path) -> None:
    bank = tll.build_bank(any_model, TEXTS, tmp_path / "z.h5", hook_names=["blocks.1.attn.hook_z"], progress=False)
    index = tll.ContextualIndex(bank, "blocks.1.attn.hook_z[:]", device="cpu")
    name = index.hook_names[1]
    query = torch.randn(3, index.d(name), generator=torch.Generator().manual_seed(0))
    found, plain = (index.search(query, 4, query_hook_name=name, distinct=distinct) for distinct in (True, False))
    assert torch.equal(found.rows, plain.rows)
    assert {near.hook_names for near in found.neighbors_of(0)} == {(name,)}
